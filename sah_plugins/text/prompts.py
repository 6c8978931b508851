"""Prompts that lie beside the code that asks them."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def prompts_of(package: str) -> dict[str, Any]:
    """Return what the file ``prompts.json`` of a package holds."""
    found: dict[str, Any] = json.loads(
        files(package).joinpath("prompts.json").read_text(encoding="utf-8")
    )
    return found
