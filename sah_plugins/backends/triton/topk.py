"""Exact top-k by radix select: no sort, no host sync, equal scores to the lower index.

Rows that fit into the registers of one program are done in one launch: the k-th largest score is
found by cutting the range of scores in three, then the chosen are written in index order. Longer
rows are cut into chunks: four launches find the k-th largest score eight bits at a time from
histograms, one counts what each chunk holds, one writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sah_core.mask import KeyRange

from .attention import steps

SHORT = 8192
CHUNK = 4096
MAX_TAKEN = 4
WORDS = 4 * 256 + 16
"""int32 words of scratch per row: four histograms, then what is known so far."""


@triton.jit
def _hide(at, valid, start, stop, b, row, sb, sr, s_off, eb, er, e_off):
    first = tl.load(start + b * sb + row * sr) + s_off
    last = tl.load(stop + b * eb + row * er) + e_off
    return valid & ((at < first) | (at >= last))


@triton.jit
def _ordered(score, valid):
    # unsigned integers in the order of the floats; 0 for what is no candidate
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    code = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(valid & (score > float("-inf")), code, 0)


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity"])  # fmt: skip
def _candidates(
    scores, start, stop, origin, at, line, b, head, row, candidates,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr,
    HAS_ORIGIN: tl.constexpr,
):  # fmt: skip
    zero = 0
    if HAS_ORIGIN:
        zero = tl.load(origin + b * f_sb)
    valid = at < candidates
    if HAS_START:
        # a limit before page 0 means page 0, so that rounding towards zero is rounding down
        first = tl.maximum(tl.load(start + b * s_sb + head * s_sh + row * s_sr) - zero, 0)
        valid = valid & (at >= first // PAGE)
    if HAS_STOP:
        last = tl.load(stop + b * e_sb + head * e_sh + row * e_sr) - zero
        if HAS_START:
            # limits that are empty inside a page hold no page
            last = tl.where(first < last, last, 0)
        valid = valid & (at < (tl.maximum(last, 0) + PAGE - 1) // PAGE)
    if TAKEN > 0:
        valid = _hide(at, valid, a_start, a_stop, b, row, a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off)
    if TAKEN > 1:
        valid = _hide(at, valid, b_start, b_stop, b, row, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off)
    if TAKEN > 2:
        valid = _hide(at, valid, c_start, c_stop, b, row, c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off)
    if TAKEN > 3:
        valid = _hide(at, valid, d_start, d_stop, b, row, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off)
    score = tl.load(scores + line.to(tl.int64) * candidates + at, mask=valid, other=float("-inf"))
    return _ordered(score, valid)


@triton.jit
def _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT: tl.constexpr):
    wanted = capacity
    if HAS_COUNT:
        wanted = tl.minimum(wanted, tl.load(count + b * n_sb + head * n_sh + row * n_sr))
    return tl.maximum(wanted, 0)


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity"])  # fmt: skip
def _select_short(
    scores, indices, chosen, count, start, stop, origin,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = tl.arange(0, BLOCK)
    code = _candidates(
        scores, start, stop, origin, at, line, b, head, row, candidates,
        a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN,
    )  # fmt: skip
    wanted = _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT)
    reached = tl.sum((code > 0).to(tl.int32))
    wanted = tl.minimum(wanted, reached)
    # `wanted` candidates or more reach `edge`, fewer reach `far`: cut what lies between in three
    # until exactly those wanted reach `edge`, or until it is the one score at which they tie
    far = tl.max(code) + 1
    edge = tl.where(wanted > 0, tl.min(tl.where(code > 0, code, 0xFFFFFFFF)), far)
    reached = tl.where(wanted > 0, reached, 0)
    while (reached > wanted) & (far - edge > 1):
        third = tl.maximum((far - edge) // 3, 1)
        one = edge + third
        two = tl.minimum(one + third, far)
        both = tl.sum((code >= one).to(tl.int32) + tl.where(code >= two, 1 << 16, 0))
        reach_one = both & 0xFFFF
        reach_two = both >> 16
        far = tl.where(reach_two >= wanted, far, tl.where(reach_one >= wanted, two, one))
        edge = tl.where(reach_two >= wanted, two, tl.where(reach_one >= wanted, one, edge))
        reached = tl.where(
            reach_two >= wanted, reach_two, tl.where(reach_one >= wanted, reach_one, reached)
        )
    over = code > edge
    level = code == edge
    packed = tl.cumsum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    tied = packed >> 16
    missing = wanted - tl.sum(over.to(tl.int32))
    take = over | (level & (tied <= missing))
    slot = (packed & 0xFFFF) + tl.minimum(tied, missing) - 1
    indices += line.to(tl.int64) * capacity
    tl.store(indices + slot, at, mask=take)
    tl.store(chosen + line, wanted)
    for begin in range(0, capacity, SLOTS):
        rest = begin + tl.arange(0, SLOTS)
        tl.store(indices + rest, -1, mask=(rest >= wanted) & (rest < capacity))


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity"])  # fmt: skip
def _narrow(
    scores, scratch, chosen, count, start, stop, origin,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = _candidates(
        scores, start, stop, origin, at, line, b, head, row, candidates,
        a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN,
    )  # fmt: skip
    scratch += line * WORDS
    known = scratch + 4 * 256
    eligible = code > 0
    edge = tl.zeros([], tl.uint32)
    if STEP > 0:
        edge = tl.load(known).to(tl.uint32, bitcast=True)
        eligible = eligible & ((code >> (32 - 8 * STEP)) == (edge >> (32 - 8 * STEP)))
    digit = ((code >> (24 - 8 * STEP)) & 255).to(tl.int32)
    seen = tl.histogram(digit, 256, mask=eligible)
    bins = tl.arange(0, 256)
    tl.atomic_add(scratch + STEP * 256 + bins, seen, mask=seen > 0, sem="relaxed")
    tl.debug_barrier()
    last = tl.atomic_add(known + 4 + STEP, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        held = tl.load(scratch + STEP * 256 + bins, cache_modifier=".cg")
        reach = tl.sum(held) - tl.cumsum(held, 0) + held
        if STEP == 0:
            missing = _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT)
            missing = tl.minimum(missing, tl.sum(held))
            tl.store(chosen + line, missing)
        else:
            missing = tl.load(known + 1)
        best = tl.sum((reach >= missing).to(tl.int32)) - 1
        missing -= tl.sum(tl.where(bins > best, held, 0))
        edge += best.to(tl.uint32) << (24 - 8 * STEP)
        tl.store(known, edge.to(tl.int32, bitcast=True))
        tl.store(known + 1, missing)


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity"])  # fmt: skip
def _write_long(
    scores, scratch, chosen, count, start, stop, origin,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb,
    indices, held,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WORDS: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    chunk = tl.program_id(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    code = _candidates(
        scores, start, stop, origin, at, line, b, head, row, candidates,
        a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN,
    )  # fmt: skip
    known = scratch + line * WORDS + 4 * 256
    edge = tl.load(known).to(tl.uint32, bitcast=True)
    over = code > edge
    level = code == edge
    packed = over.to(tl.int32) + (level.to(tl.int32) << 16)
    chunks = tl.num_programs(0)
    held += line * chunks
    if STEP == 0:
        tl.store(held + chunk, tl.sum(packed))
    else:
        missing = tl.load(known + 1)
        every = tl.arange(0, CHUNKS)
        before = tl.load(held + every, mask=every < chunk, other=0)
        over_before = tl.sum(before & 0xFFFF)
        tied_before = tl.sum(before >> 16)
        running = tl.cumsum(packed, 0)
        tied = tied_before + (running >> 16)
        take = over | (level & (tied <= missing))
        slot = over_before + (running & 0xFFFF) + tl.minimum(tied, missing) - 1
        indices += line.to(tl.int64) * capacity
        tl.store(indices + slot, at, mask=take)
        wanted = tl.load(chosen + line)
        for begin in range(chunk * SLOTS, capacity, chunks * SLOTS):
            rest = begin + tl.arange(0, SLOTS)
            tl.store(indices + rest, -1, mask=(rest >= wanted) & (rest < capacity))


def limits(tensor: Tensor | None) -> list[int]:
    """Strides over batch, heads and rows of an optional limit, 0 where it is broadcast."""
    return [0, 0, 0] if tensor is None else steps(tensor, 0, 1, 2)


def masked_topk(
    scores: Tensor,
    capacity: int,
    *,
    count: Tensor | None = None,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    taken: Sequence[KeyRange] = (),
    page_size: int = 1,
    origin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `sah_core.ops.Ops.masked_topk`."""
    batch, heads, query_len, candidates = scores.shape
    scores = scores.contiguous()
    device = scores.device
    lines = batch * heads * query_len
    indices = torch.empty((batch, heads, query_len, capacity), dtype=torch.int32, device=device)
    chosen = torch.empty((batch, heads, query_len), dtype=torch.int32, device=device)
    pointers: list[Tensor] = []
    numbers: list[int] = []
    for index in range(MAX_TAKEN):
        if index >= len(taken):
            pointers += [chosen, chosen]
            numbers += [0] * 6
            continue
        part = taken[index]
        pointers += [part.start_base, part.stop_base]
        numbers += [*steps(part.start_base, 0, 2), part.start_offset]
        numbers += [*steps(part.stop_base, 0, 2), part.stop_offset]
    optional = [chosen if t is None else t for t in (count, start, stop, origin)]
    tail = [
        *pointers, *numbers, candidates, capacity, heads, query_len,
        *limits(count), *limits(start), *limits(stop),
        0 if origin is None else steps(origin, 0)[0],
    ]  # fmt: skip
    facts = {
        "PAGE": page_size,
        "TAKEN": len(taken),
        "HAS_COUNT": count is not None,
        "HAS_START": start is not None,
        "HAS_STOP": stop is not None,
        "HAS_ORIGIN": origin is not None,
    }
    slots = min(1024, max(16, triton.next_power_of_2(capacity)))
    if candidates <= SHORT:
        block = max(16, triton.next_power_of_2(candidates))
        warps = min(8, max(1, block // 256))
        _select_short[(lines,)](
            scores, indices, chosen, *optional, *tail, **facts,
            BLOCK=block, SLOTS=slots, num_warps=warps,
        )  # fmt: skip
        return indices, chosen
    chunks = -(-candidates // CHUNK)
    scratch = torch.zeros(lines * WORDS, dtype=torch.int32, device=device)
    held = torch.empty(lines * chunks, dtype=torch.int32, device=device)
    facts |= {"BLOCK": CHUNK, "WORDS": WORDS, "num_warps": 8}
    for step in range(4):
        _narrow[(chunks, lines)](scores, scratch, chosen, *optional, *tail, **facts, STEP=step)
    for step in range(2):
        _write_long[(chunks, lines)](
            scores, scratch, chosen, *optional, *tail, indices, held, **facts,
            STEP=step, CHUNKS=triton.next_power_of_2(chunks), SLOTS=slots,
        )  # fmt: skip
    return indices, chosen
