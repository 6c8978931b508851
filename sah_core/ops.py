"""The scoring primitives that maskers use, in their reference form.

Maskers reach them through ``inputs.ops`` only. A backend may override some with faster forms that
give the same result; the tests of a backend run over its ops too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.code_ops import CodeOps
from sah_core.mask import KeyRange, Mask, ranges_length, spread_heads
from sah_core.randomness import Random

GROUP_REDUCTIONS = ("none", "sum", "mean", "max")

TOP_P_WIDTH = 256
"""Best candidates that `Ops.masked_topp` looks at first where the result has no given capacity."""


class Ops(CodeOps):
    """Reference forms in plain torch: right on every device, fast on the CPU."""

    def logits(
        self, query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attention logits before the softmax.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``.
            scaling: Factor on ``q . k``.
            softcap: Gemma 2's cap c in ``c * tanh(logit / c)``, or None.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``.
        """
        batch, heads, query_len, head_dim = query.shape
        kv_heads, key_len = key.shape[1], key.shape[2]
        rows = query.reshape(batch, kv_heads, heads // kv_heads * query_len, head_dim)
        scores = torch.matmul(rows.float() * scaling, key.float().transpose(2, 3))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        return scores.view(batch, heads, query_len, key_len)

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
            start, stop = self._page_limits(start, stop, page_size, origin)
        scores = self._hide(scores, start, stop, taken)
        width = min(capacity, candidates)
        values, indices = scores.topk(width, dim=-1)
        if width and width < candidates:
            worst = values[..., -1:]
            tied = (scores == worst).sum(-1) > (values == worst).sum(-1)
            if bool((tied & (worst[..., 0] > float("-inf"))).any()):
                indices = _first_of_equals(scores, worst, width)
                values = scores.gather(-1, indices)
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
        scores = self._hide(scores, start, stop, taken)
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

    def random_scores(
        self,
        random: Random,
        heads: int,
        query_position: Tensor,
        key_len: int,
        first: Tensor,
        *,
        draw: int = 0,
    ) -> Tensor:
        """A uniform random number for every key and query row; the best of them are a sample.

        Args:
            random: Random numbers of a step and layer.
            heads: Query heads.
            query_position: Key index of every query row, int32 ``(1, query_len)``.
            key_len: Keys in the buffer.
            first: First real key per sequence, int32 ``(batch | 1,)``; positions count from it.
            draw: Distinguishes several numbers at one place.

        Returns:
            float32 ``(batch | 1, heads, query_len, key_len)`` in (0, 1).
        """
        rows = query_position - first.view(-1, 1)
        keys = torch.arange(key_len, device=first.device) - first.view(-1, 1)
        return random.uniform(heads, rows, keys[:, None, None, :], draw)

    def row_numbers(
        self, random: Random, heads: int, query_position: Tensor, first: Tensor, *, draw: int = 0
    ) -> Tensor:
        """A uniform random number for every query row.

        Args:
            random: Random numbers of a step and layer.
            heads: Query heads.
            query_position: Key index of every query row, int32 ``(1, query_len)``.
            first: First real key per sequence, int32 ``(batch | 1,)``; positions count from it.
            draw: Distinguishes several numbers at one place.

        Returns:
            float32 ``(batch | 1, heads, query_len, 1)`` in (0, 1): the number of key position 0.
        """
        rows = query_position - first.view(-1, 1)
        place = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=first.device)
        return random.uniform(heads, rows, place, draw)

    def random_topk(
        self,
        random: Random,
        heads: int,
        query_position: Tensor,
        key_len: int,
        first: Tensor,
        capacity: int,
        *,
        batch: int,
        draw: int = 0,
        count: Tensor | None = None,
        start: Tensor | None = None,
        stop: Tensor | None = None,
        taken: Sequence[KeyRange] = (),
    ) -> tuple[Tensor, Tensor]:
        """A uniform sample without replacement: `masked_topk` of `random_scores`.

        Args:
            random: As in `random_scores`; likewise ``heads`` to ``first`` and ``draw``.
            heads: Query heads.
            query_position: Key index of every query row.
            key_len: Keys in the buffer, which are the candidates.
            first: First real key per sequence.
            capacity: As in `masked_topk`; likewise ``count`` to ``taken``.
            batch: Sequences.
            draw: Distinguishes several samples at one place.
            count: How many to choose per row.
            start: First candidate key per row.
            stop: One past the last candidate key per row.
            taken: Ranges whose members are no candidates.

        Returns:
            Those of `masked_topk`.
        """
        scores = self.random_scores(random, heads, query_position, key_len, first, draw=draw)
        scores = scores.expand(batch, -1, -1, -1).contiguous()
        return self.masked_topk(scores, capacity, count=count, start=start, stop=stop, taken=taken)

    def logits_at(
        self,
        query: Tensor,
        key: Tensor,
        indices: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention logits of chosen keys; no others are read where there is one query row.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)`` with ``heads'`` a divisor
                of the heads; negative entries are no keys.
            scaling: Factor on ``q . k``.
            softcap: Logit cap, or None.

        Returns:
            float32 ``(batch, heads, query_len, count)``, -inf at entries that are no keys.
        """
        batch, heads, query_len, head_dim = query.shape
        count = indices.shape[3]
        if query_len > 1 or count >= key.shape[2]:
            scores = self.logits(query, key, scaling, softcap)
            places = spread_heads(indices, heads).clamp(min=0).long()
            scores = scores.gather(-1, places.expand(batch, heads, query_len, count))
        else:
            rows = take_rows(key, indices).float()
            group = heads // rows.shape[1]
            grouped = query.float().reshape(batch, rows.shape[1], group, head_dim) * scaling
            scores = grouped @ rows.transpose(2, 3)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.view(batch, heads, 1, count)
        return scores.masked_fill(spread_heads(indices, heads) < 0, float("-inf"))

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

    def weight_moments(
        self,
        drawn: Tensor,
        sure: Tensor,
        chance: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums over attention weights, of some keys of each row and of a sample of the others.

        Weights are ``e^(logit - top)``, with the greatest of all logits of the row as ``top``, so
        that none overflows; sums are in float64.

        Args:
            drawn: Logits of the sample, float32 ``(batch, heads, query_len, count)``; -inf is none.
            sure: Logits of the other keys, likewise with a count of their own.
            chance: By what weights of ``sure`` are divided, float32, broadcastable to it; None = 1.
            sinks: Learned sink logit per head, float ``(heads,)``, which joins ``sure``; or None.

        Returns:
            ``top``, float32 ``(batch, heads, query_len, 1)``, and four sums, float64 ``(4, batch,
            heads, query_len)``: of the weights of ``sure``; of those of ``drawn``; of the squares
            and of the fourth powers of what the latter are from their mean.
        """
        top = torch.cat([drawn, sure], -1).amax(-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks.float().view(1, -1, 1, 1))
        top = top.clamp(min=torch.finfo(torch.float32).min)
        weights, kept = (drawn - top).exp().double(), (sure - top).exp()
        held = (kept if chance is None else kept / chance).double().sum(-1)
        if sinks is not None:
            held = held + (sinks.double().view(1, -1, 1) - top.squeeze(-1).double()).exp()
        there = drawn > float("-inf")
        total = weights.sum(-1)
        mean = total / there.sum(-1).clamp(min=1)
        square = torch.where(there, weights - mean.unsqueeze(-1), 0.0).square()
        return top, torch.stack([held, total, square.sum(-1), square.square().sum(-1)])

    def moments_at(self, value: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment of weighted values at chosen keys.

        Args:
            value: ``(batch, kv_heads, key_len, value_dim)``.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)``; negative entries are no
                keys, and their weights must be 0.
            weights: float32 ``(batch, heads, query_len, count)``.

        Returns:
            ``sum_j w_j v_j``, float32 ``(batch, heads, query_len, value_dim)``, and ``sum_j w_j^2
            |v_j|^2``, float32 ``(batch, heads, query_len)``.
        """
        batch, heads, query_len, count = weights.shape
        kv_heads, key_len, value_dim = value.shape[1:]
        if query_len > 1 or count >= key_len:
            places = spread_heads(indices, heads).clamp(min=0).long()
            dense = torch.zeros((batch, heads, query_len, key_len), device=value.device)
            dense.scatter_add_(-1, places.expand(weights.shape), weights)
            dense = dense.view(batch, kv_heads, heads // kv_heads * query_len, key_len)
            rows = value.float()
        else:
            rows = take_rows(value, indices).float()
            dense = weights.reshape(batch, rows.shape[1], heads // rows.shape[1], count)
        squares = rows.square().sum(-1, keepdim=True)
        first, second = dense @ rows, dense.square() @ squares
        shape = (batch, heads, query_len)
        return first.view(*shape, value_dim), second.view(shape)

    @staticmethod
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

    @staticmethod
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

    def page_bounds(
        self, key: Tensor, page_size: int, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Element-wise minimum and maximum of the keys of every page (Quest, section 3.2).

        Args:
            key: ``(batch, kv_heads, key_len, head_dim)``.
            page_size: Keys per page.
            first: Key index of the start of page 0 per sequence, int ``(batch | 1,)``; None = 0.

        Returns:
            Two tensors ``(batch, kv_heads, pages, head_dim)`` with ``pages = ceil(key_len /
            page_size)``. The last page covers the keys there are; a page without keys has bounds
            (+inf, -inf).
        """
        batch, kv_heads, key_len, head_dim = key.shape
        pages = -(-key_len // page_size)
        shape = (batch, kv_heads, pages, page_size, head_dim)
        if first is None:
            whole = key_len // page_size
            body = key[:, :, : whole * page_size]
            body = body.reshape(batch, kv_heads, whole, page_size, head_dim)
            low, high = body.amin(dim=3), body.amax(dim=3)
            if whole < pages:
                tail = key[:, :, whole * page_size :]
                low = torch.cat([low, tail.amin(dim=2, keepdim=True)], dim=2)
                high = torch.cat([high, tail.amax(dim=2, keepdim=True)], dim=2)
            return low, high
        position = torch.arange(pages * page_size, device=key.device)
        source = position + first.long().view(-1, 1)
        inside = source < key_len
        index = source.clamp(max=key_len - 1).view(-1, 1, pages * page_size, 1)
        index = index.expand(batch, kv_heads, -1, head_dim)
        rows = key.gather(2, index).view(shape)
        inside = inside.view(-1, 1, pages, page_size, 1)
        low = rows.masked_fill(~inside, float("inf")).amin(dim=3)
        high = rows.masked_fill(~inside, float("-inf")).amax(dim=3)
        return low, high

    def page_bounds_update(
        self,
        low: Tensor,
        high: Tensor,
        key: Tensor,
        start: int | Tensor,
        page_size: int,
        first: Tensor | None = None,
    ) -> None:
        """Take new keys into page bounds, in place; the work is that of the new keys alone.

        A page whose first key is among the new ones is overwritten, every other touched page is
        widened, so that what a buffer held before does not matter. Keys before ``first`` are
        ignored.

        Args:
            low: Page minima ``(batch, kv_heads, pages, head_dim)``, with room for the new keys.
            high: Page maxima, likewise.
            key: New keys ``(batch, kv_heads, new, head_dim)``.
            start: Key index of the first of them; an int32 tensor ``(1,)`` under graph capture.
            page_size: Keys per page.
            first: Key index of the start of page 0 per sequence, int ``(batch | 1,)``; None = 0.
        """
        if isinstance(start, int) and (first is None or first.device.type == "cpu"):
            origins = [0] if first is None else first.tolist()
            for index, origin in enumerate(origins):
                part = slice(index, index + 1) if len(origins) > 1 else slice(None)
                self._widen(low[part], high[part], key[part], start - origin, page_size)
            return
        new, pages = key.shape[2], low.shape[2]
        touched = min(pages, (new - 1 + page_size - 1) // page_size + 1)
        begin = start - (0 if first is None else first.long())
        begin = torch.as_tensor(begin, device=key.device).view(-1, 1)
        position = begin + torch.arange(new, device=key.device)
        window = (begin.clamp(min=0) // page_size).clamp(max=pages - touched)
        page = window + torch.arange(touched, device=key.device)
        fresh = (page * page_size >= begin) & (page * page_size < begin + new)
        slot = (position.clamp(min=0) // page_size - window).view(-1, 1, new, 1)
        ignored = (position < 0).view(-1, 1, new, 1)
        shape = (*key.shape[:2], touched, key.shape[3])
        page = page.view(-1, 1, touched, 1).expand(shape)
        fresh = fresh.view(-1, 1, touched, 1)
        slot = slot.expand(key.shape)
        for bound, fill, how in ((low, float("inf"), "amin"), (high, float("-inf"), "amax")):
            part_bound = bound.gather(2, page).masked_fill(fresh, fill)
            part_bound.scatter_reduce_(2, slot, key.masked_fill(ignored, fill), how)
            bound.scatter_(2, page, part_bound)

    @staticmethod
    def _widen(low: Tensor, high: Tensor, key: Tensor, start: int, page_size: int) -> None:
        """`page_bounds_update` for sequences with one first real key; positions count from it."""
        if start < 0:
            key = key[:, :, -start:]
            start = 0
        done = 0
        while done < key.shape[2]:
            page, inside = divmod(start + done, page_size)
            whole = 0 if inside else (key.shape[2] - done) // page_size
            if whole:
                body = key[:, :, done : done + whole * page_size]
                body = body.reshape(*key.shape[:2], whole, page_size, key.shape[3])
                low[:, :, page : page + whole] = body.amin(dim=3)
                high[:, :, page : page + whole] = body.amax(dim=3)
                done += whole * page_size
                continue
            rows = key[:, :, done : done + page_size - inside]
            least, most = rows.amin(dim=2), rows.amax(dim=2)
            low[:, :, page] = torch.minimum(low[:, :, page], least) if inside else least
            high[:, :, page] = torch.maximum(high[:, :, page], most) if inside else most
            done += rows.shape[2]

    def page_scores(
        self,
        query: Tensor,
        low: Tensor,
        high: Tensor,
        reduction: str = "none",
        bits: int = 16,
    ) -> Tensor:
        """Upper bound of ``q . k`` over each page: ``sum_d max(q_d low_d, q_d high_d)``.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            low: Page minima ``(batch, kv_heads, pages, head_dim)``.
            high: Page maxima, likewise.
            reduction: How the query heads of a KV group share their scores: none, sum, mean or max.
            bits: Below 16, the bounds of each page are first rounded to that many bits.

        Returns:
            float32 ``(batch, heads, query_len, pages)``, or ``(batch, kv_heads, query_len, pages)``
            when reduced.
        """
        batch, heads, query_len, head_dim = query.shape
        kv_heads = low.shape[1]
        group = heads // kv_heads
        rows = query.float().reshape(batch, kv_heads, group, query_len, head_dim)
        if bits < 16:
            one, other = round_to_bits(low.float(), bits), round_to_bits(high.float(), bits)
            # each is rounded by its own range, which may swap the two in a channel
            low, high = torch.minimum(one, other), torch.maximum(one, other)
        if reduction in ("sum", "mean"):
            # max(q l, q h) = relu(q) h + min(q, 0) l is linear in both, so those are reduced first
            factor = 1.0 if reduction == "sum" else 1.0 / group
            up, down = rows.clamp(min=0).sum(2) * factor, rows.clamp(max=0).sum(2) * factor
        else:
            flat = rows.reshape(batch, kv_heads, group * query_len, head_dim)
            up, down = flat.clamp(min=0), flat.clamp(max=0)
        scores = up @ high.float().transpose(2, 3) + down @ low.float().transpose(2, 3)
        if reduction in ("sum", "mean"):
            return scores
        scores = scores.view(batch, kv_heads, group, query_len, low.shape[2])
        return scores.amax(dim=2) if reduction == "max" else scores.flatten(1, 2)

    def label_update(
        self,
        labels: Tensor,
        affine: Tensor | None,
        key: Tensor,
        channels: Tensor,
        start: int | Tensor,
        bits: int,
    ) -> None:
        """Write the labels of new keys, in place: some channels of each, rounded key by key
        (Double Sparsity, section 3.2).

        Args:
            labels: With 16 bits ``(batch, label_heads, capacity, channels)`` in the type of the
                keys, else the codes of `pack_codes` in fields of `code_width(bits)` bits, int32
                ``(batch, label_heads, capacity, words)``. ``label_heads`` is the number of query
                heads or of KV heads.
            affine: Step and minimum of each label in the type of the keys, ``(batch, label_heads,
                capacity, 2)``: code c stands for ``c * step + minimum``. None with 16 bits.
            key: New keys ``(batch, kv_heads, new, head_dim)``.
            channels: The channels that a label holds, int64 ``(label_heads, channels)``.
            start: Key index of the first of them; an int32 tensor ``(1,)`` under graph capture,
                where ``new`` is 1.
            bits: Bits per channel, 1 to 16.
        """
        chosen = channels_of(key, channels)
        if bits == 16:
            _write(labels, chosen, start)
            return
        assert affine is not None
        codes, scale = quantise(chosen, bits)
        _write(labels, pack_codes(codes, code_width(bits)), start)
        _write(affine, scale, start)

    def label_scores(
        self,
        query: Tensor,
        channels: Tensor,
        labels: Tensor,
        affine: Tensor | None,
        bits: int,
        scaling: float,
        kv_heads: int,
        reduction: str = "none",
    ) -> Tensor:
        """Scores from labels: ``scaling * sum_j q_j k_j`` over the channels that a label holds,
        the query rounded like the keys.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            channels: int64 ``(label_heads, channels)``, as given to `label_update`.
            labels: What `label_update` wrote, cut to the keys that count.
            affine: Likewise; None with 16 bits.
            bits: Bits per channel, 1 to 16.
            scaling: Factor on the sum.
            kv_heads: KV heads, of which the query heads form groups.
            reduction: How the query heads of a group share their scores: none, sum, mean or max.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``, or ``(batch, kv_heads, query_len,
            key_len)`` when reduced.
        """
        batch, heads, query_len, _ = query.shape
        rows = channels_of(query, channels).float()
        if bits < 16:
            assert affine is not None
            rows = round_to_bits(rows, bits)
            codes = unpack_codes(labels, code_width(bits), channels.shape[1])
            step, least = affine.float().unbind(-1)
            values = codes.float() * step.unsqueeze(-1) + least.unsqueeze(-1)
        else:
            values = labels.float()
        rows = rows * scaling
        if reduction in ("sum", "mean") and values.shape[1] == kv_heads:
            # linear in the query: the heads that share labels are added up first
            rows = rows.view(batch, kv_heads, -1, query_len, rows.shape[3]).sum(dim=2)
            rows = rows / (heads // kv_heads) if reduction == "mean" else rows
            return torch.matmul(rows, values.transpose(2, 3))
        rows = rows.reshape(batch, values.shape[1], -1, rows.shape[-1])
        scores = (rows @ values.transpose(2, 3)).view(batch, heads, query_len, -1)
        return reduce_groups(scores, kv_heads, reduction)

    def label_logits_at(
        self,
        query: Tensor,
        labels: Tensor,
        affine: Tensor,
        indices: Tensor,
        bits: int,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Logits of chosen keys, estimated from labels that hold every channel; the query is exact.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            labels: What `label_update` wrote for all channels of each KV head, in fewer than 16
                bits.
            affine: Likewise.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)`` with ``heads'`` a divisor
                of the heads; negative entries are no keys.
            bits: Bits per channel.
            scaling: Factor on ``q . k``.
            softcap: Logit cap, or None.

        Returns:
            float32 ``(batch, heads, query_len, count)``, -inf at entries that are no keys.
        """
        batch, heads, query_len, head_dim = query.shape
        count = indices.shape[3]
        chosen = query_len == 1 and count < labels.shape[2]
        if chosen:
            labels, affine = take_rows(labels, indices), take_rows(affine, indices)
        codes = unpack_codes(labels, code_width(bits), head_dim).float()
        step, least = affine.float().unbind(-1)
        keys = codes * step.unsqueeze(-1) + least.unsqueeze(-1)
        if not chosen:
            return self.logits_at(query, keys, indices, scaling, softcap)
        group = heads // keys.shape[1]
        scores = query.float().reshape(batch, keys.shape[1], group, head_dim) * scaling
        scores = scores @ keys.transpose(2, 3)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        none = spread_heads(indices, heads) < 0
        return scores.view(batch, heads, 1, count).masked_fill(none, float("-inf"))

    def pack_signs(self, values: Tensor) -> Tensor:
        """Signatures: one bit per value, set where it is above 0.

        Args:
            values: ``(..., bits)``.

        Returns:
            int32 ``(..., ceil(bits / 32))``: bit b is bit ``b % 32`` of word ``b // 32``; bits past
            the last are 0.
        """
        return pack_codes((values > 0).to(torch.int32), 1)

    def signatures(self, rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Signatures of rows: the signs of what a small MLP of each head makes of them.

        Args:
            rows: ``(batch, heads, count, channels)``.
            layers: Weight ``(heads, inputs, outputs)`` and bias ``(heads, 1, outputs)`` of each
                linear layer, float32, with SiLU between two layers.

        Returns:
            `pack_signs` of the outputs, int32 ``(batch, heads, count, words)``.
        """
        return self.pack_signs(apply_mlp(layers, rows.float()))

    def hamming_scores(
        self, query: Tensor, key: Tensor, bits: int, kv_heads: int, reduction: str = "none"
    ) -> Tensor:
        """How many bits of two signatures agree.

        Args:
            query: `pack_signs` of the queries, int32 ``(batch, heads, query_len, words)``.
            key: `pack_signs` of the keys, int32 ``(batch, heads | kv_heads, key_len, words)``.
            bits: Bits per signature.
            kv_heads: KV heads, of which the query heads form groups.
            reduction: How the query heads of a group share their scores: none, sum, mean or max.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``, or ``(batch, kv_heads, query_len,
            key_len)`` when reduced.
        """
        batch, heads, query_len, words = query.shape
        rows = query.reshape(batch, key.shape[1], -1, words)
        differ = torch.zeros((), dtype=torch.int32, device=query.device)
        for word in range(words):
            differ = differ + popcount(rows[..., word, None] ^ key[..., None, :, word])
        scores = (bits - differ).float().view(batch, heads, query_len, key.shape[2])
        return reduce_groups(scores, kv_heads, reduction)


def apply_mlp(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Send rows ``(..., heads, count, channels)`` through the MLP of each head: linear layers of
    weight ``(heads, inputs, outputs)`` and bias ``(heads, 1, outputs)``, with SiLU between.
    """
    for index, (weight, bias) in enumerate(layers):
        if index:
            rows = torch.nn.functional.silu(rows)
        rows = torch.matmul(rows, weight) + bias
    return rows


def reduce_groups(scores: Tensor, kv_heads: int, reduction: str) -> Tensor:
    """Scores ``(batch, heads, query_len, keys)`` as the query heads of each KV group share them."""
    if reduction == "none":
        return scores
    batch, heads, query_len, keys = scores.shape
    grouped = scores.view(batch, kv_heads, heads // kv_heads, query_len, keys)
    if reduction == "max":
        return grouped.amax(dim=2)
    return grouped.sum(dim=2) if reduction == "sum" else grouped.mean(dim=2)


def code_width(bits: int) -> int:
    """Bits that a code of ``bits`` bits takes when packed: 1, 2, 4, 8 or 16."""
    return 1 << (bits - 1).bit_length()


def code_words(count: int, width: int) -> int:
    """32-bit words that ``count`` codes of ``width`` bits take."""
    return -(-count * width // 32)


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """Pack non-negative integers into words.

    Args:
        codes: int32 ``(..., count)``, each below ``2**width``.
        width: Bits per code: 1, 2, 4, 8 or 16.

    Returns:
        int32 ``(..., words)``; code j is in word ``j * width // 32`` from bit ``j * width % 32``
        on, and fields past the last code are 0.
    """
    per_word = 32 // width
    missing = -codes.shape[-1] % per_word
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    shift = torch.arange(per_word, dtype=torch.int32, device=codes.device) * width
    # fields do not overlap, so that the sum is their union
    fields = codes.reshape(*codes.shape[:-1], -1, per_word)
    return (fields << shift).sum(-1, dtype=torch.int32)


def unpack_codes(words: Tensor, width: int, count: int) -> Tensor:
    """Undo `pack_codes`: int32 ``(..., count)``."""
    shift = torch.arange(32 // width, dtype=torch.int32, device=words.device) * width
    codes = (words.unsqueeze(-1) >> shift) & ((1 << width) - 1)
    return codes.flatten(-2)[..., :count]


def popcount(words: Tensor) -> Tensor:
    """Set bits of int32 words, int32 (Warren: Hacker's Delight, section 5-1)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def quantise(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each vector of the last dimension to ``2**bits`` levels, kept as codes.

    Args:
        tensor: ``(..., channels)``.
        bits: Bits per channel.

    Returns:
        Codes, int32 ``(..., channels)``, and step and minimum in the type of ``tensor``, ``(...,
        2)``. The step is rounded to that type before codes are taken, so that ``code * step +
        minimum`` is as near as the type allows.
    """
    low, high = tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True)
    step = ((high.float() - low.float()) / (2**bits - 1)).to(tensor.dtype)
    step = torch.where(step > 0, step, 1.0)
    codes = torch.round((tensor.float() - low.float()) / step.float()).clamp(0, 2**bits - 1)
    return codes.to(torch.int32), torch.cat([step, low], dim=-1)


def channels_of(tensor: Tensor, channels: Tensor) -> Tensor:
    """The channels of each head, ``(batch, heads, rows, channels)``; the more numerous of tensor
    heads and channel lists says how many heads.
    """
    batch, heads, rows, head_dim = tensor.shape
    lists, count = channels.shape
    if lists < heads:
        channels = channels.repeat_interleave(heads // lists, dim=0)
    share = max(1, lists // heads)
    index = channels.view(1, heads, share, 1, count).expand(batch, -1, -1, rows, -1)
    spread = tensor.unsqueeze(2).expand(-1, -1, share, -1, -1)
    return spread.gather(4, index).flatten(1, 2)


def _write(buffer: Tensor, rows: Tensor, start: int | Tensor) -> None:
    """Write rows along dimension 2; a start on the device stays there."""
    if isinstance(start, int):
        buffer[:, :, start : start + rows.shape[2]] = rows
    else:
        buffer.index_copy_(2, start.long(), rows)


def take_rows(source: Tensor, indices: Tensor) -> Tensor:
    """Rows of the cache by index, for one query row.

    Args:
        source: ``(batch, kv_heads, key_len, channels)``.
        indices: int ``(batch | 1, heads', 1, count)``; negative entries take row 0.

    Returns:
        ``(batch, selections, count, channels)``, ``selections`` the greater of ``heads'`` and
        ``kv_heads``.
    """
    batch, kv_heads, _, channels = source.shape
    selections = max(kv_heads, indices.shape[1])
    places = spread_heads(indices[:, :, 0], selections).clamp(min=0).long()
    places = places.expand(batch, selections, -1)
    group = selections // kv_heads
    flat = places.reshape(batch, kv_heads, -1, 1).expand(-1, -1, -1, channels)
    rows = source.gather(2, flat)
    return rows.view(batch, kv_heads * group, -1, channels)


def round_to_bits(tensor: Tensor, bits: int) -> Tensor:
    """Round each vector of the last dimension to ``2**bits`` levels from its minimum to its
    maximum.

    The asymmetric quantisation of label caches, applied and undone: float in, float out.
    """
    low, high = tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)
    return torch.round((tensor - low) / step) * step + low


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


REFERENCE = Ops()
