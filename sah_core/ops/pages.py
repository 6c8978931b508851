"""Bounds of the keys of each page, and what they say of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sah_core.ops.packing import round_to_bits


class PageOps:
    """Page bounds: made, widened and scored."""

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
                _widen(low[part], high[part], key[part], start - origin, page_size)
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
            up, down = rows.clamp(min=0).sum(2), rows.clamp(max=0).sum(2)
        else:
            flat = rows.reshape(batch, kv_heads, group * query_len, head_dim)
            up, down = flat.clamp(min=0), flat.clamp(max=0)
        scores = up @ high.float().transpose(2, 3) + down @ low.float().transpose(2, 3)
        if reduction in ("sum", "mean"):
            # divided after the sums, so that pages of equal products stay equal
            return scores if reduction == "sum" else scores.div_(group)
        scores = scores.view(batch, kv_heads, group, query_len, low.shape[2])
        return scores.amax(dim=2) if reduction == "max" else scores.flatten(1, 2)


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
