"""Golden cases on a real device: selections exactly, outputs within 1e-5 in float32."""

from pathlib import Path

import pytest
import torch

from sah_core.testing.golden import run_maskers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HERE = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("backend", ["triton", "gather", "eager"])
def test_every_case_passes_on_the_device(backend):
    results = list(run_maskers([HERE], [backend], device="cuda"))
    assert len(results) >= 20
    assert [r for r in results if r.status == "failed"] == []
    assert sum(r.status == "passed" for r in results) >= len(results) // 2
