"""What maskers that score keys, or draw from what is left, have in common.

The choice that most of them end in, rows in pieces that bound the memory of scores, what is left to
choose from, random choices without replacement, and the count of rows that wanted more keys than
``max_size`` gives them. The caller brings the scores; limits, earlier selections, budgets and head
groups are handled here, once for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.parameters import Size

SCORE_BYTES = 64 * 2**20
"""Scores held at once: more query rows than fit are scored in pieces."""

CACHED_BYTES = 8 * 2**20
"""Scores of one query row held at once where they can be cut by sequence and KV head: what stays in
the cache of a GPU.
"""

OVERFLOW = "overflow"
"""First part of the keys in ``Inputs.request_state`` under which rows that overflow are counted."""


def row_pieces(
    inputs: Inputs, previous: Mask, bytes_per_key: int = 4
) -> Iterator[tuple[Inputs, Mask]]:
    """The call and the mask so far, in pieces of query rows whose scores fit into `SCORE_BYTES`.

    Args:
        inputs: The attention call.
        previous: The mask so far.
        bytes_per_key: What the scores of one key for one query row and head take.
    """
    row_bytes = bytes_per_key * inputs.batch * inputs.heads * inputs.capacity
    step = max(1, SCORE_BYTES // max(1, row_bytes))
    if step >= inputs.query_len:
        yield inputs, previous
        return
    for begin in range(0, inputs.query_len, step):
        end = min(begin + step, inputs.query_len)
        yield inputs.rows(begin, end), previous.rows(begin, end)


def head_pieces(inputs: Inputs, previous: Mask) -> tuple[list[slice], list[slice]]:
    """Pieces of the sequences and of the KV heads such that the scores of one of each fit into
    `CACHED_BYTES`, if the call has one query row.

    A call of several rows is one piece; so is a KV head of a sequence, whatever its scores take.
    """
    batch, kv_heads = inputs.batch, inputs.kv_heads
    fits = max(1, CACHED_BYTES // max(1, 4 * inputs.group * inputs.capacity))
    if inputs.query_len > 1 or fits >= batch * kv_heads:
        return [slice(0, batch)], [slice(0, kv_heads)]
    # a selection that several KV heads share is not cut
    shared = previous.selected is not None and 1 < previous.selected.heads < kv_heads
    return (
        _pieces(batch, max(1, fits // kv_heads)),
        _pieces(kv_heads, kv_heads if shared else fits),
    )


def _pieces(count: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def join_rows(parts: Sequence[Tensor], fill: float = -1) -> Tensor:
    """Put pieces ``(batch, heads, rows, entries)`` together, the shorter ones padded with ``fill``.

    A single piece is returned as it is.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    padded = [
        torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts
    ]
    return torch.cat(padded, dim=2)


def add_best(
    inputs: Inputs,
    previous: Mask,
    size: Size,
    score: Callable[[Inputs], Tensor],
    share: Callable[[Tensor], Tensor] | None = None,
    levels: int | None = None,
    stateless: bool = False,
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
        levels: Where scores are integers from 0 on: how many there are; see `Ops.masked_topk`.
        stateless: The scores of a sequence and KV head come from its queries, keys and values
            alone, so that ``score`` may be asked for some of them at a time; see `head_pieces`.

    Returns:
        ``previous`` united with the choice.
    """
    budget = inputs.budget(size)
    if not budget.capacity or previous.is_full:
        return previous

    def choose(part: Inputs, taken: Mask, count: Tensor | None) -> Tensor:
        scores = score(part)
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
            count=count,
            start=part.allowed.start,
            stop=part.allowed.stop,
            taken=taken.ranges,
            levels=levels,
        )
        return indices

    parts = [
        _by_head(choose, rows, taken, budget.count)
        if stateless
        else choose(rows, taken, budget.count)
        for rows, taken in row_pieces(inputs, previous)
    ]
    indices = join_rows(parts)
    # a choice that heads share may hold a key that only some of them have selected before
    own = previous.selected is None or previous.selected.heads <= indices.shape[1]
    return previous.union(Mask.from_indices(inputs.shape, indices), disjoint=own)


Choose = Callable[[Inputs, Mask, Tensor | None], Tensor]
"""Chooses keys of a call from what a mask leaves, so many per sequence."""


def _by_head(choose: Choose, rows: Inputs, taken: Mask, count: Tensor | None) -> Tensor:
    """Choose piece by piece as `head_pieces` cuts the call, and put the pieces together."""
    sequences, kv_heads = head_pieces(rows, taken)
    if len(sequences) == len(kv_heads) == 1:
        return choose(rows, taken, count)

    def line(some: slice) -> Tensor:
        own = count if count is None or len(count) == 1 else count[some]
        pieces = [
            choose(
                rows.part(some, part),
                taken.part(some, slice(part.start * rows.group, part.stop * rows.group)),
                own,
            )
            for part in kv_heads
        ]
        return torch.cat(pieces, dim=1)

    return torch.cat([line(some) for some in sequences])


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


def residual_scores(scores: Tensor, inputs: Inputs, previous: Mask) -> Tensor:
    """Scores with -inf at keys that a foreign mask forbids or that are selected by index.

    Limits and ranges are left to `Ops.masked_topk` and `Ops.masked_topp`, which take them as
    ``start``, ``stop`` and ``taken``.
    """
    if inputs.allowed.keep is not None:
        scores = scores.masked_fill(~inputs.allowed.keep, float("-inf"))
    if previous.selected is not None or previous.dense is not None:
        rest = attrs.evolve(previous, ranges=())
        scores = rest.exclude_from(scores)
    return scores


def _is_ranges(previous: Mask, allowed: Allowed) -> bool:
    """Whether ranges are all that is selected, and all that is allowed."""
    other = previous.is_full or previous.selected is not None or previous.dense is not None
    return bool(previous.ranges) and not other and allowed.keep is None


def residual_count(inputs: Inputs, previous: Mask) -> Tensor:
    """Allowed keys that are not selected yet per row, int64 that broadcasts to the rows.

    Costs what the mask so far costs to count: nothing of the size of the keys unless it is dense.
    """
    if _is_ranges(previous, inputs.allowed):
        return inputs.ops.residual_count(previous.ranges, inputs.allowed)
    chosen, total = previous.counts(inputs.allowed)
    return total - chosen


def selected_entries(inputs: Inputs, previous: Mask) -> tuple[Tensor, Tensor | None]:
    """Every selected and allowed key once, by index; see `Mask.entries`."""
    if _is_ranges(previous, inputs.allowed):
        keys = inputs.ops.range_entries(previous.ranges, inputs.allowed, inputs.capacity)
        return keys, None
    return previous.entries(inputs.allowed)


def sample(
    inputs: Inputs, previous: Mask, count: Tensor, capacity: int, *, draw: int = 0
) -> Tensor:
    """Draw keys uniformly and without replacement from what ``previous`` leaves.

    Every (sequence, query head, query row) draws for itself. The keys of the greatest random
    numbers are taken, so that a sample depends on the positions alone and not on how keys came.

    Args:
        inputs: The attention call, perhaps with narrower limits than the mask has.
        previous: The mask so far.
        count: Keys to draw per row, int32 broadcastable to ``(batch, heads, query_len)``, at most
            what is left.
        capacity: Entries per row in the result; at least every count.
        draw: Distinguishes several samples at one place.

    Returns:
        int32 indices ``(batch, heads, query_len, capacity)``, -1 past the sample.
    """
    allowed, ops = inputs.allowed, inputs.ops
    place = (inputs.random, inputs.heads, inputs.query_position, inputs.capacity, allowed.first)
    if allowed.keep is None and previous.selected is None and previous.dense is None:
        indices, _ = ops.random_topk(
            *place,
            capacity,
            batch=inputs.batch,
            draw=draw,
            count=count,
            start=allowed.start,
            stop=allowed.stop,
            taken=previous.ranges,
        )
        return indices
    scores = ops.random_scores(*place, draw=draw)
    scores = scores.expand(inputs.batch, -1, -1, -1).contiguous()
    indices, _ = ops.masked_topk(
        residual_scores(scores, inputs, previous),
        capacity,
        count=count,
        start=allowed.start,
        stop=allowed.stop,
        taken=previous.ranges,
    )
    return indices


def count_overflow(inputs: Inputs, rows: Tensor) -> None:
    """Add to the count of rows that wanted more keys than they got.

    Counted on the device, per step and layer, in ``inputs.request_state``: `overflow_rows` sums
    them up. They go back with the request's state; the warm-up steps of a graph capture count too.

    Args:
        inputs: The attention call.
        rows: bool of any shape, True for each (sequence, head, query row) that overflowed.
    """
    place = (OVERFLOW, inputs.random.step, inputs.layer)
    if place not in inputs.request_state:
        zero = torch.zeros((), dtype=torch.int64, device=rows.device)
        inputs.request_state[place] = zero
    inputs.request_state[place].add_(rows.sum())


def overflow_rows(request_state: Mapping[Any, Any]) -> int:
    """Rows that wanted more keys than ``max_size`` gave them, over steps and layers; waits for the
    device.
    """
    counts = [
        int(count)
        for place, count in request_state.items()
        if isinstance(place, tuple) and place[:1] == (OVERFLOW,)
    ]
    return sum(counts)
