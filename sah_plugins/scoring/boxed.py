r"""Answers in ``\boxed{…}``, whose braces may be nested."""

from __future__ import annotations

import re

from .text import whole_number

_START = "\\boxed{"
_NOISE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|left|right)\b|\\[,!;:$% ]|[\s$,{}%]")
_INTEGER = re.compile(r"[0-9]+")


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete ``\boxed{…}`` holds; None if there is none."""
    start = text.rfind(_START)
    while start >= 0:
        content = to_closing_brace(text, start + len(_START))
        if content is not None:
            return content
        start = text.rfind(_START, 0, start)
    return None


def to_closing_brace(text: str, start: int) -> str | None:
    """Return the text from ``start`` to the brace that closes the one before it, if one does."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[start:index]
    return None


def as_integer(content: str) -> int | None:
    r"""Return the non-negative integer that a box holds, as ``033``, ``1{,}024``, ``\text{73}``.

    Returns:
        None if it holds anything else, such as a fraction, a sum or an equation.
    """
    bare = _NOISE.sub("", content).removesuffix(".")
    return whole_number(bare) if _INTEGER.fullmatch(bare) else None


def last_integer(text: str) -> int | None:
    """Return the last run of digits of the last line that is not blank; None if it has none."""
    lines = text.strip().rsplit("\n", 1)
    found = _INTEGER.findall(lines[-1].replace(",", ""))
    return whole_number(found[-1]) if found else None
