"""How many keys there are, and which lie in ranges, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.mask import KeyRange, Mask, ranges_length


class CountOps:
    """Fractions of the keys, and the keys inside and outside of ranges."""

    def share(
        self,
        length: Tensor,
        first: Tensor,
        fraction: float,
        *,
        divisor: int = 1,
        minimum: int = 0,
        maximum: int | None = None,
    ) -> Tensor:
        """A fraction of the real keys, on the device: what a fractional size means there.

        Args:
            length: Valid keys, int32 ``(1,)``.
            first: First real key per sequence, int32 ``(batch | 1,)``.
            fraction: In (0, 1].
            divisor: Keys per unit counted (a page, say).
            minimum: Least result.
            maximum: Greatest result; None = no limit. It wins over ``minimum``.

        Returns:
            ``floor(fraction * (length - first)) // divisor`` within its limits, int32
            ``(batch | 1, 1, 1)``; products in float64, as the host computes them.
        """
        count = ((length - first).double() * fraction).floor().to(torch.int32)
        if divisor > 1:
            count = count.div(divisor, rounding_mode="floor")
        return count.clamp(min=minimum).clamp(max=maximum).view(-1, 1, 1)

    def residual_count(self, ranges: Sequence[KeyRange], allowed: Allowed) -> Tensor:
        """Allowed keys per row that lie in none of some ranges.

        Args:
            ranges: At least one.
            allowed: What may be attended, an interval per row (no ``keep``).

        Returns:
            int64 ``(batch | 1, 1, query_len | 1)``.
        """
        return allowed.counts - ranges_length(ranges, allowed)

    def range_entries(self, ranges: Sequence[KeyRange], allowed: Allowed, key_len: int) -> Tensor:
        """The allowed keys of some ranges, each once.

        Args:
            ranges: At least one.
            allowed: What may be attended, an interval per row (no ``keep``).
            key_len: Keys in the buffer.

        Returns:
            int32 ``(batch | 1, 1, query_len | 1, count)``, -1 where an entry holds no key.
        """
        return Mask((1, 1, 1, key_len), tuple(ranges)).entries(allowed)[0]
