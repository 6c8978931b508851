"""A cache of transformers whose keys and values wait in the host's memory.

Imported on first use, since it imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sah_core.compat.preallocated import PreallocatedLayer


class OffloadedLayer(PreallocatedLayer):
    """A preallocated layer whose buffers lie in the host's memory; on the device there is a copy of
    the filled part while the layer computes.

    The buffers hold token after token, so that what is copied, either way, is one piece of
    page-locked memory. A snapshot is a length, as for every preallocated layer.

    Args:
        capacity: Tokens to take room for; full buffers are doubled.

    Attributes:
        key_buffer: ``(capacity, batch, kv_heads, head_dim)`` on the host; None before the first
            tokens.
        value_buffer: Likewise.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._staged: tuple[Tensor, Tensor] | None = None
        self._stream: Any = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the cached ones; returns all of them on the device."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        all_keys, all_values = key_states, value_states
        if self.length:
            keys, values = self.on_device()
            all_keys = torch.cat([keys, key_states], dim=2)
            all_values = torch.cat([values, value_states], dim=2)
        self._write(key_states, value_states)
        return all_keys, all_values

    def _write(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[2]
        self.key_buffer = self._room(self.key_buffer, key, end)
        self.value_buffer = self._room(self.value_buffer, value, end)
        for buffer, new in ((self.key_buffer, key), (self.value_buffer, value)):
            rows = new.permute(2, 0, 1, 3).contiguous()
            buffer[self.length : end].copy_(rows, non_blocking=True)
        self.set_length(end)

    def _room(self, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
        if buffer is not None and end <= buffer.shape[0]:
            return buffer
        room = self.capacity if buffer is None else 2 * buffer.shape[0]
        sizes = max(end, room), like.shape[0], like.shape[1], like.shape[3]
        fresh = self._on_host(sizes, like.dtype)
        if buffer is not None:
            self._wait()
            fresh[: self.length] = buffer[: self.length]
        return fresh

    def _on_host(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _wait(self) -> None:
        """Until copies to the host have arrived, for the host does not wait for them by itself."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _copied(self) -> tuple[Tensor, Tensor]:
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        keys, values = (
            buffer[: self.length].to(self.device, non_blocking=True).permute(1, 2, 0, 3)
            for buffer in (self.key_buffer, self.value_buffer)
        )
        return keys, values

    def prefetch(self) -> None:
        """Begin to copy to the device what `update` will need there."""
        if not self.is_initialized or not self.length or self._staged is not None:
            return
        if self.device.type != "cuda":
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        # the tokens that were written last must have left the device
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._staged = self._copied()

    def on_device(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the cached tokens on the layer's device, ``(batch, kv_heads, length,
        channels)``; the layer does not keep them there.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            return self._copied()
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._stream)
        for tensor in staged:
            tensor.record_stream(here)
        return staged

    def offload(self) -> None:
        """Drop what was copied to the device ahead."""
        self._staged = None

    def reserve(self, tokens: int) -> None:
        """Take note that so many tokens are to fit; full buffers grow anyway."""
        self.capacity = max(self.capacity, tokens)

    def set_length(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.length = length
        self._staged = None

    def copies_from(self, begin: int) -> tuple[Tensor, Tensor]:
        """Copies of the cached keys and values from a token on, in the host's memory."""
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self._wait()
        keys, values = self.key_buffer[begin : self.length], self.value_buffer[begin : self.length]
        return keys.clone(), values.clone()

    def put_back(self, begin: int, keys: Tensor, values: Tensor) -> None:
        """Write copies back to where they stood; the layer then ends behind them."""
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self._wait()
        end = begin + len(keys)
        self.key_buffer[begin:end] = keys
        self.value_buffer[begin:end] = values
        self.set_length(end)

    def _take(self, index: Tensor) -> None:
        """Make the sequences those of ``index``, in buffers of their own."""
        if not self.length:
            return
        self._wait()
        index = index.to("cpu")
        self.key_buffer = self._taken(self.key_buffer, index)
        self.value_buffer = self._taken(self.value_buffer, index)
        self._staged = None

    def _taken(self, buffer: Tensor | None, index: Tensor) -> Tensor:
        assert buffer is not None
        room, _, *others = buffer.shape
        fresh = self._on_host((room, len(index), *others), buffer.dtype)
        torch.index_select(buffer[: self.length], 1, index, out=fresh[: self.length])
        return fresh

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, or some of them several times."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence several times, one copy next to the other."""
        if self.key_buffer is not None:
            self._take(torch.arange(self.key_buffer.shape[1]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        if self.key_buffer is not None:
            self._take(torch.arange(self.key_buffer.shape[1])[indices.to("cpu")])


class OffloadedCache(DynamicCache):  # type: ignore[misc]
    """A cache with `OffloadedLayer`s: while one layer computes, the next is on its way."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens of a layer; returns all of them on the device."""
        made: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        count = len(self.layers)
        for step in range(1, count):
            following = self.layers[(layer_idx + step) % count]
            if isinstance(following, OffloadedLayer):
                following.prefetch()
                break
        return made
