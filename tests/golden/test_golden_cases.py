"""Golden cases: expected selections and outputs, on every backend that is there."""

from pathlib import Path

import pytest

from sah_core.testing.golden import run_maskers

pytestmark = pytest.mark.unit

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden" / "maskers"


def test_every_case_passes_on_the_backends_that_run_everywhere():
    results = list(run_maskers([HERE], ["eager", "gather"]))
    assert len(results) >= 2 * 20
    assert [r for r in results if r.status != "passed"] == []


def test_no_backend_fails_a_case_and_one_that_skips_it_refuses_it():
    results = list(run_maskers([HERE / "maskers"]))
    assert [r for r in results if r.status == "failed"] == []
    skipped = [r for r in results if r.status == "skipped"]
    assert [r for r in skipped if not r.reason.startswith(f"backend {r.backend} ")] == []


@pytest.mark.skipif(not SHARED.exists(), reason="the full set of golden cases is not at hand")
def test_the_full_set_passes_but_for_maskers_that_are_not_installed():
    results = list(run_maskers([SHARED], ["eager", "gather"]))
    assert [r for r in results if r.status == "failed"] == []
    skipped = [r for r in results if r.status == "skipped"]
    assert [r for r in skipped if not r.reason.endswith("is not installed")] == []
