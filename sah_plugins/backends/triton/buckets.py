"""Kernels for hash tables: codes, collisions, and the compaction of what was found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import steps

KEYS = 1024
"""Keys per program that counts collisions."""
UNROLL = 5
"""Tables whose codes are under way at once."""
CHUNK = 4096
"""Keys per program that compacts."""


@triton.jit
def _codes(
    vectors, planes, center, codes, heads, count, v_sb, v_sh, v_sr, v_sd, c_sb, c_sh,
    o_sb, o_sh, o_st, o_sk,
    BITS: tl.constexpr, TABLES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, HAS_CENTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) % count
    head = ((tl.program_id(1) // count) % heads).to(tl.int64)
    b = (tl.program_id(1) // (count * heads)).to(tl.int64)
    table = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    vector = tl.load(
        vectors + b * v_sb + head * v_sh + row * v_sr + dim * v_sd, mask=dim < HEAD_DIM, other=0.0
    ).to(tl.float32)
    if HAS_CENTER:
        vector -= tl.load(center + b * c_sb + head * c_sh + dim, mask=dim < HEAD_DIM, other=0.0)
    inside = table < TABLES
    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    code = tl.zeros([BLOCK], tl.int32)
    for bit in tl.static_range(BITS):
        spot = (bit * TABLES + table)[:, None] * HEAD_DIM + dim[None, :]
        normal = tl.load(planes + spot, mask=mask, other=0.0)
        side = tl.sum(normal * vector[None, :], 1) > 0
        code += side.to(tl.int32) << bit
    out = codes + b * o_sb + head * o_sh + table * o_st + row * o_sk
    tl.store(out, code.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _collisions(
    query, key, counts, kv_heads, rows, keys, query_len, group, tables,
    q_sb, q_sh, q_st, q_sr, k_sb, k_sh, k_st,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # programs that read the same keys are neighbours
    begin = tl.program_id(0) * ROWS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    inside = at < keys
    codes = key + b * k_sb + kv_head * k_sh + at
    query += b * q_sb + kv_head * group * q_sh
    # the counts of all rows share one integer
    packed = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tables, UNROLL):
        for step in tl.static_range(UNROLL):
            # past the last table it is read once more, and counts nothing
            table = tl.minimum(first + step, tables - 1)
            one = tl.where(first + step < tables, 1, 0)
            theirs = tl.load(codes + table.to(tl.int64) * k_st, mask=inside, other=0)
            for member in tl.static_range(ROWS):
                row = tl.minimum(begin + member, rows - 1)
                spot = (row // query_len) * q_sh + (row % query_len) * q_sr
                mine = tl.load(query + table * q_st + spot)
                packed += tl.where(theirs == mine, one << (WIDTH * member), 0)
    lines = ((b * kv_heads + kv_head) * rows + begin) * keys
    for member in tl.static_range(ROWS):
        count = (packed >> (WIDTH * member)) & ((1 << WIDTH) - 1)
        here = at < tl.where(begin + member < rows, keys, 0)
        out = counts + lines + member * keys.to(tl.int64) + at
        tl.store(out, count.to(counts.dtype.element_ty), mask=here)


@triton.jit
def _tally(chosen, held, keys, BLOCK: tl.constexpr):
    line = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    flag = tl.load(chosen + line.to(tl.int64) * keys + at, mask=at < keys, other=0)
    total = tl.sum((flag != 0).to(tl.int32))
    tl.store(held + line * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["capacity"])
def _compact(
    chosen, held, limit, draw, indices, kept, found, keys, capacity, heads, query_len,
    n_sb, n_sh, n_sr, d_sb, d_sh, d_sr,
    HAS_LIMIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    every = tl.arange(0, CHUNKS)
    counts = tl.load(held + line * chunks + every, mask=every < chunks, other=0)
    before = tl.sum(tl.where(every < chunk, counts, 0))
    total = tl.sum(counts)
    most = tl.zeros([], tl.int32) + capacity
    if HAS_LIMIT:
        most = tl.load(limit + b * n_sb + head * n_sh + row * n_sr)
    stay = tl.minimum(total, most)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    flag = tl.load(chosen + line.to(tl.int64) * keys + at, mask=at < keys, other=0) != 0
    earlier = before + tl.cumsum(flag.to(tl.int32), 0) - 1
    indices += line.to(tl.int64) * capacity
    if total > stay:
        # slot s holds the key with s * total + offset in [earlier, earlier + 1) * stay
        start = tl.load(draw + b * d_sb + head * d_sh + row * d_sr).to(tl.float64)
        offset = tl.floor(start * total.to(tl.float64)).to(tl.int64)
        whole = total.to(tl.int64)
        least = earlier.to(tl.int64) * stay
        slot = (least - offset + whole - 1) // whole
        take = flag & (slot * whole + offset < least + stay) & (slot < stay)
        tl.store(indices + slot, at, mask=take)
    else:
        tl.store(indices + earlier, at, mask=flag)
    for begin in range(chunk * SLOTS, capacity, chunks * SLOTS):
        rest = begin + tl.arange(0, SLOTS)
        tl.store(indices + rest, -1, mask=(rest >= stay) & (rest < capacity))
    if chunk == 0:
        tl.store(kept + line, stay)
        tl.store(found + line, total)


def lsh_codes(
    vectors: Tensor, planes: Tensor, dtype: torch.dtype, center: Tensor | None = None
) -> Tensor:
    """See `sah_core.code_ops.CodeOps.lsh_codes`."""
    bits, tables, head_dim = planes.shape
    batch, heads, count, _ = vectors.shape
    codes = torch.empty((batch, heads, tables, count), dtype=dtype, device=vectors.device)
    block = 32
    center = None if center is None else center.contiguous()
    _codes[(-(-tables // block), batch * heads * count)](
        vectors, planes.contiguous(), planes if center is None else center, codes, heads, count,
        *vectors.stride(), *([0, 0] if center is None else center.stride()[:2]), *codes.stride(),
        BITS=bits, TABLES=tables, HEAD_DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim),
        BLOCK=block, HAS_CENTER=center is not None, num_warps=4,
    )  # fmt: skip
    return codes


def collisions(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """See `sah_core.code_ops.CodeOps.collisions`; the keys of a table must be contiguous."""
    batch, heads, tables, query_len = query_codes.shape
    kv_heads, keys = key_codes.shape[1], key_codes.shape[3]
    group = heads // kv_heads
    rows = group * query_len
    few = tables < 256
    shape = (batch, heads, query_len, keys)
    dtype = torch.uint8 if few else torch.int16
    counts = torch.empty(shape, dtype=dtype, device=key_codes.device)
    tile = min(4 if few else 2, triton.next_power_of_2(rows))
    _collisions[(-(-rows // tile), -(-keys // KEYS), batch * kv_heads)](
        query_codes, key_codes, counts, kv_heads, rows, keys, query_len, group, tables,
        *query_codes.stride(), *key_codes.stride()[:3],
        ROWS=tile, WIDTH=8 if few else 16, UNROLL=UNROLL, BLOCK=KEYS, num_warps=4,
    )  # fmt: skip
    return counts


def pick(
    chosen: Tensor, capacity: int, limit: Tensor | None, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sah_core.code_ops.CodeOps.pick`."""
    batch, heads, query_len, keys = chosen.shape
    lead, device = (batch, heads, query_len), chosen.device
    lines = batch * heads * query_len
    indices = torch.empty((*lead, capacity), dtype=torch.int32, device=device)
    kept, found = torch.empty((2, *lead), dtype=torch.int32, device=device).unbind(0)
    chunks = -(-keys // CHUNK)
    held = torch.empty(lines * chunks, dtype=torch.int32, device=device)
    flags = chosen.contiguous().view(torch.uint8)
    _tally[(chunks, lines)](flags, held, keys, BLOCK=CHUNK, num_warps=4)
    _compact[(chunks, lines)](
        flags, held, held if limit is None else limit, draw, indices, kept, found, keys, capacity,
        heads, query_len, *([0] * 3 if limit is None else steps(limit, 0, 1, 2)),
        *steps(draw, 0, 1, 2), HAS_LIMIT=limit is not None, BLOCK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        SLOTS=min(1024, max(16, triton.next_power_of_2(capacity))), num_warps=16,
    )  # fmt: skip
    return indices, kept, found
