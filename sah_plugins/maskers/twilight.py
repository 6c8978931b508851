"""Twilight: of what earlier steps selected, keep only what an estimated top-p needs.

Chaofan Lin, Jiaming Tang, Shuo Yang, Hanshuo Wang, Tian Tang, Boyu Tian, Ion Stoica, Song Han,
Mingyu Gao: Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, arXiv 2502.02770,
section 4 (select with a generous budget, then prune).

A selector (`quest`, `double-sparsity`, or everything) chooses candidates; their logits are
estimated from a 4-bit copy of the keys, and of the candidates the fewest are kept whose estimated
mass reaches ``top_p`` of that of all candidates. This is the step that removes.

Differs from the paper in choosing per query head, without a union over the KV group; in exact
top-p by order instead of a search for a threshold; and in attending with the true keys only: a mask
cannot say that estimated weights be used. Reads the 4-bit keys of the candidates per query, and
keeps half a byte per channel and two numbers per token and KV head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Search, hookimpl, param
from sah_core.mask import spread_heads
from sah_core.ops import Ops, code_width, code_words
from sah_core.selection import join_rows, row_pieces
from sah_core.state import LayerInfo, TokenBuffer

BYTES_PER_KEY = 48
"""Of one query row and head: index, logit, float64 mass and order of a candidate."""


class RoundedKeys:
    """The state of one layer: every key, rounded to a few bits per channel between its own minimum
    and maximum.

    Attributes:
        codes: Packed codes of each key.
        affine: Step and minimum of each key.
    """

    def __init__(self, layer: LayerInfo, bits: int) -> None:
        self.bits = bits
        self.ops: Ops = layer.ops
        lead = (layer.batch, layer.kv_heads, layer.capacity)
        words = code_words(layer.head_dim, code_width(bits))
        self.codes = TokenBuffer((*lead, words), torch.int32, layer.device)
        self.affine = TokenBuffer((*lead, 2), layer.dtype, layer.device)
        every = torch.arange(layer.head_dim, device=layer.device)
        self.channels = every.expand(layer.kv_heads, -1)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Take in new keys; a start on the device never grows the buffers."""
        if isinstance(start, int):
            self.reserve(start + key.shape[2])
        codes, affine = self.codes.data, self.affine.data
        self.ops.label_update(codes, affine, key, self.channels, start, self.bits)

    def reserve(self, keys: int) -> None:
        """Make sure that so many keys fit."""
        self.codes.reserve(keys)
        self.affine.reserve(keys)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.codes.reorder(rows)
        self.affine.reorder(rows)

    def snapshot(self) -> None:
        """Nothing: a key's codes are not changed by keys that come after it."""

    def restore(self, token: None) -> None:
        """Nothing: keys after the snapshot are overwritten by those that come."""


@attrs.frozen(kw_only=True)
class Twilight(Masker):
    """Keep the fewest of the selected keys that hold ``top_p`` of their estimated mass."""

    name: ClassVar[str] = "twilight"
    capabilities: ClassVar[Capabilities] = Capabilities(prunes=True, keys_only=True)

    top_p: float = param(
        0.85,
        type=float,
        minimum=0.0,
        maximum=1.0,
        exclusive_minimum=True,
        help="Share of the candidates' estimated attention mass that is kept.",
        search=Search.choice([0.7, 0.8, 0.85, 0.9, 0.95, 0.98]),
    )
    label_bits: int = param(
        4,
        type=int,
        choices=(2, 4, 8, 16),
        help="Bits per channel of the keys from which the mass is estimated; 16 takes the keys.",
        unit="bits",
    )
    keep_ranges: bool = param(
        False,
        help="Leave ranges (sink, window) alone: the share is one of what was chosen by index.",
    )

    def init_state(self, layer: LayerInfo) -> RoundedKeys | None:
        """Room for the rounded keys; none if the keys themselves are taken."""
        return None if self.label_bits == 16 else RoundedKeys(layer, self.label_bits)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Round the new keys."""
        state.append(key, start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Remove what the estimated top-p does not need; the best candidate always stays."""
        alone = previous.selected is None and previous.dense is None and not previous.is_full
        if previous.is_empty or (self.keep_ranges and alone):
            return previous
        kept = Mask.from_ranges(inputs.shape, previous.ranges if self.keep_ranges else ())
        found, chances = [], []
        for part, selected in row_pieces(inputs, previous, BYTES_PER_KEY):
            keys, chance = self.prune(part, selected)
            found.append(keys)
            if chance is not None:
                chances.append(chance)
        mask = Mask.from_indices(
            inputs.shape,
            join_rows(found),
            probability=join_rows(chances, fill=1.0) if chances else None,
        )
        return kept.union(mask, disjoint=True)

    def prune(self, inputs: Inputs, previous: Mask) -> tuple[Tensor, Tensor | None]:
        """Keys that stay, int32 ``(batch, heads, query_len, entries)``, and their probabilities."""
        keys, chance = self.candidates(inputs, previous)
        if not keys.shape[-1]:
            rows = (*inputs.shape[:3], 0)
            return keys.expand(rows), None if chance is None else chance.expand(rows)
        logits = self.estimate(inputs, keys)
        keys = spread_heads(keys, inputs.heads).expand(logits.shape)
        if chance is not None:
            # a sampled key weighs e^l / p in the attention
            chance = spread_heads(chance, inputs.heads).expand(logits.shape)
            logits = logits - chance.log()
        capacity = keys.shape[-1] if inputs.key_len is None else None
        slots, _, _ = inputs.ops.masked_topp(logits, self.top_p, capacity)
        places = slots.clamp(min=0).long()
        indices = torch.where(slots < 0, -1, keys.gather(-1, places))
        return indices, None if chance is None else chance.gather(-1, places)

    def candidates(self, inputs: Inputs, previous: Mask) -> tuple[Tensor, Tensor | None]:
        """Allowed keys that are up for pruning, in the order of their indices."""
        if self.keep_ranges and not previous.is_full:
            keys, chance = attrs.evolve(previous, ranges=()).entries(inputs.allowed)
            keys = torch.where(previous.covers(keys), -1, keys)
        else:
            keys, chance = previous.entries(inputs.allowed)
        # equal estimates go to the lower index, whatever the order in which they were selected
        keys, order = keys.sort(dim=-1)
        if chance is not None:
            chance = chance.expand(keys.shape).gather(-1, order)
        return keys, chance

    def estimate(self, inputs: Inputs, keys: Tensor) -> Tensor:
        """Estimated logits of the candidates, -inf at entries that are none."""
        ops, scaling, softcap = inputs.ops, inputs.scaling, inputs.softcap
        if self.label_bits == 16:
            return ops.logits_at(inputs.query, inputs.key, keys, scaling, softcap)
        state: RoundedKeys = inputs.state
        codes, affine = state.codes.first(inputs.capacity), state.affine.first(inputs.capacity)
        return ops.label_logits_at(
            inputs.query, codes, affine, keys, self.label_bits, scaling, softcap
        )

    def bytes_read(self, inputs: Inputs) -> int:
        """The rounded keys, if every key is a candidate."""
        keys = inputs.batch * inputs.kv_heads * inputs.capacity
        if self.label_bits == 16:
            return keys * inputs.key.shape[3] * inputs.key.element_size()
        words = code_words(inputs.key.shape[3], code_width(self.label_bits))
        return keys * (4 * words + 2 * inputs.key.element_size())


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Twilight
