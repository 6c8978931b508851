"""The parts of a mask: ranges, and selected keys or pages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed, cut_part, cut_rows

Shape = tuple[int, int, int, int]


@attrs.frozen(eq=False, slots=False)
class KeyRange:
    """A run of keys per row, every one selected with probability 1.

    Each end is a tensor that exists anyway (a limit of `Allowed`, say) plus a host offset, so that
    building a sink or a window computes nothing on the device. An end may lie outside the keys: who
    reads the range clips it.

    Attributes:
        start_base: int32 ``(batch | 1, 1, query_len | 1)``; the first key is ``start_base +
            start_offset``.
        stop_base: Same shape rules; one past the last key is ``stop_base + stop_offset``.
        capacity: A host bound on the length.
        start_offset: Host int.
        stop_offset: Host int.
    """

    start_base: Tensor
    stop_base: Tensor
    capacity: int
    start_offset: int = 0
    stop_offset: int = 0

    @cached_property
    def start(self) -> Tensor:
        """First key, int32 ``(batch | 1, 1, query_len | 1)``."""
        return self.start_base + self.start_offset if self.start_offset else self.start_base

    @cached_property
    def stop(self) -> Tensor:
        """One past the last key, int32 ``(batch | 1, 1, query_len | 1)``."""
        return self.stop_base + self.stop_offset if self.stop_offset else self.stop_base

    @cached_property
    def bounds(self) -> tuple[list[list[int]], list[list[int]]]:
        """``start`` and ``stop`` as host lists ``[batch | 1][query_len | 1]``; waits for the device
        once.
        """
        return self.start[:, 0].tolist(), self.stop[:, 0].tolist()

    def contains(self, keys: Tensor) -> Tensor:
        """Whether each key index ``(batch | 1, heads, query_len | 1, count)`` lies in the range of
        its row.
        """
        return (keys >= self.start.unsqueeze(-1)) & (keys < self.stop.unsqueeze(-1))

    def rows(self, begin: int, end: int, step: int = 1) -> KeyRange:
        """The range of each ``step``-th query row from ``begin`` to ``end`` (exclusive)."""
        return attrs.evolve(
            self,
            start_base=cut_rows(self.start_base, begin, end, step),
            stop_base=cut_rows(self.stop_base, begin, end, step),
        )

    def part(self, sequences: slice, heads: slice, of: int) -> KeyRange:
        """The range of some sequences and of some of ``of`` query heads."""
        return attrs.evolve(
            self,
            start_base=cut_part(self.start_base, sequences, heads, of),
            stop_base=cut_part(self.stop_base, sequences, heads, of),
        )

    def restricted(self, allowed: Allowed) -> KeyRange:
        """The part of the range inside the allowed interval."""
        start = torch.maximum(self.start, allowed.start)
        stop = torch.maximum(torch.minimum(self.stop, allowed.stop), start)
        return KeyRange(start, stop, self.capacity)

    def entries(self, allowed: Allowed, key_len: int) -> tuple[Tensor, Tensor]:
        """The keys of the range one by one.

        Returns:
            int32 ``(batch | 1, 1, query_len | 1, count)``, and which of them are allowed keys of
            the range, bool likewise.
        """
        count = min(self.capacity, key_len)
        slot = torch.arange(count, device=allowed.device, dtype=torch.int32)
        keys = torch.maximum(self.start, allowed.start).unsqueeze(-1) + slot
        return keys, self.contains(keys) & allowed.contains(keys)


@attrs.frozen(eq=False, slots=False)
class Selected:
    """Selected keys, or pages of keys, by index.

    Entries past ``count``, entries that are no keys, entries inside a range of the same mask and
    entries that are not allowed are ignored. A key or page occurs at most once per row.

    Attributes:
        indices: int32 ``(batch | 1, heads, query_len | 1, capacity)``; key indices, or page numbers
            counted from ``origin`` when ``page_size`` > 1.
        count: Valid leading entries per row, int32 ``(batch | 1, heads, query_len | 1)``; None =
            all.
        probability: Inclusion probability per entry in (0, 1], float32, shaped as ``indices``; None
            = 1.
        page_size: Keys per entry.
        origin: Key index of page 0 per sequence, int32 ``(batch | 1,)``; None = 0.
    """

    indices: Tensor
    count: Tensor | None = None
    probability: Tensor | None = None
    page_size: int = 1
    origin: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of distinct selections along the head dimension."""
        return self.indices.shape[1]

    @property
    def capacity(self) -> int:
        """Entries per row, valid or not."""
        return self.indices.shape[-1]

    def tokens(self, key_len: int) -> tuple[Tensor, Tensor | None]:
        """Expand to key indices.

        Returns:
            int32 key indices ``(batch | 1, heads, query_len | 1, capacity * page_size)`` in which
            every invalid entry is -1, and the probabilities in the same shape (or None).
        """
        indices = self.indices
        if self.count is not None:
            slot = torch.arange(self.capacity, device=indices.device, dtype=torch.int32)
            indices = torch.where(slot < self.count.unsqueeze(-1), indices, -1)
        probability = self.probability
        if self.page_size > 1:
            offset = torch.arange(self.page_size, device=indices.device, dtype=torch.int32)
            pages = indices.unsqueeze(-1)
            keys = pages * self.page_size + offset
            if self.origin is not None:
                keys = keys + self.origin.view(-1, 1, 1, 1, 1)
            keys = torch.where((pages >= 0) & (keys < key_len), keys, -1)
            indices = keys.flatten(-2)
            if probability is not None:
                probability = probability.repeat_interleave(self.page_size, dim=-1)
        return indices, probability

    def rows(self, begin: int, end: int, step: int = 1) -> Selected:
        """The selection of each ``step``-th query row from ``begin`` to ``end`` (exclusive)."""
        count, probability = self.count, self.probability
        return attrs.evolve(
            self,
            indices=cut_rows(self.indices, begin, end, step),
            count=None if count is None else cut_rows(count, begin, end, step),
            probability=None if probability is None else cut_rows(probability, begin, end, step),
        )

    def part(self, sequences: slice, heads: slice, of: int) -> Selected:
        """The selection of some sequences and of some of ``of`` query heads."""
        count, probability, origin = self.count, self.probability, self.origin
        return attrs.evolve(
            self,
            indices=cut_part(self.indices, sequences, heads, of),
            count=None if count is None else cut_part(count, sequences, heads, of),
            probability=(
                None if probability is None else cut_part(probability, sequences, heads, of)
            ),
            origin=origin if origin is None or len(origin) == 1 else origin[sequences],
        )

    def restricted(self, allowed: Allowed, key_len: int) -> Selected:
        """The selected keys that are allowed."""
        indices, probability = self.tokens(key_len)
        indices = torch.where(allowed.contains(indices), indices, -1)
        if probability is not None:
            probability = probability.expand_as(indices)
        return Selected(indices, None, probability)

    def to_dense(self, shape: Shape) -> Tensor:
        """float32 probabilities ``(batch, heads, query_len, key_len)``."""
        heads, key_len = shape[1], shape[3]
        keys, probability = self.tokens(key_len)
        values = torch.ones(keys.shape, device=keys.device) if probability is None else probability
        size = (*shape[:3], keys.shape[-1])
        keys = spread_heads(keys.long(), heads).expand(size)
        values = spread_heads(values, heads).expand(size)
        # one spare column takes the invalid entries
        chosen = torch.zeros((*shape[:3], key_len + 1), device=keys.device)
        outside = (keys < 0) | (keys >= key_len)
        chosen.scatter_(-1, keys.masked_fill(outside, key_len), values)
        return chosen[..., :key_len]


def either(a: Tensor, b: Tensor) -> Tensor:
    """The probability ``1 - (1 - a)(1 - b)`` that a key is in one of two independent selections.

    Written so that the smallest probability survives beside a 0, and a 1 stays 1.
    """
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + low * (1 - high)


def spread_heads(tensor: Tensor, heads: int) -> Tensor:
    """Give each query head its row: ``(batch, heads', ...)`` to ``(batch, heads, ...)`` for heads'
    | heads.
    """
    own = tensor.shape[1]
    return tensor if own == heads else tensor.repeat_interleave(heads // own, dim=1)


def lower_at(scores: Tensor, keys: Tensor) -> Tensor:
    """``scores`` lowered to -inf in place at key indices; negative entries are no keys."""
    batch, heads, query_len, _ = scores.shape
    keys = spread_heads(keys, heads).expand(batch, heads, query_len, -1)
    outside = (keys < 0) | (keys >= scores.shape[-1])
    # an entry that is no key lowers key 0 to +inf, which is not at all
    values = torch.where(outside, float("inf"), float("-inf")).to(scores.dtype)
    places = torch.where(outside, 0, keys).long()
    return scores.scatter_reduce_(-1, places, values, "amin")


def match_heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two tensors ``(batch, heads', ...)`` to the larger number of heads."""
    heads = max(a.shape[1], b.shape[1])
    return spread_heads(a, heads), spread_heads(b, heads)


def join_entries(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Put lists of key indices side by side, each with probabilities or None for all 1."""
    heads = max(keys.shape[1] for keys, _ in parts)
    spread = [spread_heads(keys, heads) for keys, _ in parts]
    lead = torch.broadcast_shapes(*(keys.shape[:3] for keys in spread))
    joined = torch.cat([keys.expand(*lead, keys.shape[-1]) for keys in spread], dim=-1)
    if all(probability is None for _, probability in parts):
        return joined, None
    chances = [
        torch.ones(keys.shape, device=keys.device)
        if probability is None
        else spread_heads(probability, heads)
        for keys, (_, probability) in zip(spread, parts, strict=True)
    ]
    return joined, torch.cat([p.expand(*lead, p.shape[-1]) for p in chances], dim=-1)


def ranges_length(ranges: Sequence[KeyRange], allowed: Allowed) -> Tensor:
    """Length of the union of the ranges inside the allowed interval, int64 ``(batch | 1, 1,
    query_len | 1)``.
    """
    pairs = [torch.broadcast_tensors(r.start, r.stop, allowed.start, allowed.stop) for r in ranges]
    shape = torch.broadcast_shapes(*(p[0].shape for p in pairs))
    starts = torch.stack([torch.maximum(p[0], p[2]).expand(shape) for p in pairs], dim=-1)
    stops = torch.stack([torch.minimum(p[1], p[3]).expand(shape) for p in pairs], dim=-1)
    starts, order = starts.sort(dim=-1)
    stops = stops.gather(-1, order)
    # after sorting by start, a range adds only what lies past everything before it
    reach = torch.cat([starts[..., :1], stops.cummax(dim=-1).values[..., :-1]], dim=-1)
    return (stops - torch.maximum(starts, reach)).clamp(min=0).sum(-1)


def unite_selected(a: Selected, b: Selected, key_len: int, disjoint: bool) -> Selected:
    """Union of two index parts without a host sync; a key in both gets ``1 - (1 - p1)(1 - p2)``."""
    same_pages = a.page_size == b.page_size and a.origin is b.origin
    parts: list[tuple[Tensor, Tensor | None]] = []
    for part in (a, b):
        if same_pages and part.page_size > 1:
            slot = torch.arange(part.capacity, device=part.indices.device)
            limit = part.capacity if part.count is None else part.count.unsqueeze(-1)
            parts.append((torch.where(slot < limit, part.indices, -1), part.probability))
        else:
            parts.append(part.tokens(key_len))
    joined, probability = join_entries(parts)
    if not disjoint:
        joined, order = joined.sort(dim=-1, stable=True)
        twin = torch.zeros_like(joined, dtype=torch.bool)
        twin[..., 1:] = (joined[..., 1:] == joined[..., :-1]) & (joined[..., 1:] >= 0)
        if probability is not None:
            probability = probability.gather(-1, order)
            later = torch.where(twin, probability, 0.0).roll(-1, dims=-1)
            later[..., -1] = 0.0
            probability = either(probability, later)
        joined = torch.where(twin, -1, joined)
    if same_pages:
        return Selected(joined, None, probability, a.page_size, a.origin)
    return Selected(joined, None, probability)
