"""Counter-based random numbers: a pure function of where they are used, with no generator state.

The same (seed, pipeline step, layer, head, query position, key position, draw) always gives the
same number, on every device, in any order, batch or chunking. Rolling back, resuming and graph
capture therefore need nothing. The mixing function is the finaliser of SplitMix64 (Steele, Lea,
Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), applied once per counter word.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def mix(state: Tensor | int, word: Tensor) -> Tensor:
    """Absorb one counter word into 64 bits of state; int64 tensors, wrapping arithmetic."""
    bits = (word ^ state) + _signed(_GOLDEN)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX[0])
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX[1])
    return bits ^ _shift_right(bits, 31)


def _mix_host(state: int, word: int) -> int:
    """`mix` of host integers, both from 0 to 2^64 - 1."""
    whole = (1 << 64) - 1
    bits = ((state ^ word) + _GOLDEN) & whole
    bits = ((bits ^ bits >> 30) * _MIX[0]) & whole
    bits = ((bits ^ bits >> 27) * _MIX[1]) & whole
    return bits ^ bits >> 31


@attrs.frozen
class Random:
    """The random numbers of one pipeline step in one layer.

    Attributes:
        seed: Seed of the pipeline.
        step: Position of the masker in the pipeline.
        layer: Layer index.
    """

    seed: int = 0
    step: int = 0
    layer: int = 0

    def state(self, draw: int = 0) -> int:
        """What `bits` starts from at every place: seed, step, layer and draw, as a signed integer
        of 64 bits; head, query and key positions are mixed in after it, in that order.
        """
        state = 0
        for word in (self.seed, self.step, self.layer, draw):
            state = _mix_host(state, word & ((1 << 64) - 1))
        return _signed(state)

    def bits(
        self, heads: int, query_position: Tensor, key_position: Tensor, draw: int = 0
    ) -> Tensor:
        """64 random bits per (sequence, head, query, key).

        Args:
            heads: Number of query heads.
            query_position: int ``(batch | 1, query_len)``, counted from the first real key.
            key_position: int, broadcastable to ``(batch, heads, query_len, count)``, counted
                likewise.
            draw: Distinguishes several numbers at one place.

        Returns:
            int64, the broadcast shape ``(batch, heads, query_len, count)``.
        """
        device = key_position.device
        head = torch.arange(heads, dtype=torch.int64, device=device).view(1, heads, 1, 1)
        state = mix(self.state(draw), head)
        state = mix(state, query_position.long()[:, None, :, None])
        return mix(state, key_position.long())

    def uniform(
        self, heads: int, query_position: Tensor, key_position: Tensor, draw: int = 0
    ) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float32; the arguments and shape are those
        of `bits`.
        """
        top = _shift_right(self.bits(heads, query_position, key_position, draw), 41)
        return (top.to(torch.float32) + 0.5) * 2.0**-23

    def normal(
        self, heads: int, query_position: Tensor, key_position: Tensor, draw: int = 0
    ) -> Tensor:
        """Standard normal numbers, float32; the arguments and shape are those of `bits`.

        Box and Muller's transform of the draws ``2 * draw`` and ``2 * draw + 1`` of `uniform`.
        """
        radius = self.uniform(heads, query_position, key_position, 2 * draw)
        angle = self.uniform(heads, query_position, key_position, 2 * draw + 1)
        return torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)

    def uniform64(
        self, heads: int, query_position: Tensor, key_position: Tensor, draw: int = 0
    ) -> Tensor:
        """Uniform numbers in the open interval (0, 1) with 53 bits, float64, where the tail of a
        distribution counts; the arguments and shape are those of `bits`.
        """
        top = _shift_right(self.bits(heads, query_position, key_position, draw), 12)
        return (top.to(torch.float64) + 0.5) * 2.0**-52
