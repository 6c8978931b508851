"""Equality of short mathematical answers as texts, by the normal form of the MATH data set.

Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset" (2021,
arXiv:2103.03874); the rules are those of ``modeling/math_equivalence.py`` there. The copy of these
rules in lm-evaluation-harness differs in two points, which the argument ``harness`` brings.
"""

from __future__ import annotations

import re

_REMOVED_FIRST = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_PERCENT = (("\\%", ""), ("%", ""))
_DECIMAL = ((" .", " 0."), ("{.", "{0."))
_UNIT = "\\text{ "


class NoNormalFormError(ValueError):
    """A text that the rules do not cover, on which the official code raises."""


def is_equiv(first: str, second: str, *, harness: bool = False) -> bool:
    """Return whether two answers have one normal form, or are the same where one has none."""
    try:
        return normal_form(first, harness=harness) == normal_form(second, harness=harness)
    except NoNormalFormError:
        return first == second


def normal_form(text: str, *, harness: bool = False) -> str:
    r"""Return an answer without what does not change its value.

    Units behind ``\text{ ``, degrees, dollars, percent signs, spaces and ``x=`` go; ``\frac12``,
    ``1/2`` and ``0.5`` become ``\frac{1}{2}``, ``\sqrt3`` becomes ``\sqrt{3}``.

    Args:
        text: The answer.
        harness: As in lm-evaluation-harness: a percent sign stays unless a backslash is before it,
            and what has one slash between anything but two integers has no normal form.

    Raises:
        NoNormalFormError: The rules do not cover it.
    """
    text = _replaced(text, _REMOVED_FIRST)
    if _UNIT in text:
        if text.count(_UNIT) > 1:
            raise NoNormalFormError(text)
        text = text.partition(_UNIT)[0]
    text = _replaced(text, (*_PERCENT[: 1 if harness else 2], *_DECIMAL))
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    if harness and text.count("/") == 1 and not all(map(_is_integer, text.split("/"))):
        raise NoNormalFormError(text)
    return _fraction_of_slash(text)


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _braced_roots(text: str) -> str:
    first, *others = text.split("\\sqrt")
    if not all(others):
        raise NoNormalFormError(text)
    braced = (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}" for part in others)
    return "\\sqrt".join([first, *braced])


def _braced_fractions(text: str) -> str:
    first, *others = text.split("\\frac")
    parts = [first]
    for part in others:
        if not part:
            raise NoNormalFormError(text)
        if part[0] == "{":
            parts.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            parts.append(f"{{{part[0]}}}{part[1:]}")
        else:
            parts.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return "\\frac".join(parts)


def _fraction_of_slash(text: str) -> str:
    """The fraction that two integers with a slash between them mean, written without zeros."""
    found = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text)
    return f"\\frac{{{found[1]}}}{{{found[2]}}}" if found else text
