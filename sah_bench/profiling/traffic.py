"""The bytes that an attention call must move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sah_core import Inputs, Mask, Masker


@attrs.frozen
class Traffic:
    """Bytes to read; queries, outputs and index lists are small beside them and left out.

    Attributes:
        selection: What choosing reads, as the maskers say (`Masker.bytes_read`).
        attention: Keys and values of the selected keys, each once per KV head: of query heads and
            rows that choose for themselves, the union in their group.
        requested: Likewise, but each choice of its own counted: what an execution reads that does
            not find the overlap in a cache.
    """

    selection: int = 0
    attention: int = 0
    requested: int = 0

    @property
    def total(self) -> int:
        """What must move."""
        return self.selection + self.attention

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.selection + other.selection,
            self.attention + other.attention,
            self.requested + other.requested,
        )


def traffic_of(inputs: Inputs, mask: Mask, steps: Sequence[tuple[Masker, Inputs]]) -> Traffic:
    """The bytes of one call.

    Args:
        inputs: The call.
        mask: What it selects.
        steps: The maskers with the call as each saw it.
    """
    per_key = inputs.key.shape[3] * inputs.key.element_size()
    per_key += inputs.value.shape[3] * inputs.value.element_size()
    batch, kv_heads = inputs.batch, inputs.kv_heads
    union = torch.zeros((batch, kv_heads, inputs.capacity), dtype=torch.bool, device=inputs.device)
    requested = 0
    for row in range(inputs.query_len):  # a whole dense mask may not fit
        chosen = keys_of_row(inputs, mask, row)
        union |= chosen.view(batch, kv_heads, -1, inputs.capacity).any(dim=2)
        own = max(mask.heads, kv_heads, inputs.allowed.heads)
        requested += int(chosen.view(batch, own, -1, inputs.capacity).any(dim=2).sum())
    return Traffic(
        selection=sum(masker.bytes_read(seen) for masker, seen in steps),
        attention=int(union.sum()) * per_key,
        requested=requested * per_key,
    )


def keys_of_row(inputs: Inputs, mask: Mask, row: int) -> Tensor:
    """What a query row attends, bool ``(batch, heads, keys)``."""
    allowed = inputs.allowed.rows(row, row + 1).to_dense(inputs.capacity)
    chosen = (mask.rows(row, row + 1).to_dense() > 0).to(inputs.device) & allowed
    return chosen[:, :, 0]
