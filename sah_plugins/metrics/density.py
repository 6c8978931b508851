"""Density: selected keys over allowed keys, of a whole run.

Sums over all layers and all rows of the phases that run sparse; layers that stay dense count as 1.
Every key counts once, whatever its probability.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sah_core import Inputs, Mask, hookimpl


class Density:
    """Observer that counts selected and allowed (query, key) pairs."""

    name: ClassVar[str] = "density"

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self._selected: Any = 0
        self._allowed: Any = 0
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
        self._selected = self._selected + selected
        self._allowed = self._allowed + allowed

    def result(self) -> dict[str, float | int]:
        """Density in [0, 1] (1 when nothing ran sparse) and the two sums."""
        selected, allowed = int(self._selected), int(self._allowed)
        density = selected / allowed if allowed else 1.0
        return {"density": density, "selected": selected, "allowed": allowed}

    @staticmethod
    def combine(results: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Result of a run from those of its samples: sums, and the density that they give."""
        selected = sum(result["selected"] for result in results)
        allowed = sum(result["allowed"] for result in results)
        density = selected / allowed if allowed else 1.0
        return {"density": density, "selected": selected, "allowed": allowed}


@hookimpl
def sah_metric() -> type[Density]:
    """Register the metric."""
    return Density
