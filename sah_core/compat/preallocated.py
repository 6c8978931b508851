"""A layer of transformers' cache whose keys and values lie in buffers taken ahead.

Imported on first use, since it imports transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that writes into a buffer taken ahead; its keys and values are views of the
    filled part.

    Appending copies the new tokens and nothing else, a snapshot is a length. One live branch at
    a time.

    Args:
        capacity: Tokens to take room for; a full buffer is doubled.

    Attributes:
        length: Tokens in the cache.
        key_buffer: ``(batch, kv_heads, capacity, head_dim)``; None before the first tokens.
        value_buffer: Likewise.
        position: Slot that the next token is written to under graph capture, int64 ``(1,)``; None
            outside one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.position: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device; the buffers are taken with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the cached ones; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        keys = self.key_buffer = self._room(self.key_buffer, key_states, end)
        values = self.value_buffer = self._room(self.value_buffer, value_states, end)
        if self.position is not None:
            keys.index_copy_(2, self.position, key_states)
            values.index_copy_(2, self.position, value_states)
            return keys, values
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.set_length(end)
        return self.keys, self.values

    def _room(self, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[2]:
            return buffer
        room = self.capacity if buffer is None else 2 * buffer.shape[2]
        shape = (like.shape[0], like.shape[1], max(end, room), like.shape[3])
        # zeros, because what is masked out is still multiplied: 0 * garbage may be NaN
        fresh = like.new_zeros(shape)
        if buffer is not None:
            fresh[:, :, : self.length] = buffer[:, :, : self.length]
        return fresh

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens at once."""
        if self.key_buffer is None or self.value_buffer is None:
            self.capacity = max(self.capacity, tokens)
        elif tokens > self.key_buffer.shape[2]:
            self.key_buffer = self._room(self.key_buffer, self.key_buffer, tokens)
            self.value_buffer = self._room(self.value_buffer, self.value_buffer, tokens)
            self.set_length(self.length)

    def set_length(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.length = length
        if self.key_buffer is not None and self.value_buffer is not None:
            self.keys = self.key_buffer[:, :, :length]
            self.values = self.value_buffer[:, :, :length]

    def copies_from(self, begin: int) -> tuple[Tensor, Tensor]:
        """Copies of the cached keys and values from a token on, for `put_back`."""
        return self.keys[:, :, begin:].clone(), self.values[:, :, begin:].clone()

    def put_back(self, begin: int, keys: Tensor, values: Tensor) -> None:
        """Write copies back to where they stood; the layer then ends behind them."""
        self.set_length(begin)
        self.update(keys, values)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next pass sees, and the index of the first of them."""
        if self.position is not None and self.key_buffer is not None:
            return self.key_buffer.shape[2], 0
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, counted without regard to the sign."""
        self.set_length(self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Drop all tokens; the buffers stay."""
        self.set_length(0)

    def _rewrite(self, keys: Tensor, values: Tensor) -> None:
        length, self.length = self.length, 0
        self.key_buffer = self.value_buffer = None
        self.capacity = max(self.capacity, length)
        self.update(keys, values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, or some of them several times."""
        if self.length:
            index = beam_idx.to(self.keys.device)
            self._rewrite(self.keys.index_select(0, index), self.values.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence several times, one copy next to the other."""
        if self.length:
            self._rewrite(
                self.keys.repeat_interleave(repeats, dim=0),
                self.values.repeat_interleave(repeats, dim=0),
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        if self.length:
            self._rewrite(self.keys[indices, ...], self.values[indices, ...])
