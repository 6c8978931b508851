"""The mask: which keys each query row attends, and with which probability each was selected.

A mask is a union of three kinds of parts: ranges (sink, window: two integers per row), selected
keys or pages (indices of a capacity known on the host, with a count on the device) and a dense
tensor (the reference form). Every leading dimension may be 1, which means that batch, heads or
query rows share the selection; ``heads`` may also be a divisor of the query heads, so that a
selection shared inside a KV group is stored once per KV head.

Nothing here waits for the device except the functions that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed

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


@attrs.frozen(eq=False, slots=False)
class Mask:
    """For every (sequence, query head, query row, key), the probability with which that key was
    selected.

    0 means not attended. Immutable: every operation returns a new mask and never edits the caller's
    tensors. An empty mask attends nothing (its output rows are 0). A full mask attends every
    allowed key. What may be attended at all is a separate matter (`Allowed`), applied by whoever
    executes or counts the mask.

    Attributes:
        shape: ``(batch, heads, query_len, key_len)``, host ints; under graph capture ``key_len`` is
            the capacity of the key buffer.
        ranges: Runs of keys with probability 1.
        selected: Keys or pages by index.
        dense: float32 ``(batch | 1, heads', query_len | 1, key_len)`` probabilities: the reference
            form.
        is_full: Every key is selected with probability 1; the other parts are then empty.
    """

    shape: Shape
    ranges: tuple[KeyRange, ...] = ()
    selected: Selected | None = None
    dense: Tensor | None = None
    is_full: bool = False

    # Construction

    @classmethod
    def empty(cls, shape: Shape) -> Mask:
        """The mask that attends nothing."""
        return cls(shape=shape)

    @classmethod
    def full(cls, shape: Shape) -> Mask:
        """The mask that attends every allowed key."""
        return cls(shape=shape, is_full=True)

    @classmethod
    def from_ranges(cls, shape: Shape, ranges: Sequence[KeyRange]) -> Mask:
        """A mask of key ranges alone."""
        return cls(shape=shape, ranges=tuple(ranges))

    @classmethod
    def from_indices(
        cls,
        shape: Shape,
        indices: Tensor,
        *,
        count: Tensor | None = None,
        probability: Tensor | None = None,
        page_size: int = 1,
        origin: Tensor | None = None,
    ) -> Mask:
        """A mask of selected keys or pages; the arguments are those of `Selected`.

        Raises:
            ValueError: If the head dimension of ``indices`` does not divide the query heads.
        """
        heads = indices.shape[1]
        if shape[1] % heads:
            raise ValueError(f"indices for {heads} heads do not divide {shape[1]} query heads")
        selected = Selected(indices.to(torch.int32), count, probability, page_size, origin)
        return cls(shape=shape, selected=selected)

    @classmethod
    def from_dense(cls, probability: Tensor, shape: Shape | None = None) -> Mask:
        """A mask from probabilities, float ``(batch | 1, heads', query_len | 1, key_len)`` (or
        bool).
        """
        dense = probability.to(torch.float32)
        if shape is None:
            batch, heads, query_len, key_len = dense.shape
            shape = (batch, heads, query_len, key_len)
        return cls(shape=shape, dense=dense)

    @classmethod
    def from_csr(
        cls, shape: Shape, pointers: Tensor, indices: Tensor, probability: Tensor | None = None
    ) -> Mask:
        """A mask from compressed rows; waits for the device.

        Args:
            shape: ``(batch, heads, query_len, key_len)``.
            pointers: int ``(batch * heads * query_len + 1,)`` row starts into ``indices``.
            indices: int key indices of all rows, one after the other.
            probability: float32 per index; None = 1.
        """
        batch, heads, query_len, _ = shape
        counts = pointers.diff()
        capacity = int(counts.max()) if counts.numel() else 0
        slot = torch.arange(capacity, device=indices.device)
        valid = slot < counts.unsqueeze(-1)
        rows = torch.full(valid.shape, -1, dtype=torch.int32, device=indices.device)
        rows[valid] = indices.to(torch.int32)
        chances = None
        if probability is not None:
            chances = torch.ones(valid.shape, dtype=torch.float32, device=indices.device)
            chances[valid] = probability.to(torch.float32)
            chances = chances.view(batch, heads, query_len, capacity)
        return cls.from_indices(
            shape,
            rows.view(batch, heads, query_len, capacity),
            count=counts.to(torch.int32).view(batch, heads, query_len),
            probability=chances,
        )

    # Facts

    @property
    def is_empty(self) -> bool:
        """Nothing is selected by construction (a mask with parts may still select nothing)."""
        return not (
            self.is_full or self.ranges or self.selected is not None or self.dense is not None
        )

    @property
    def is_weighted(self) -> bool:
        """Some keys may have a probability below 1."""
        return self.dense is not None or (
            self.selected is not None and self.selected.probability is not None
        )

    @property
    def heads(self) -> int:
        """Distinct selections along the head dimension: 1, the KV heads, or the query heads."""
        heads = 1 if self.selected is None else self.selected.heads
        return heads if self.dense is None else max(heads, self.dense.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the mask holds."""
        tensors = [t for r in self.ranges for t in (r.start_base, r.stop_base)]
        if self.selected is not None:
            parts = (self.selected.indices, self.selected.count, self.selected.probability)
            tensors += [t for t in parts if t is not None]
        if self.dense is not None:
            tensors.append(self.dense)
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def rows(self, begin: int, end: int, step: int = 1) -> Mask:
        """The mask of each ``step``-th query row from ``begin`` to ``end`` (exclusive)."""
        batch, heads, query_len, key_len = self.shape
        if begin == 0 and end == query_len and step == 1:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[2] == 1 else tensor[:, :, begin:end:step]

        ranges = tuple(
            attrs.evolve(r, start_base=cut(r.start_base), stop_base=cut(r.stop_base))
            for r in self.ranges
        )
        selected = self.selected
        if selected is not None:
            selected = attrs.evolve(
                selected,
                indices=cut(selected.indices),
                count=None if selected.count is None else cut(selected.count),
                probability=None if selected.probability is None else cut(selected.probability),
            )
        dense = None if self.dense is None else cut(self.dense)
        rows = len(range(begin, end, step))
        return Mask((batch, heads, rows, key_len), ranges, selected, dense, self.is_full)

    # Set operations

    def __or__(self, other: Mask) -> Mask:
        return self.union(other)

    def __and__(self, other: Allowed) -> Mask:
        return self.restricted(other)

    def union(self, other: Mask, *, disjoint: bool = False) -> Mask:
        """Union of independent selections: ``1 - (1 - p1)(1 - p2)``.

        Args:
            other: A mask of the same shape.
            disjoint: The caller knows that no key is in both ``selected`` parts, which saves the
                search for duplicates.

        Raises:
            ValueError: If the shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"cannot unite masks of shapes {self.shape} and {other.shape}")
        if self.is_full or other.is_empty:
            return self
        if other.is_full or self.is_empty:
            return other
        dense = self.dense if other.dense is None else other.dense
        if self.dense is not None and other.dense is not None:
            a, b = match_heads(self.dense, other.dense)
            dense = 1 - (1 - a) * (1 - b)
        selected = self.selected if other.selected is None else other.selected
        if self.selected is not None and other.selected is not None:
            selected = unite_selected(self.selected, other.selected, self.shape[3], disjoint)
        return Mask(self.shape, self.ranges + other.ranges, selected, dense)

    def restricted(self, allowed: Allowed) -> Mask:
        """Intersection with the allowed keys: whatever is not allowed gets probability 0."""
        shape = self.shape
        if self.is_empty:
            return self
        if allowed.keep is not None:
            keep = allowed.to_dense(shape[3])
            return Mask.from_dense(self.to_dense() * keep, shape)
        if self.is_full:
            return Mask.from_ranges(shape, [KeyRange(allowed.start, allowed.stop, shape[3])])
        ranges = tuple(
            KeyRange(
                start := torch.maximum(r.start, allowed.start),
                torch.maximum(torch.minimum(r.stop, allowed.stop), start),
                r.capacity,
            )
            for r in self.ranges
        )
        selected = self.selected
        if selected is not None:
            indices, probability = selected.tokens(shape[3])
            indices = torch.where(allowed.contains(indices), indices, -1)
            if probability is not None:
                probability = probability.expand_as(indices)
            selected = Selected(indices, None, probability)
        dense = self.dense
        if dense is not None:
            dense = dense * allowed.to_dense(shape[3])
        return Mask(shape, ranges, selected, dense)

    def covers(self, keys: Tensor) -> Tensor:
        """Whether each key index ``(batch | 1, heads, query_len | 1, count)`` lies in one of the
        ranges.
        """
        covered = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=keys.device)
        for part in self.ranges:
            covered = covered | part.contains(keys)
        return covered

    def exclude_from(self, scores: Tensor, fill: float = float("-inf")) -> Tensor:
        """Scores in which every key that this mask selects already has the value ``fill``.

        Args:
            scores: float ``(batch, heads', query_len, key_len)`` with one score per key.
            fill: The value that takes a key out of the choice.

        Returns:
            New tensor of the shape of ``scores``. Selections that differ inside a head group of
            ``scores`` leave a key in the choice unless every member of the group has it.
        """
        if self.is_empty:
            return scores
        if self.is_full:
            return torch.full_like(scores, fill)
        scores = scores.clone()
        position = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.int32)
        for part in self.ranges:
            if scores.device.type == "cpu" and part.start.numel() == part.stop.numel() == 1:
                start, stop = part.bounds[0][0][0], part.bounds[1][0][0]
                scores[..., max(start, 0) : max(stop, 0)] = fill
            else:
                scores.masked_fill_(part.contains(position), fill)
        selected = self.selected
        lowest = fill == float("-inf") and self.dense is None
        if selected is not None and lowest and scores.shape[1] % selected.heads == 0:
            return lower_at(scores, selected.tokens(scores.shape[-1])[0])
        if selected is not None or self.dense is not None:
            rest = Mask(self.shape, (), selected, self.dense).presence(scores.shape[1])
            scores.masked_fill_(rest, fill)
        return scores

    def presence(self, heads: int) -> Tensor:
        """Selected by all query heads of a group, bool ``(batch, heads, query_len, key_len)``."""
        dense = self.to_dense() > 0
        batch, all_heads, query_len, key_len = dense.shape
        return dense.view(batch, heads, all_heads // heads, query_len, key_len).all(dim=2)

    def entries(self, allowed: Allowed) -> tuple[Tensor, Tensor | None]:
        """Every selected and allowed key once, by index; only a dense part waits for the device.

        Args:
            allowed: What may be attended.

        Returns:
            int32 keys ``(batch | 1, heads', query_len | 1, count)`` with -1 where an entry holds no
            key, and the probabilities, float32 in the same shape, or None if all are 1.
        """
        key_len = self.shape[3]
        mask = self.to_selected()
        ranges = mask.ranges
        if self.is_full:
            ranges = (KeyRange(allowed.start, allowed.stop, key_len),)
        parts: list[tuple[Tensor, Tensor | None]] = []
        for index, part in enumerate(ranges):
            count = min(part.capacity, key_len)
            slot = torch.arange(count, device=allowed.device, dtype=torch.int32)
            keys = torch.maximum(part.start, allowed.start).unsqueeze(-1) + slot
            keep = part.contains(keys) & allowed.contains(keys)
            for earlier in ranges[:index]:
                keep = keep & ~earlier.contains(keys)
            parts.append((torch.where(keep, keys, -1), None))
        if mask.selected is not None:
            keys, probability = mask.selected.tokens(key_len)
            heads = max(keys.shape[1], allowed.heads)
            keys = spread_heads(keys, heads)
            keep = (keys >= 0) & allowed.contains(keys) & ~mask.covers(keys)
            if probability is not None:
                probability = spread_heads(probability, heads)
            parts.append((torch.where(keep, keys, -1), probability))
        if not parts:
            nothing = torch.empty((1, 1, 1, 0), dtype=torch.int32, device=allowed.device)
            return nothing, None
        return join_entries(parts)

    # Conversions

    def to_dense(self) -> Tensor:
        """float32 probabilities ``(batch, heads, query_len, key_len)``: the reference form."""
        batch, heads, query_len, key_len = self.shape
        if self.is_full:
            return torch.ones(self.shape, device=self.device)
        dense = torch.zeros(self.shape, device=self.device)
        if self.dense is not None:
            dense += spread_heads(self.dense, heads)
        if self.selected is not None:
            keys, probability = self.selected.tokens(key_len)
            keys = keys.long()
            values = (
                torch.ones(keys.shape, device=self.device) if probability is None else probability
            )
            size = (batch, heads, query_len, keys.shape[-1])
            keys = spread_heads(keys, heads).expand(size)
            values = spread_heads(values, heads).expand(size)
            # one spare column takes the invalid entries
            chosen = torch.zeros((batch, heads, query_len, key_len + 1), device=self.device)
            outside = (keys < 0) | (keys >= key_len)
            chosen.scatter_(-1, keys.masked_fill(outside, key_len), values)
            chosen = chosen[..., :key_len]
            dense = chosen if self.dense is None else 1 - (1 - dense) * (1 - chosen)
        position = torch.arange(key_len, device=self.device, dtype=torch.int32)
        for part in self.ranges:
            dense = torch.where(part.contains(position), 1.0, dense)
        return dense

    def to_csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row pointers, key indices and probabilities of all rows; waits for the device."""
        dense = self.to_dense().flatten(0, 2)
        present = dense > 0
        pointers = torch.zeros(dense.shape[0] + 1, dtype=torch.int64, device=dense.device)
        pointers[1:] = present.sum(-1).cumsum(0)
        return pointers, present.nonzero()[:, 1].to(torch.int32), dense[present]

    def to_selected(self) -> Mask:
        """The same mask with its dense part turned into indices; waits for the device."""
        if self.dense is None:
            return self
        dense = Mask(self.shape, (), self.selected, self.dense).to_dense()
        csr = Mask(self.shape, dense=dense).to_csr()
        return Mask(self.shape, self.ranges, Mask.from_csr(self.shape, *csr).selected)

    @property
    def device(self) -> torch.device:
        """The device of the parts; the CPU for masks without any."""
        if self.ranges:
            return self.ranges[0].start_base.device
        if self.selected is not None:
            return self.selected.indices.device
        return torch.device("cpu") if self.dense is None else self.dense.device

    # Counting

    def counts(self, allowed: Allowed) -> tuple[Tensor, Tensor]:
        """Selected and allowed keys per row, each key once, in O(selected) for ranges and indices.

        Returns:
            Two int64 tensors that broadcast to ``(batch, heads, query_len)``.
        """
        total = allowed.counts
        if self.is_full:
            return total, total
        if self.is_empty:
            return torch.zeros_like(total), total
        if self.dense is not None or (allowed.keep is not None and self.ranges):
            present = (self.to_dense() > 0) & allowed.to_dense(self.shape[3])
            return present.sum(-1), total
        chosen = ranges_length(self.ranges, allowed) if self.ranges else torch.zeros_like(total)
        if self.selected is not None:
            keys, _ = self.selected.tokens(self.shape[3])
            keys = spread_heads(keys, max(keys.shape[1], allowed.heads))
            fresh = (keys >= 0) & allowed.contains(keys) & ~self.covers(keys)
            chosen = chosen + spread_heads(fresh.sum(-1).unsqueeze(-1), self.shape[1]).squeeze(-1)
        return chosen, total

    def density(self, allowed: Allowed) -> float:
        """Selected allowed keys over allowed keys, in [0, 1]; 0 if nothing is allowed. Waits for
        the device.
        """
        chosen, total = self.counts(allowed)
        rows = self.shape[:3]
        whole = int(total.expand(rows).sum())
        return int(chosen.expand(rows).sum()) / whole if whole else 0.0


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


def match_heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two tensors ``(batch, heads', ...)`` to the larger number of heads."""
    heads = max(a.shape[1], b.shape[1])
    return spread_heads(a, heads), spread_heads(b, heads)


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
            probability = 1 - (1 - probability) * (1 - later)
        joined = torch.where(twin, -1, joined)
    if same_pages:
        return Selected(joined, None, probability, a.page_size, a.origin)
    return Selected(joined, None, probability)
