"""The best of the candidates of each row: so many of them, or so much of their mass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.mask import KeyRange

TOP_P_WIDTH = 256
"""Best candidates that `TopkOps.masked_topp` looks at first where no capacity is given."""


class TopkOps:
    """Top-k and top-p inside limits."""

    def masked_topk(
        self,
        scores: Tensor,
        capacity: int,
        *,
        count: Tensor | None = None,
        start: Tensor | None = None,
        stop: Tensor | None = None,
        taken: Sequence[KeyRange] = (),
        page_size: int = 1,
        origin: Tensor | None = None,
        levels: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best-scored candidates of each row; of equal scores the lower index wins.

        Args:
            scores: float32 ``(batch, heads, query_len, candidates)``; -inf is never chosen. Not
                changed.
            capacity: Entries per row in the result.
            count: How many to choose per row, int32 broadcastable to ``(batch, heads, query_len)``,
                at most ``capacity``; None = ``capacity``.
            start: First candidate key per row, int32 ``(batch | 1, heads | 1, query_len | 1)``;
                None = 0.
            stop: One past the last candidate key per row, likewise; None = all.
            taken: Ranges whose members are no candidates; only where candidates are keys.
            page_size: Keys per candidate; a page is a candidate if any of its keys lies inside the
                limits.
            origin: Key index of page 0 per sequence, int32 ``(batch | 1,)``; None = 0.
            levels: The caller knows that every score is an integer from 0 to ``levels - 1``, or
                -inf. Changes nothing but the time it takes.

        Returns:
            int32 indices ``(batch, heads, query_len, capacity)``, the chosen ones first and -1
            after them, and how many were chosen, int32 ``(batch, heads, query_len)``. The order of
            the chosen is not promised.
        """
        candidates = scores.shape[-1]
        if page_size > 1:
            start, stop = _page_limits(start, stop, page_size, origin)
        scores = _hide(scores, start, stop, taken)
        width = min(capacity, candidates)
        values, indices = scores.topk(width, dim=-1)
        if width and width < candidates:
            worst = values[..., -1:]
            tied = (scores == worst).sum(-1) > (values == worst).sum(-1)
            if bool((tied & (worst[..., 0] > float("-inf"))).any()):
                indices = _first_of_equals(scores, worst, width)
                values = scores.gather(-1, indices)
                if count is None and bool((worst == float("-inf")).any()):
                    # these are by index: in a row of fewer candidates, what is none comes last
                    values, indices = _by_value_then_index(values, indices)
        if count is not None:
            values, indices = _by_value_then_index(values, indices)
        indices = torch.where(values > float("-inf"), indices, -1).to(torch.int32)
        chosen = (values > float("-inf")).sum(-1, dtype=torch.int32)
        if count is not None:
            chosen = torch.minimum(chosen, count.to(torch.int32))
            slot = torch.arange(width, device=scores.device)
            indices = torch.where(slot < chosen.unsqueeze(-1), indices, -1)
        if width < capacity:
            indices = torch.nn.functional.pad(indices, (0, capacity - width), value=-1)
        return indices, chosen

    def masked_topp(
        self,
        scores: Tensor,
        top_p: float,
        capacity: int | None = None,
        *,
        start: Tensor | None = None,
        stop: Tensor | None = None,
        taken: Sequence[KeyRange] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fewest candidates of each row that hold a share of the mass of all of them.

        The mass of a candidate is ``e^score``; sums are in float64. Candidates count by falling
        score, of equal scores the lower index first; the last one taken is the first at which the
        sum reaches ``top_p`` of the whole. With ``top_p`` = 1 that is every candidate.

        Args:
            scores: float32 ``(batch, heads, query_len, candidates)``; -inf is no candidate. Not
                changed.
            top_p: In (0, 1].
            capacity: Entries per row in the result; rows that need more keep their best. None
                takes what the row with the most needs, for which it waits for the device.
            start: First candidate key per row, int32 ``(batch | 1, heads | 1, query_len | 1)``;
                None = 0.
            stop: One past the last candidate key per row, likewise; None = all.
            taken: Ranges whose members are no candidates.

        Returns:
            int32 indices ``(batch, heads, query_len, capacity)`` in the order of their scores, -1
            after them; how many there are, int32 ``(batch, heads, query_len)``; and which rows
            needed more, bool likewise.
        """
        scores = _hide(scores, start, stop, taken)
        candidates = scores.shape[-1]
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        total = (scores.double() - top).exp_().sum(-1, keepdim=True)
        there = (scores > float("-inf")).sum(-1)
        # with all candidates wanted, rounding must not leave out the least of them
        target = total * top_p if top_p < 1 else torch.full_like(total, float("inf"))
        width = min(TOP_P_WIDTH, candidates) if capacity is None else capacity
        while True:
            indices, _ = self.masked_topk(scores, width)
            values = scores.gather(-1, indices.clamp(min=0).long())
            values = values.masked_fill(indices < 0, float("-inf"))
            values, indices = _by_value_then_index(values, indices)
            mass = (values.double() - top).exp_()
            before = torch.zeros_like(mass)
            torch.cumsum(mass[..., :-1], -1, out=before[..., 1:])
            needed = (before < target) & (values > float("-inf"))
            chosen = needed.sum(-1)
            # the mass of all entries there are, against what is wanted
            short = before[..., -1:] + mass[..., -1:] < target if width else total > 0
            overflow = (chosen < there) & short.squeeze(-1)
            if capacity is not None:
                break
            if width == candidates or not bool(overflow.any()):
                width = int(chosen.max()) if chosen.numel() else 0
                needed, indices = needed[..., :width], indices[..., :width]
                break
            width = min(4 * width, candidates)
        return torch.where(needed, indices, -1), chosen.to(torch.int32), overflow


def _page_limits(
    start: Tensor | None, stop: Tensor | None, page_size: int, origin: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """First page with a key inside the limits, and one past the last."""
    zero = 0 if origin is None else origin.view(-1, 1, 1)
    first, last = start, stop
    if start is not None:
        first = (start - zero).div(page_size, rounding_mode="floor")
    if stop is not None:
        last = (stop - zero + (page_size - 1)).div(page_size, rounding_mode="floor")
        if start is not None and first is not None:
            # limits that are empty inside a page hold no page
            last = torch.where(start < stop, last, first)
    return first, last


def _hide(
    scores: Tensor, start: Tensor | None, stop: Tensor | None, taken: Sequence[KeyRange]
) -> Tensor:
    """Scores with -inf at everything that is no candidate."""
    fill = float("-inf")
    limits = ([] if start is None else [start]) + ([] if stop is None else [stop])
    bounds = [t for r in taken for t in (r.start, r.stop)]
    if not limits and not bounds:
        return scores
    candidates = scores.shape[-1]
    if scores.device.type == "cpu" and all(t.numel() == 1 for t in (*limits, *bounds)):
        first = 0 if start is None else max(0, int(start))
        last = candidates if stop is None else max(0, int(stop))
        spans = [(0, first), (last, candidates)]
        spans += [(max(0, int(r.start)), max(0, int(r.stop))) for r in taken]
        scores = scores.clone()
        for begin, end in spans:
            scores[..., begin:end] = fill
        return scores
    position = torch.arange(candidates, device=scores.device, dtype=torch.int32)
    hidden = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=scores.device)
    if start is not None:
        hidden = hidden | (position < start.unsqueeze(-1))
    if stop is not None:
        hidden = hidden | (position >= stop.unsqueeze(-1))
    for part in taken:
        hidden = hidden | part.contains(position)
    return scores.masked_fill(hidden, fill)


def _by_value_then_index(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Order by falling value, then by rising index."""
    indices, order = indices.sort(dim=-1)
    values = values.gather(-1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)


def _first_of_equals(scores: Tensor, worst: Tensor, width: int) -> Tensor:
    """Indices of the ``width`` best, of those equal to the ``worst`` of them the first ones; by
    counting, since scores of few levels (signatures) tie in every row and sorting whole rows costs.
    """
    above, equal = scores > worst, scores == worst
    left = width - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= left))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], width)
