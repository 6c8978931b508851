"""Kernels for logits and for the bounds and scores of pages."""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E, steps


@triton.jit
def _queries(
    query, b, kv_head, begin, group, query_len, q_sb, q_sh, q_sr, q_sd,
    ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, ROWS)
    member = line % GROUP_BLOCK
    row = begin + line // GROUP_BLOCK
    present = (member < group) & (row < query_len)
    dim = tl.arange(0, DIM_BLOCK)
    head = kv_head * group + member
    spot = head[:, None] * q_sh + row[:, None] * q_sr + dim[None, :] * q_sd
    mask = present[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(query + b * q_sb + spot, mask=mask, other=0.0), head, row, present


@triton.jit
def _share(length, first, counts, bits, divisor, minimum, maximum, sequences, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < sequences
    real = tl.load(length) - tl.load(first + at, mask=inside, other=0)
    # arguments of kernels have 32 bits of fraction at most: the 64 come as an integer
    fraction = bits.to(tl.int64).to(tl.float64, bitcast=True)
    count = tl.floor(real.to(tl.float64) * fraction).to(tl.int32) // divisor
    count = tl.minimum(tl.maximum(count, minimum), maximum)
    tl.store(counts + at, count, mask=inside)


def share(
    length: Tensor, first: Tensor, fraction: float, divisor: int, minimum: int, maximum: int | None
) -> Tensor:
    """A fraction of the real keys; see `sah_core.ops.Ops.share`."""
    sequences = first.shape[0]
    counts = torch.empty((sequences, 1, 1), dtype=torch.int32, device=length.device)
    (bits,) = struct.unpack("<q", struct.pack("<d", fraction))
    limit = 2**31 - 1 if maximum is None else maximum
    block = triton.next_power_of_2(sequences)
    _share[(1,)](length, first, counts, bits, divisor, minimum, limit, sequences, BLOCK=block)
    return counts


@triton.jit
def _logits(
    query, key, scores, kv_heads, group, query_len, key_len,
    q_sb, q_sh, q_sr, q_sd, k_sb, k_sh, k_sk, k_sd, scale, softcap,
    ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    begin = tl.program_id(2) * (ROWS // GROUP_BLOCK)
    q, head, row, present = _queries(
        query, b, kv_head, begin, group, query_len, q_sb, q_sh, q_sr, q_sd,
        ROWS, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    key += b * k_sb + kv_head.to(tl.int64) * k_sh
    inside = at < key_len
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(key + at.to(tl.int64)[:, None] * k_sk + dim[None, :] * k_sd, mask=mask, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_CAP:
        logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2E / softcap)) + 1.0)
    line = (b * kv_heads * group + head) * query_len + row
    tl.store(
        scores + line.to(tl.int64)[:, None] * key_len + at[None, :],
        logits,
        mask=present[:, None] & inside[None, :],
    )


@triton.jit
def _rounded(bound, dim, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr):
    bound = bound.to(tl.float32)
    inside = (dim < HEAD_DIM)[None, :]
    least = tl.min(tl.where(inside, bound, float("inf")), 1)
    most = tl.max(tl.where(inside, bound, float("-inf")), 1)
    step = tl.math.div_rn(most - least, tl.full(least.shape, LEVELS, tl.float32))
    step = tl.where(step > 0, step, 1.0)
    level = tl.math.div_rn(bound - least[:, None], tl.broadcast_to(step[:, None], bound.shape))
    # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    level = (level + 12582912.0) - 12582912.0
    return tl.where(inside, level * step[:, None] + least[:, None], 0.0)


@triton.jit
def _page_scores(
    query, low, high, scores, kv_heads, group, query_len, pages,
    q_sb, q_sh, q_sr, q_sd, l_sb, l_sh, l_sk, l_sd, h_sb, h_sh, h_sk, h_sd, factor,
    ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, REDUCTION: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    begin = tl.program_id(2) * (ROWS // GROUP_BLOCK)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    inside = at < pages
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    place = at.to(tl.int64)[:, None]
    low += b * l_sb + kv_head.to(tl.int64) * l_sh
    high += b * h_sb + kv_head.to(tl.int64) * h_sh
    least = tl.load(low + place * l_sk + dim[None, :] * l_sd, mask=mask, other=0.0)
    most = tl.load(high + place * h_sk + dim[None, :] * h_sd, mask=mask, other=0.0)
    q, head, row, present = _queries(
        query, b, kv_head, begin, group, query_len, q_sb, q_sh, q_sr, q_sd,
        ROWS, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    if BITS < 16:
        one = _rounded(least, dim, HEAD_DIM, 2**BITS - 1)
        other = _rounded(most, dim, HEAD_DIM, 2**BITS - 1)
        # each is rounded by its own range, which may swap the two in a channel
        least, most = tl.minimum(one, other), tl.maximum(one, other)
        q = q.to(tl.float32)
    zero = tl.zeros_like(q)
    bound = tl.dot(tl.maximum(q, zero).to(most.dtype), tl.trans(most), input_precision=PRECISION)
    bound = tl.dot(
        tl.minimum(q, zero).to(least.dtype), tl.trans(least), bound, input_precision=PRECISION
    )
    if REDUCTION == "none":
        line = (b * kv_heads * group + head) * query_len + row
        tl.store(
            scores + line.to(tl.int64)[:, None] * pages + at[None, :],
            bound,
            mask=present[:, None] & inside[None, :],
        )
    else:
        if REDUCTION == "max":
            bound = tl.where(present[:, None], bound, float("-inf"))
        bound = tl.reshape(bound, (ROWS // GROUP_BLOCK, GROUP_BLOCK, BLOCK))
        if REDUCTION == "max":
            joined = tl.max(bound, 1)
        else:
            joined = tl.sum(bound, 1) * factor
        own = begin + tl.arange(0, ROWS // GROUP_BLOCK)
        line = (b * kv_heads + kv_head) * query_len + own
        tl.store(
            scores + line.to(tl.int64)[:, None] * pages + at[None, :],
            joined,
            mask=(own < query_len)[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["new", "pages"])
def _bounds_update(
    low, high, key, start, first, kv_heads, new, pages,
    l_sb, l_sh, l_sk, l_sd, h_sb, h_sh, h_sk, h_sd, k_sb, k_sh, k_sk, k_sd, f_sb,
    PAGE: tl.constexpr, PAGE_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    HAS_FIRST: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    if ON_DEVICE:
        begin = tl.load(start)
    else:
        begin = tl.zeros([], tl.int32) + start
    if HAS_FIRST:
        begin -= tl.load(first + b * f_sb)
    page = tl.maximum(begin, 0) // PAGE + tl.program_id(0)
    lane = tl.arange(0, PAGE_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    source = page * PAGE + lane - begin
    fits = (lane < PAGE) & (source >= 0) & (source < new)
    mask = fits[:, None] & (dim < HEAD_DIM)[None, :]
    spot = source.to(tl.int64)[:, None] * k_sk + dim[None, :] * k_sd
    rows = tl.load(key + b * k_sb + kv_head * k_sh + spot, mask=mask, other=0.0).to(tl.float32)
    least = tl.min(tl.where(mask, rows, float("inf")), 0)
    most = tl.max(tl.where(mask, rows, float("-inf")), 0)
    opening = page * PAGE + tl.zeros([DIM_BLOCK], tl.int32)
    write = (dim < HEAD_DIM) & (opening < begin + new) & (opening + PAGE > begin)
    write = write & (opening < pages * PAGE)
    # a page whose first key is new holds nothing yet
    older = write & (opening < begin)
    where = page.to(tl.int64)
    low += b * l_sb + kv_head * l_sh + where * l_sk + dim * l_sd
    high += b * h_sb + kv_head * h_sh + where * h_sk + dim * h_sd
    least = tl.minimum(least, tl.load(low, mask=older, other=float("inf")).to(tl.float32))
    most = tl.maximum(most, tl.load(high, mask=older, other=float("-inf")).to(tl.float32))
    tl.store(low, least.to(low.dtype.element_ty), mask=write)
    tl.store(high, most.to(high.dtype.element_ty), mask=write)


def row_tile(group: int, query_len: int) -> tuple[int, int]:
    """Rows of a tile (query rows times padded group) and the padded group."""
    group_block = triton.next_power_of_2(group)
    wanted = group_block * min(triton.next_power_of_2(query_len), max(1, 64 // group_block))
    return max(16, wanted), group_block


def logits(query: Tensor, key: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """See `sah_core.ops.Ops.logits`."""
    batch, heads, query_len, head_dim = query.shape
    kv_heads, key_len = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows, group_block = row_tile(group, query_len)
    scores = torch.empty(
        (batch, heads, query_len, key_len), dtype=torch.float32, device=query.device
    )
    block = 128 if query.element_size() == 2 else 64
    grid = (-(-key_len // block), batch * kv_heads, -(-query_len // (rows // group_block)))
    _logits[grid](
        query, key, scores, kv_heads, group, query_len, key_len,
        *query.stride(), *key.stride(), scaling, 1.0 if softcap is None else softcap,
        ROWS=rows, GROUP_BLOCK=group_block, HEAD_DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)), BLOCK=block,
        HAS_CAP=softcap is not None, PRECISION=precision(query), LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return scores


def page_scores(
    query: Tensor, low: Tensor, high: Tensor, reduction: str = "none", bits: int = 16
) -> Tensor:
    """See `sah_core.ops.Ops.page_scores`."""
    batch, heads, query_len, head_dim = query.shape
    kv_heads, pages = low.shape[1], low.shape[2]
    group = heads // kv_heads
    rows, group_block = row_tile(group, query_len)
    own = heads if reduction == "none" else kv_heads
    scores = torch.empty((batch, own, query_len, pages), dtype=torch.float32, device=query.device)
    block = 64 if bits == 16 and query.element_size() == 2 else 32
    grid = (-(-pages // block), batch * kv_heads, -(-query_len // (rows // group_block)))
    _page_scores[grid](
        query, low, high, scores, kv_heads, group, query_len, pages,
        *query.stride(), *low.stride(), *high.stride(),
        1.0 / group if reduction == "mean" else 1.0,
        ROWS=rows, GROUP_BLOCK=group_block, HEAD_DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)), BLOCK=block, REDUCTION=reduction,
        BITS=bits, PRECISION="ieee" if bits < 16 else precision(query), num_warps=4,
    )  # fmt: skip
    return scores


def page_bounds_update(
    low: Tensor,
    high: Tensor,
    key: Tensor,
    start: int | Tensor,
    page_size: int,
    first: Tensor | None = None,
) -> None:
    """See `sah_core.ops.Ops.page_bounds_update`."""
    batch, kv_heads, new, head_dim = key.shape
    if not new:
        return
    touched = (new - 1 + page_size - 1) // page_size + 1
    _bounds_update[(touched, batch * kv_heads)](
        low, high, key, start, key if first is None else first, kv_heads, new, low.shape[2],
        *low.stride(), *high.stride(), *key.stride(),
        0 if first is None else steps(first, 0)[0],
        PAGE=page_size, PAGE_BLOCK=triton.next_power_of_2(page_size), HEAD_DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim), HAS_FIRST=first is not None,
        ON_DEVICE=not isinstance(start, int), num_warps=1,
    )  # fmt: skip


def precision(tensor: Tensor) -> str:
    """How `tl.dot` multiplies: float32 stays float32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
