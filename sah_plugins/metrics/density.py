"""Density: selected keys over allowed keys, of a whole run.

Sums over all layers and all rows of the phases that run sparse; layers that stay dense count as 1.
Every key counts once, whatever its probability. Beside the mean stands the highest density of a
single row, which says what a selection without a bound (top-p, adaptive) must make room for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sah_core import Inputs, Mask, Metric, hookimpl


class Density(Metric):
    """Observer that counts selected and allowed (query, key) pairs."""

    name: ClassVar[str] = "density"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self._selected: Any = 0
        self._allowed: Any = 0
        self._highest: Any = 0.0
        self._last: tuple[Any, Any, Any, Any] | None = None

    @hookimpl
    def sah_mask_built(self, inputs: Inputs, mask: Mask) -> None:
        """Count one layer of one forward pass; nothing waits for the device."""
        last = self._last
        same_limits = last is not None and last[0] is inputs.allowed
        if (
            last is not None
            and same_limits
            and (last[1] is mask or (mask.is_full and last[1].is_full))
        ):
            selected, allowed = last[2], last[3]
        else:
            chosen, total = mask.counts(inputs.allowed)
            pairs = inputs.batch * inputs.heads * inputs.query_len
            selected = chosen.sum() * (pairs // chosen.numel())
            allowed = total.sum() * (pairs // total.numel())
            self._last = (inputs.allowed, mask, selected, allowed)
            if pairs:
                highest = (chosen / total.clamp(min=1)).amax()
                self._highest = highest.clamp(min=self._highest)
        self._selected = self._selected + selected
        self._allowed = self._allowed + allowed

    def result(self) -> dict[str, float | int]:
        """Density in [0, 1], that of the densest row, and the two sums; the densities are 1 when
        nothing ran sparse.
        """
        selected, allowed = int(self._selected), int(self._allowed)
        highest = float(self._highest) if allowed else 1.0
        return summary(selected, allowed, highest)

    @staticmethod
    def combine(results: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Result of a run from those of its samples: sums, and the densities that they give."""
        selected = sum(result["selected"] for result in results)
        allowed = sum(result["allowed"] for result in results)
        return summary(selected, allowed, max((r["max_density"] for r in results), default=1.0))


def summary(selected: int, allowed: int, highest: float) -> dict[str, float | int]:
    """The result that two sums and the highest density make."""
    return {
        "density": selected / allowed if allowed else 1.0,
        "max_density": highest,
        "selected": selected,
        "allowed": allowed,
    }


@hookimpl
def sah_metric() -> type[Density]:
    """Register the metric."""
    return Density
