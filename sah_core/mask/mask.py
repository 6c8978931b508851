"""The mask as a whole: made, combined, converted and counted."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed, cut_part, cut_rows
from sah_core.mask.parts import (
    KeyRange,
    Selected,
    Shape,
    either,
    join_entries,
    lower_at,
    match_heads,
    ranges_length,
    spread_heads,
    unite_selected,
)


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
        ranges = tuple(r.rows(begin, end, step) for r in self.ranges)
        selected = None if self.selected is None else self.selected.rows(begin, end, step)
        dense = None if self.dense is None else cut_rows(self.dense, begin, end, step)
        rows = len(range(begin, end, step))
        return Mask((batch, heads, rows, key_len), ranges, selected, dense, self.is_full)

    def part(self, sequences: slice, heads: slice) -> Mask:
        """The mask of some sequences and query heads, given by their first and last (exclusive);
        heads that share a selection stay together.
        """
        batch, of, query_len, key_len = self.shape
        ranges = tuple(r.part(sequences, heads, of) for r in self.ranges)
        selected = None if self.selected is None else self.selected.part(sequences, heads, of)
        dense = None if self.dense is None else cut_part(self.dense, sequences, heads, of)
        shape = (len(range(batch)[sequences]), len(range(of)[heads]), query_len, key_len)
        return Mask(shape, ranges, selected, dense, self.is_full)

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
            dense = either(a, b)
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
        ranges = tuple(r.restricted(allowed) for r in self.ranges)
        selected = self.selected
        if selected is not None:
            selected = selected.restricted(allowed, shape[3])
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
            key, and the probabilities, float32 in the same shape and 1 where an entry holds no key,
            or None if all are 1.
        """
        key_len = self.shape[3]
        mask = self.to_selected()
        ranges = mask.ranges
        if self.is_full:
            ranges = (KeyRange(allowed.start, allowed.stop, key_len),)
        parts: list[tuple[Tensor, Tensor | None]] = []
        for index, part in enumerate(ranges):
            keys, keep = part.entries(allowed, key_len)
            for earlier in ranges[:index]:
                keep = keep & ~earlier.contains(keys)
            parts.append((torch.where(keep, keys, -1), None))
        if mask.selected is not None:
            keys, probability = mask.selected.tokens(key_len)
            heads = max(keys.shape[1], allowed.heads)
            keys = spread_heads(keys, heads)
            keep = (keys >= 0) & allowed.contains(keys) & ~mask.covers(keys)
            if probability is not None:
                # a sampler that drew nothing in a row says 0 there, whose logarithm would spread
                probability = torch.where(keep, spread_heads(probability, heads), 1.0)
            parts.append((torch.where(keep, keys, -1), probability))
        if not parts:
            nothing = torch.empty((1, 1, 1, 0), dtype=torch.int32, device=allowed.device)
            return nothing, None
        return join_entries(parts)

    def to_dense(self) -> Tensor:
        """float32 probabilities ``(batch, heads, query_len, key_len)``: the reference form."""
        if self.is_full:
            return torch.ones(self.shape, device=self.device)
        dense = torch.zeros(self.shape, device=self.device)
        if self.dense is not None:
            dense += spread_heads(self.dense, self.shape[1])
        if self.selected is not None:
            chosen = self.selected.to_dense(self.shape)
            dense = chosen if self.dense is None else either(dense, chosen)
        position = torch.arange(self.shape[3], device=self.device, dtype=torch.int32)
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
