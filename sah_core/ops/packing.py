"""Small integers packed into words, and vectors rounded to few bits."""

from __future__ import annotations

import torch
from torch import Tensor


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


def round_to_bits(tensor: Tensor, bits: int) -> Tensor:
    """Round each vector of the last dimension to ``2**bits`` levels from its minimum to its
    maximum.

    The asymmetric quantisation of label caches, applied and undone: float in, float out.
    """
    low, high = tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, 1.0)
    return torch.round((tensor - low) / step) * step + low
