"""Sizes: a number of keys, given in tokens or as a fraction of the keys."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any, TypeGuard

import attrs

from .errors import ParameterError

__all__ = ["Size", "percent"]

_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*%\s*")
_INTEGER = re.compile(r"\s*[0-9]+\s*")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer of any library; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite real number of any library; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def percent(text: str) -> float | None:
    """The fraction that a text such as ``5%`` names, or None if it is no percentage.

    The division is decimal, so that ``0.55%`` is the float nearest to 0.0055.
    """
    from decimal import Decimal

    match = _PERCENT.fullmatch(text)
    return float(Decimal(match[1]) / 100) if match else None


@attrs.frozen
class Size:
    """A number of keys: either tokens or a fraction of the keys that can be attended.

    Attributes:
        tokens: the number of keys, >= 0; None if the size is a fraction.
        fraction: the share of the keys in (0, 1]; None if the size is in tokens.
    """

    tokens: int | None = None
    fraction: float | None = None

    def __attrs_post_init__(self) -> None:
        if (self.tokens is None) == (self.fraction is None):
            both = (self.tokens, self.fraction)
            raise ParameterError("Size", "value", both, "either tokens or a fraction")
        if self.tokens is not None and (not is_integer(self.tokens) or self.tokens < 0):
            raise ParameterError("Size", "tokens", self.tokens, "an integer >= 0")
        if self.fraction is not None and not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ParameterError("Size", "fraction", self.fraction, "a number > 0 and <= 1")

    @classmethod
    def parse(cls, value: Size | int | float | str) -> Size:
        """Reads a size: an int is tokens, a float a fraction, a text ``128``, ``0.05`` or ``5%``.

        So 1 is one token, and 1.0 and ``100%`` are all keys.

        Raises:
            ParameterError: for anything else, a bool included.
        """
        if isinstance(value, Size):
            return value
        number: Any = _number(value) if isinstance(value, str) else value
        if is_integer(number) and number >= 0:
            return cls(tokens=int(number))
        if is_number(number) and not is_integer(number) and 0 < number <= 1:
            return cls(fraction=float(number))
        expected = "an integer >= 0 (tokens) or a fraction in (0, 1]"
        raise ParameterError("Size", "value", value, expected)

    def resolve(self, keys: int) -> int:
        """The size in tokens: as it is, or its fraction of `keys`, rounded down."""
        size = self.plain()
        return size if isinstance(size, int) else math.floor(size * keys)

    def plain(self) -> int | float:
        """The size as a number that `parse` reads back: int for tokens, float for a fraction."""
        return self.tokens if self.fraction is None else self.fraction  # type: ignore[return-value]

    def __str__(self) -> str:
        return repr(self.plain())


def _number(text: str) -> int | float | None:
    if _INTEGER.fullmatch(text):
        return int(text)
    share = percent(text)
    if share is not None:
        return share
    try:
        return float(text)
    except ValueError:
        return None
