"""``docs/models.md`` says what was measured."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "models.md"
COMMAND = "TRITON_INTERPRET=1 python tests/models_matrix.py --write"


def test_the_page_of_models_is_what_running_them_gives():
    if find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "models_matrix.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert "WRONG" not in made.stdout
    assert made.stdout == PAGE.read_text(), f"docs/models.md is out of date; run: {COMMAND}"
