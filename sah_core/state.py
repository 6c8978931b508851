"""State that maskers keep per request, layer and pipeline step.

A state is append-only wherever it can be: its tensors are preallocated, written in place and cut
back by length, so that a snapshot costs nothing. What is not append-only is copied into the
snapshot.
"""

from __future__ import annotations

from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from sah_core.ops import REFERENCE, Ops
from sah_core.randomness import Random


@attrs.frozen
class LayerInfo:
    """What a masker may know of a layer when it creates its state.

    Attributes:
        index: Layer index.
        count: Layers in the model.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels of a key.
        value_dim: Channels of a value.
        capacity: Keys that the key buffer holds; a hint for preallocation.
        first: First real key per sequence, int32 ``(batch | 1,)``, or None without padding.
        dtype: Type of the keys.
        device: Where the keys live.
        ops: Scoring primitives with which the state is kept up to date.
        random: Random numbers of this step and layer (hyperplanes, first centroids), the same that
            `Inputs.random` gives.
    """

    index: int
    count: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    capacity: int
    first: Tensor | None
    dtype: torch.dtype
    device: torch.device
    ops: Ops = REFERENCE
    random: Random = Random()


class State(Protocol):
    """What the core asks of a masker's state.

    A state whose buffers follow the number of keys may also have ``reserve(keys)``, which makes
    room for so many: it is called before keys are appended whose index lives on the device, since
    such an append cannot grow anything.

    A state that can follow sequences which change places, as the beams of a beam search do, also
    has ``reorder(rows)``, named as transformers' caches name it: sequence ``b`` is afterwards what
    sequence ``rows[b]`` was. ``rows``, int64 ``(sequences,)`` on the device of the layer's keys,
    may name some several times and others not at all, and its length is the new batch. Everything
    that belongs to a sequence follows, its first real key included, and room taken ahead stays.
    Snapshots from before are void, for most hold lengths alone; who wants to go back reorders a
    copy (`copy.deepcopy`). Without ``reorder`` a masker is refused with beams.
    """

    def snapshot(self) -> Any:
        """A token from which `restore` recreates the present state."""

    def restore(self, token: Any) -> None:
        """Go back to the state in which ``token`` was taken. One live branch at a time."""


class GrowingBuffer:
    """A tensor that grows along one dimension, written in place.

    Room is taken ahead, so that appending a token copies that token and nothing else; only `view`
    of the filled part is handed out.
    """

    def __init__(self, dim: int = 2, capacity: int = 0) -> None:
        self.dim = dim
        self.length = 0
        self.capacity = capacity
        self.data: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """The filled part.

        Raises:
            RuntimeError: If nothing was ever appended, so that there is no shape.
        """
        if self.data is None:
            raise RuntimeError("the buffer is empty")
        return self.data.narrow(self.dim, 0, self.length)

    def reserve(self, like: Tensor, room: int) -> None:
        """Make sure that ``room`` entries fit, copying what is there at most once per doubling."""
        if self.data is not None and room <= self.data.shape[self.dim]:
            return
        room = max(room, self.capacity, 0 if self.data is None else 2 * self.data.shape[self.dim])
        shape = list(like.shape)
        shape[self.dim] = room
        fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
        if self.data is not None and self.length:
            fresh.narrow(self.dim, 0, self.length).copy_(self.view)
        self.data = fresh

    def append(self, rows: Tensor) -> Tensor:
        """Write ``rows`` behind what is there and return the filled part."""
        added = rows.shape[self.dim]
        self.reserve(rows, self.length + added)
        assert self.data is not None
        self.data.narrow(self.dim, self.length, added).copy_(rows)
        self.length += added
        return self.view

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences, which lie along dimension 0, as `State` says; the room stays."""
        if self.data is not None:
            self.data = self.data.index_select(0, rows)

    def snapshot(self) -> int:
        """The length; the contents stay valid because nothing before it is written again."""
        return self.length

    def restore(self, token: int) -> None:
        """Cut back to the length of the snapshot."""
        self.length = token


class TokenBuffer:
    """A number, or a few, per token and KV head, written in place at the token's index.

    Unlike a `GrowingBuffer` it takes tokens at an index that lives on the device too, and then
    never grows.

    Args:
        shape: ``(batch, kv_heads, capacity, ...)``, or with the capacity elsewhere.
        dtype: Type of the numbers.
        device: Where they live.
        dim: The dimension of the tokens.

    Attributes:
        data: The buffer, ``shape`` or longer along the dimension of the tokens.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dim: int = 2,
    ) -> None:
        self.dim = dim
        sizes = list(shape)
        sizes[dim] = max(1, sizes[dim])
        self.data = torch.zeros(sizes, dtype=dtype, device=device)

    def write(self, rows: Tensor, start: int | Tensor) -> None:
        """Write tokens.

        Args:
            rows: ``shape`` with the new tokens.
            start: Index of the first of them; an int32 tensor ``(1,)`` under graph capture, where
                there is one.
        """
        if not isinstance(start, int):
            self.data.index_copy_(self.dim, start.long(), rows)
            return
        count = rows.shape[self.dim]
        self.reserve(start + count)
        self.data.narrow(self.dim, start, count).copy_(rows)

    def reserve(self, tokens: int) -> None:
        """Make sure that so many tokens fit, copying at most once per doubling."""
        sizes = list(self.data.shape)
        room = sizes[self.dim]
        if tokens > room:
            sizes[self.dim] = max(tokens, 2 * room) - room
            self.data = torch.cat([self.data, self.data.new_zeros(sizes)], dim=self.dim)

    def first(self, count: int) -> Tensor:
        """The numbers of the first ``count`` tokens."""
        return self.data.narrow(self.dim, 0, min(count, self.data.shape[self.dim]))

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences, which lie along dimension 0, as `State` says; the room stays."""
        self.data = self.data.index_select(0, rows)

    def snapshot(self) -> None:
        """Nothing: a token's numbers are not changed by those that come after it."""

    def restore(self, token: None) -> None:
        """Nothing: tokens after the snapshot are overwritten by those that come."""


def reorder_first(first: Tensor | None, rows: Tensor) -> Tensor | None:
    """`LayerInfo.first` of sequences that are taken as `State` says; one number that holds for all
    of them stays.
    """
    return first if first is None or len(first) == 1 else first.index_select(0, rows)
