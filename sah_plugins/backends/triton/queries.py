"""Kernels for what a method makes of the queries before it looks at any key: one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages import _rounded


@triton.jit
def _linear(x, weight, bias, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, INPUT_BLOCK: tl.constexpr,
            OUTPUT_BLOCK: tl.constexpr):  # fmt: skip
    into = tl.arange(0, INPUT_BLOCK)
    out = tl.arange(0, OUTPUT_BLOCK)
    w = tl.load(
        weight + into[:, None] * OUTPUTS + out[None, :],
        mask=(into < INPUTS)[:, None] & (out < OUTPUTS)[None, :],
        other=0.0,
    )
    return tl.sum(x[:, None] * w, 0) + tl.load(bias + out, mask=out < OUTPUTS, other=0.0)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _signatures(
    rows, words, first, first_bias, second, second_bias, third, third_bias, heads, count,
    r_sb, r_sh, r_sr, r_sd,
    INPUTS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, BITS: tl.constexpr,
    INPUT_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, TWO_BLOCK: tl.constexpr,
    BIT_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1) // count).to(tl.int64)
    row = tl.program_id(1) % count
    dim = tl.arange(0, INPUT_BLOCK)
    x = tl.load(
        rows + b * r_sb + head * r_sh + row * r_sr + dim * r_sd, mask=dim < INPUTS, other=0.0
    ).to(tl.float32)
    x = _silu(
        _linear(
            x, first + head * INPUTS * ONE, first_bias + head * ONE,
            INPUTS, ONE, INPUT_BLOCK, ONE_BLOCK,
        )
    )  # fmt: skip
    x = _silu(
        _linear(
            x, second + head * ONE * TWO, second_bias + head * TWO, ONE, TWO, ONE_BLOCK, TWO_BLOCK
        )
    )
    x = _linear(
        x, third + head * TWO * BITS, third_bias + head * BITS, TWO, BITS, TWO_BLOCK, BIT_BLOCK
    )
    signs = ((x > 0) & (tl.arange(0, BIT_BLOCK) < BITS)).to(tl.int32)
    signs = tl.reshape(signs, (BIT_BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    word = tl.arange(0, BIT_BLOCK // 32)
    out = words + ((b * heads + head) * count + row) * WORDS
    # fields do not overlap, so that the sum is their union
    tl.store(out + word, tl.sum(signs, 1), mask=word < WORDS)


@triton.jit
def _label_rows(
    query, channels, rows, lists, scaling, kv_heads, query_len, q_sb, q_sh, q_sr, q_sd,
    COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, OWN: tl.constexpr, SHARE: tl.constexpr,
    SHARE_BLOCK: tl.constexpr, MEAN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    b = (tl.program_id(1) // query_len).to(tl.int64)
    row = tl.program_id(1) % query_len
    member = tl.arange(0, SHARE_BLOCK)
    at = tl.arange(0, COUNT_BLOCK)
    head = group * SHARE + member
    there = (member < SHARE)[:, None] & (at < COUNT)[None, :]
    channel = tl.load(channels + (head // OWN)[:, None] * COUNT + at[None, :], mask=there, other=0)
    spot = head.to(tl.int64)[:, None] * q_sh + channel * q_sd
    value = tl.load(query + b * q_sb + row * q_sr + spot, mask=there, other=0.0)
    value = _rounded(value, at, COUNT, LEVELS) * scaling
    joined = tl.sum(tl.where(there, value, 0.0), 0)
    if MEAN:
        joined = tl.math.div_rn(joined, tl.full(joined.shape, SHARE, tl.float32))
    out = rows + ((b * kv_heads + group) * query_len + row) * COUNT
    tl.store(out + at, joined, mask=at < COUNT)


def signatures(rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `sah_core.ops.Ops.signatures`, for MLPs of three linear layers."""
    batch, heads, count, inputs = rows.shape
    widths = [weight.shape[2] for weight, _ in layers]
    words = -(-widths[2] // 32)
    result = torch.empty((batch, heads, count, words), dtype=torch.int32, device=rows.device)
    blocks = [triton.next_power_of_2(width) for width in (inputs, *widths)]
    tensors = [t.contiguous() for layer in layers for t in layer]
    _signatures[(heads, batch * count)](
        rows, result, *tensors, heads, count, *rows.stride(),
        INPUTS=inputs, ONE=widths[0], TWO=widths[1], BITS=widths[2],
        INPUT_BLOCK=blocks[0], ONE_BLOCK=blocks[1], TWO_BLOCK=blocks[2],
        BIT_BLOCK=max(32, blocks[3]), WORDS=words, num_warps=8,
    )  # fmt: skip
    return result


def label_rows(
    query: Tensor,
    channels: Tensor,
    bits: int,
    scaling: float,
    kv_heads: int,
    reduction: str = "none",
) -> Tensor:
    """The channels that labels hold of each query, rounded and scaled; those of a KV group added
    up or averaged, unless ``reduction`` is none.

    Returns:
        float32 ``(batch, heads | kv_heads, query_len, channels)``.
    """
    batch, heads, query_len, _ = query.shape
    lists, count = channels.shape
    out = heads if reduction == "none" else kv_heads
    share = heads // out
    rows = torch.empty((batch, out, query_len, count), dtype=torch.float32, device=query.device)
    _label_rows[(out, batch * query_len)](
        query, channels.contiguous(), rows, lists, scaling, out, query_len, *query.stride(),
        COUNT=count, COUNT_BLOCK=triton.next_power_of_2(count), OWN=heads // lists, SHARE=share,
        SHARE_BLOCK=triton.next_power_of_2(share), MEAN=reduction == "mean",
        LEVELS=2**bits - 1, num_warps=1,
    )  # fmt: skip
    return rows
