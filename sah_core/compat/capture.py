"""Decode steps that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.compat.cache import is_offloaded, kind_of
from sah_core.errors import UnsupportedError

_captures: list[Capture] = []
"""The captures that run now, the innermost last."""


class Capture:
    """Decode steps whose lengths live on the device, so that a CUDA graph can replay them.

    Args:
        kv_cache: A cache made by `make_cache`, in which every layer has seen the same tokens.
        batch: Sequences.
        room: Tokens still to come.
        first: First real key per sequence, int32 ``(batch | 1,)``; None without padding.

    Attributes:
        position: Slot of the new token, int64 ``(1,)``.
        length: Valid keys, the new one included, int32 ``(1,)``.

    Raises:
        UnsupportedError: If a layer of the cache is not preallocated.
    """

    def __init__(self, kv_cache: Any, batch: int, room: int, first: Tensor | None = None) -> None:
        self.layers = list(kv_cache.layers)
        for index, layer in enumerate(self.layers):
            if kind_of(layer) != "length" or layer.key_buffer is None or is_offloaded(layer):
                raise UnsupportedError(
                    what=f"captured decoding with layer {index} ({type(layer).__name__})",
                    reason="its keys and its length cannot live on the device",
                )
        devices = {layer.key_buffer.device for layer in self.layers}
        if len(devices) > 1:
            raise UnsupportedError(
                what="captured decoding over several devices",
                reason="a graph belongs to one; place the model on one",
            )
        self.start = self.layers[0].length
        device = self.layers[0].key_buffer.device
        for layer in self.layers:
            layer.reserve(self.start + room)
        self.batch = batch
        self.position = torch.full((1,), self.start, dtype=torch.int64, device=device)
        self.length = torch.full((1,), self.start + 1, dtype=torch.int32, device=device)
        self.padded = first is not None
        self.first = torch.zeros(1, dtype=torch.int32, device=device) if first is None else first

    def limits(self) -> Allowed:
        """What the new token may attend; made anew in every forward pass, so that nothing derived
        from it outlives the pass.
        """
        return Allowed(self.first.view(-1, 1, 1), self.length.view(1, 1, 1), self.first)

    def position_ids(self) -> Tensor:
        """Position of the new token in each sequence, int64 ``(batch, 1)``."""
        return (self.position - self.first).view(-1, 1).expand(self.batch, 1)

    def advance(self) -> None:
        """Move to the next token, on the device."""
        self.position += 1
        self.length += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the cache and the mask function follow the device's lengths."""
        _captures.append(self)
        for layer in self.layers:
            layer.position = self.position
        try:
            yield
        finally:
            _captures.pop()
            for layer in self.layers:
                layer.position = None


def running_capture() -> Capture | None:
    """The capture that is running now, or None."""
    return _captures[-1] if _captures else None
