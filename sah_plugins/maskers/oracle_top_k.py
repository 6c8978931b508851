"""Oracle top-k: the keys with the highest true attention logits.

The upper bound that every top-k method approximates; for example Aditya Desai and others:
HashAttention: Semantic Sparsity for Faster Inference, arXiv 2412.14468, section 3 (the oracle of
their comparison).

Chooses among the allowed keys that are not selected yet, so its budget comes on top of sink and
window. Scores are computed in float32 and equal scores go to the lower index.

Differs from no paper: it is a definition. Reads every key once per query; keeps no state.
"""

from typing import ClassVar

import attrs
import torch

from sah_core import Inputs, Mask, Masker, Search, Size, hookimpl, param

SCORE_BYTES = 64 * 2**20
"""Scores held at once: more query rows than fit are scored in pieces."""


@attrs.frozen(kw_only=True)
class OracleTopK(Masker):
    """Select the ``heavy_size`` keys of the highest logits, per query head."""

    name: ClassVar[str] = "oracle-top-k"

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected per query head, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.01, 0.02, 0.05, 0.1, 0.2]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best keys that ``previous`` does not hold yet."""
        budget = inputs.budget(self.heavy_size)
        if not budget.capacity or previous.is_full:
            return previous
        row_bytes = 4 * inputs.batch * inputs.heads * inputs.capacity
        step = max(1, SCORE_BYTES // row_bytes)
        parts = []
        for begin in range(0, inputs.query_len, step):
            end = min(begin + step, inputs.query_len)
            part = inputs if step >= inputs.query_len else inputs.rows(begin, end)
            scores = inputs.ops.logits(part.query, part.key, part.scaling, part.softcap)
            if part.allowed.keep is not None:
                scores = scores.masked_fill(~part.allowed.keep, float("-inf"))
            taken = previous.rows(begin, end)
            if taken.selected is not None or taken.dense is not None:
                scores = taken.exclude_from(scores)
            indices, _ = inputs.ops.masked_topk(
                scores,
                budget.capacity,
                count=budget.count,
                start=part.allowed.start,
                stop=part.allowed.stop,
                taken=taken.ranges,
            )
            parts.append(indices)
        indices = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return previous.union(Mask.from_indices(inputs.shape, indices), disjoint=True)

    def bytes_read(self, inputs: Inputs) -> int:
        """Every key."""
        return inputs.key.numel() * inputs.key.element_size()


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return OracleTopK
