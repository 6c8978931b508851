"""Kernels for what a method makes of queries, and of new keys, before it scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages import _rounded


@triton.jit
def _weight(weight, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, INPUT_BLOCK: tl.constexpr,
            OUTPUT_BLOCK: tl.constexpr):  # fmt: skip
    into = tl.arange(0, INPUT_BLOCK)
    out = tl.arange(0, OUTPUT_BLOCK)
    return tl.load(
        weight + into[:, None] * OUTPUTS + out[None, :],
        mask=(into < INPUTS)[:, None] & (out < OUTPUTS)[None, :],
        other=0.0,
    )


@triton.jit
def _bias(bias, OUTPUTS: tl.constexpr, OUTPUT_BLOCK: tl.constexpr):
    out = tl.arange(0, OUTPUT_BLOCK)
    return tl.load(bias + out, mask=out < OUTPUTS, other=0.0)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["start"])
def _signatures(
    rows, words, first, first_bias, second, second_bias, third, third_bias, start, share, count,
    r_sb, r_sh, r_sr, r_sd, w_sb, w_sh, w_sr, w_sw,
    INPUTS: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, BITS: tl.constexpr,
    INPUT_BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, TWO_BLOCK: tl.constexpr,
    BIT_BLOCK: tl.constexpr, WORDS: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    if ON_DEVICE:
        begin = tl.load(start)
    else:
        begin = tl.zeros([], tl.int32) + start
    head = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1) // count).to(tl.int64)
    row = tl.program_id(1) % count
    dim = tl.arange(0, INPUT_BLOCK)
    x = tl.load(
        rows + b * r_sb + head // share * r_sh + row * r_sr + dim * r_sd,
        mask=dim < INPUTS,
        other=0.0,
    ).to(tl.float32)
    # all weights are asked for before the first of them is waited for
    one = _weight(first + head * INPUTS * ONE, INPUTS, ONE, INPUT_BLOCK, ONE_BLOCK)
    two = _weight(second + head * ONE * TWO, ONE, TWO, ONE_BLOCK, TWO_BLOCK)
    three = _weight(third + head * TWO * BITS, TWO, BITS, TWO_BLOCK, BIT_BLOCK)
    one_bias = _bias(first_bias + head * ONE, ONE, ONE_BLOCK)
    two_bias = _bias(second_bias + head * TWO, TWO, TWO_BLOCK)
    three_bias = _bias(third_bias + head * BITS, BITS, BIT_BLOCK)
    x = _silu(tl.sum(x[:, None] * one, 0) + one_bias)
    x = _silu(tl.sum(x[:, None] * two, 0) + two_bias)
    x = tl.sum(x[:, None] * three, 0) + three_bias
    signs = ((x > 0) & (tl.arange(0, BIT_BLOCK) < BITS)).to(tl.int32)
    signs = tl.reshape(signs, (BIT_BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    word = tl.arange(0, BIT_BLOCK // 32)
    out = words + b * w_sb + head * w_sh + (begin + row).to(tl.int64) * w_sr + word * w_sw
    # fields do not overlap, so that the sum is their union
    tl.store(out, tl.sum(signs, 1), mask=word < WORDS)


@triton.jit
def _label_rows(
    query, channels, rows, lists, kv_heads, query_len, q_sb, q_sh, q_sr, q_sd,
    COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, OWN: tl.constexpr, SHARE: tl.constexpr,
    SHARE_BLOCK: tl.constexpr, LEVELS: tl.constexpr,
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
    value = _rounded(value, at, COUNT, LEVELS)
    joined = tl.sum(tl.where(there, value, 0.0), 0)
    out = rows + ((b * kv_heads + group) * query_len + row) * COUNT
    tl.store(out + at, joined, mask=at < COUNT)


def signatures(rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `sah_core.ops.Ops.signatures`, for MLPs of three linear layers."""
    batch, heads, count, _ = rows.shape
    words = -(-layers[-1][0].shape[2] // 32)
    result = torch.empty((batch, heads, count, words), dtype=torch.int32, device=rows.device)
    signature_update(result, rows, layers, 0)
    return result


def signature_update(
    words: Tensor, rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]], start: int | Tensor
) -> None:
    """See `sah_core.ops.Ops.signature_update`, for MLPs of three linear layers."""
    batch, row_heads, count, inputs = rows.shape
    heads = words.shape[1]
    widths = [weight.shape[2] for weight, _ in layers]
    blocks = [triton.next_power_of_2(width) for width in (inputs, *widths)]
    tensors = [t.contiguous() for layer in layers for t in layer]
    _signatures[(heads, batch * count)](
        rows, words, *tensors, start, heads // row_heads, count, *rows.stride(), *words.stride(),
        INPUTS=inputs, ONE=widths[0], TWO=widths[1], BITS=widths[2],
        INPUT_BLOCK=blocks[0], ONE_BLOCK=blocks[1], TWO_BLOCK=blocks[2],
        BIT_BLOCK=max(32, blocks[3]), WORDS=words.shape[3],
        ON_DEVICE=not isinstance(start, int), num_warps=8,
    )  # fmt: skip


def label_rows(query: Tensor, channels: Tensor, bits: int, out: int) -> Tensor:
    """The channels that labels hold of each query, rounded, those of each group of heads added up.

    Args:
        query: ``(batch, heads, query_len, head_dim)``.
        channels: See `sah_core.ops.Ops.label_scores`.
        bits: Bits per channel.
        out: Groups: as many as heads, or KV heads.

    Returns:
        float32 ``(batch, out, query_len, channels)``.
    """
    batch, heads, query_len, _ = query.shape
    lists, count = channels.shape
    share = heads // out
    rows = torch.empty((batch, out, query_len, count), dtype=torch.float32, device=query.device)
    _label_rows[(out, batch * query_len)](
        query, channels.contiguous(), rows, lists, out, query_len, *query.stride(),
        COUNT=count, COUNT_BLOCK=triton.next_power_of_2(count), OWN=heads // lists, SHARE=share,
        SHARE_BLOCK=triton.next_power_of_2(share), LEVELS=2**bits - 1, num_warps=1,
    )  # fmt: skip
    return rows
