"""The choice that most maskers end in: the best-scored keys among those not selected yet.

The caller brings the scores; limits, earlier selections, budgets, head groups and the memory that
scores take are handled here, once for all methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sah_core.mask import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from sah_core.inputs import Inputs
    from sah_core.parameters import Size

__all__ = ["SCORE_BYTES", "add_best"]

SCORE_BYTES = 64 * 2**20
"""Scores held at once: more query rows than fit are scored in pieces."""


def add_best(
    inputs: Inputs,
    previous: Mask,
    size: Size,
    score: Callable[[Inputs], Tensor],
    share: Callable[[Tensor], Tensor] | None = None,
) -> Mask:
    """Add the ``size`` best keys of each row that may be attended and are not selected yet.

    Of equal scores the lower index wins.

    Args:
        inputs: The attention call.
        previous: What earlier steps selected.
        size: Keys to add per row, as far as there are so many.
        score: Gives the scores of some rows of the call: from an `Inputs` with those rows, float32
            ``(batch, heads | kv_heads, query_len, capacity)``; one row per KV head makes a
            selection that its query heads share. The result must be the caller's to give away.
        share: For scores of a head that depend on which keys are candidates (a softmax over them):
            from scores per query head with -inf at all other keys it makes those to choose by,
            per query head or KV head, finite where the choice is open.

    Returns:
        ``previous`` united with the choice.
    """
    budget = inputs.budget(size)
    if not budget.capacity or previous.is_full:
        return previous
    row_bytes = 4 * inputs.batch * inputs.heads * inputs.capacity
    step = max(1, SCORE_BYTES // row_bytes)
    parts = []
    for begin in range(0, inputs.query_len, step):
        end = min(begin + step, inputs.query_len)
        part = inputs if step >= inputs.query_len else inputs.rows(begin, end)
        scores = score(part)
        taken = previous.rows(begin, end)
        if share is not None:
            scores = share(_candidates(scores, part, taken))
        keep = part.allowed.keep
        if keep is not None:
            scores = scores.masked_fill(~_shared(keep, scores.shape[1]), float("-inf"))
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
    # a choice that heads share may hold a key that only some of them have selected before
    own = previous.selected is None or previous.selected.heads <= indices.shape[1]
    return previous.union(Mask.from_indices(inputs.shape, indices), disjoint=own)


def _candidates(scores: Tensor, inputs: Inputs, taken: Mask) -> Tensor:
    """Scores of query heads with -inf at keys that they may not attend or have selected."""
    allowed = inputs.allowed
    position = torch.arange(inputs.capacity, dtype=torch.int32, device=inputs.device)
    inside = (position >= allowed.start.unsqueeze(-1)) & (position < allowed.stop.unsqueeze(-1))
    if allowed.keep is not None:
        inside = inside & allowed.keep
    return taken.exclude_from(scores.masked_fill(~inside, float("-inf")))


def _shared(keep: Tensor, heads: int) -> Tensor:
    """What may be attended, per head of the scores: by any of the query heads that share one."""
    if keep.shape[1] in (1, heads):
        return keep
    batch, _, query_len, key_len = keep.shape
    return keep.reshape(batch, heads, -1, query_len, key_len).any(dim=2)
