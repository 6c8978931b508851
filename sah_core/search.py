"""Where a tuning run looks for good values of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs


@attrs.frozen
class Search:
    """The candidates of one parameter: plain data, no search library.

    Attributes:
        kind: ``choice``, ``uniform``, ``log_uniform`` or ``int_range``.
        values: the candidates of ``choice``.
        low: the lower end, included.
        high: the upper end, included.
    """

    kind: str
    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None

    @classmethod
    def choice(cls, values: Sequence[Any]) -> Search:
        """One of `values`, in no order.

        Raises:
            ValueError: If there is none.
        """
        if not values:
            raise ValueError("a search over choices needs at least one value")
        return cls("choice", values=tuple(values))

    @classmethod
    def uniform(cls, low: float, high: float) -> Search:
        """A number between `low` and `high`.

        Raises:
            ValueError: If `low` is not below `high`.
        """
        return cls("uniform", low=low, high=high)._ordered()

    @classmethod
    def log_uniform(cls, low: float, high: float) -> Search:
        """A number between `low` > 0 and `high`, uniform in its logarithm.

        Raises:
            ValueError: If `low` is not above 0, or not below `high`.
        """
        if low <= 0:
            raise ValueError(f"a logarithmic search needs low > 0, got {low}")
        return cls("log_uniform", low=low, high=high)._ordered()

    @classmethod
    def int_range(cls, low: int, high: int) -> Search:
        """An integer from `low` to `high`, both included.

        Raises:
            ValueError: If `low` is not below `high`.
        """
        return cls("int_range", low=low, high=high)._ordered()

    def _ordered(self) -> Search:
        if self.low is None or self.high is None or self.low >= self.high:
            raise ValueError(f"a search needs low < high, got {self.low} and {self.high}")
        return self

    def to_plain(self) -> dict[str, Any]:
        """The search as plain data: its kind, and its values or its ends."""
        if self.kind == "choice":
            return {"kind": self.kind, "values": list(self.values)}
        return {"kind": self.kind, "low": self.low, "high": self.high}
