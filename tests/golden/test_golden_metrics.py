"""The metrics give the numbers of the official code: the cases here, and those beside the project.

A metric whose optional library is not installed is skipped, case by case, by the runner itself.
"""

from pathlib import Path

import pytest

from sah_core.testing.golden_metrics import run_metrics

pytestmark = pytest.mark.unit
HERE = Path(__file__).parent / "metrics"
BESIDE = Path(__file__).parents[3] / "shared" / "golden" / "metrics"
FILES = sorted([*HERE.glob("*.json"), *BESIDE.glob("*.json")])


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parents[1].parent.name}-{p.stem}" for p in FILES])
def test_a_golden_file_passes(path):
    from sah_core.errors import RequestError

    try:
        [result] = run_metrics([path])
    except RequestError as error:
        pytest.skip(str(error))
    if result.status == "skipped":
        pytest.skip("; ".join(result.reasons))
    assert result.differences == ()
    assert result.passed > 0
