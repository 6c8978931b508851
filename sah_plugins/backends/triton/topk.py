"""Exact top-k by radix select: no sort, no host sync, equal scores to the lower index.

Rows that fit into the registers of one program are done in one launch: the k-th largest score is
found by cutting the range of scores in three, then the chosen are written in index order. Longer
rows are cut into chunks: each launch finds eight bits more of the k-th largest score from
histograms of the chunks, which the last chunk of a row to finish adds up, and one launch writes.
Where few scores share the first 16 bits with the k-th largest, as they do unless many are equal or
nearly so, the launches for the other bits do nothing: the last one writes what is chosen for sure,
puts those few aside, and its last chunk of a row chooses among them. Scores of few levels need one
launch of the first kind, or two. Random scores are made in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from sah_core.mask import KeyRange

from .attention import TICKETS, steps

SHORT = 8192
CHUNK = 4096
MAX_TAKEN = 4
PART = 16
"""Histograms added up at once."""
SINGLE = 256
"""Scores of a chunk that are counted one by one at most."""
FEW = 2048
"""Scores of a row that are put aside at most; fewer in shorter rows."""


@triton.jit
def _hide(at, valid, start, stop, b, row, sb, sr, s_off, eb, er, e_off):
    first = tl.load(start + b * sb + row * sr) + s_off
    last = tl.load(stop + b * eb + row * er) + e_off
    return valid & ((at < first) | (at >= last))


@triton.jit
def _mixed(state, word):
    # SplitMix64, as `sah_core.randomness.mix` has it
    bits = (state ^ word.to(tl.int64).to(tl.uint64, bitcast=True)) + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _drawn(positions, firsts, at, b, head, row, r_sb, state):
    # the 23 random bits of `sah_core.randomness.Random.uniform`
    first = tl.load(firsts + b * r_sb)
    bits = _mixed(tl.cast(state, tl.int64).to(tl.uint64, bitcast=True), head)
    bits = _mixed(bits, tl.load(positions + row).to(tl.int64) - first)
    bits = _mixed(bits, at.to(tl.int64) - first)
    return (bits >> 41).to(tl.int32)


@triton.jit
def _ordered(score, valid):
    # unsigned integers in the order of the floats; 0 for what is no candidate
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    code = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(valid & (score > float("-inf")), code, 0)


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity",
                               "state"])  # fmt: skip
def _candidates(
    scores, start, stop, origin, positions, firsts, at, line, b, head, row, candidates,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_START: tl.constexpr, HAS_STOP: tl.constexpr,
    HAS_ORIGIN: tl.constexpr, KIND: tl.constexpr,
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
    if KIND == "random":
        level = _drawn(positions, firsts, at, b, head, row, r_sb, state)
        code = tl.where(valid, level + 1, 0).to(tl.uint32, bitcast=True)
    else:
        place = line.to(tl.int64) * candidates + at
        score = tl.load(scores + place, mask=valid, other=float("-inf"))
        if KIND == "levels":
            there = score > float("-inf")
            code = tl.where(there, tl.where(there, score, 0.0).to(tl.int32) + 1, 0)
            code = code.to(tl.uint32, bitcast=True)
        else:
            code = _ordered(score, valid)
    return code


@triton.jit
def _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT: tl.constexpr):
    wanted = capacity
    if HAS_COUNT:
        wanted = tl.minimum(wanted, tl.load(count + b * n_sb + head * n_sh + row * n_sr))
    return tl.maximum(wanted, 0)


@triton.jit
def _edge(code, wanted, reached):
    # the code that `wanted` of `reached` candidates or more have or surpass, and fewer surpass:
    # `wanted` or more reach `edge`, fewer reach `far`; what lies between is cut in three until
    # exactly those wanted reach `edge`, or until it is the one score at which they tie
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
    return edge


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity",
                               "state"])  # fmt: skip
def _select_short(
    scores, indices, chosen, count, start, stop, origin, positions, firsts,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = tl.arange(0, BLOCK)
    code = _candidates(
        scores, start, stop, origin, positions, firsts, at, line, b, head, row, candidates,
        a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
        PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN, KIND,
    )  # fmt: skip
    wanted = _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT)
    reached = tl.sum((code > 0).to(tl.int32))
    wanted = tl.minimum(wanted, reached)
    edge = _edge(code, wanted, reached)
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
                               "d_s_off", "d_e_off", "candidates", "capacity",
                               "state"])  # fmt: skip
def _narrow(
    scores, known, tallies, held, tickets, chosen, count, start, stop, origin, positions, firsts,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FEW: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    SHIFT: tl.constexpr = BITS - 8 - 8 * STEP
    known += line * 3
    tallies += line.to(tl.int64) * chunks * 256
    held += line * chunks * 2
    needed = True
    if STEP > 1:
        needed = tl.load(known + 2) > FEW
    if needed:
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        code = _candidates(
            scores, start, stop, origin, positions, firsts, at, line, b, head, row, candidates,
            a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
            a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
            c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
            s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
            PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN, KIND,
        )  # fmt: skip
        eligible = code > 0
        edge = tl.zeros([], tl.uint32)
        over = tl.zeros([], tl.int32)
        if STEP > 0:
            edge = tl.load(known).to(tl.uint32, bitcast=True)
            lead = code >> (SHIFT + 8)
            over = tl.sum((lead > (edge >> (SHIFT + 8))).to(tl.int32))
            eligible = eligible & (lead == (edge >> (SHIFT + 8)))
        digit = ((code >> SHIFT) & 255).to(tl.int32)
        bins = tl.arange(0, 256)
        own = tallies + chunk * 256
        if STEP == 0:
            tl.store(own + bins, tl.histogram(digit, 256, mask=eligible))
        else:
            # a histogram costs the same however few are counted; single additions do not
            if tl.sum(eligible.to(tl.int32)) > SINGLE:
                tl.store(own + bins, tl.histogram(digit, 256, mask=eligible))
            else:
                tl.store(own + bins, tl.zeros([256], tl.int32))
                tl.debug_barrier()
                tl.atomic_add(own + digit, 1, mask=eligible, sem="relaxed")
        tl.store(held + chunk * 2, over)
        # every thread's counts must be written before the ticket says so
        tl.debug_barrier()
        last = tl.atomic_add(tickets + line, 1, sem="acq_rel") == chunks - 1
        if last:
            tl.store(tickets + line, 0)
            every = tl.zeros([256], tl.int32)
            for begin in range(0, chunks, PART):
                part = begin + tl.arange(0, PART)
                every += tl.sum(_tally(tallies, part, chunks), 0)
            reach = tl.sum(every) - tl.cumsum(every, 0) + every
            if STEP == 0:
                missing = _wanted(count, b, head, row, capacity, n_sb, n_sh, n_sr, HAS_COUNT)
                missing = tl.minimum(missing, tl.sum(every))
                tl.store(chosen + line, missing)
            else:
                missing = tl.load(known + 1)
            best = tl.sum((reach >= missing).to(tl.int32)) - 1
            missing -= tl.sum(tl.where(bins > best, every, 0))
            edge += best.to(tl.uint32) << SHIFT
            level = tl.sum(tl.where(bins == best, every, 0))
            tl.store(known, edge.to(tl.int32, bitcast=True))
            tl.store(known + 1, missing)
            if STEP == 1:
                tl.store(known + 2, level)
            if (SHIFT == 0) | ((STEP == 1) & (level <= FEW)):
                # what the chunks before each one hold
                over_before = tl.zeros([], tl.int32)
                tied_before = tl.zeros([], tl.int32)
                for begin in range(0, chunks, PART):
                    part = begin + tl.arange(0, PART)
                    tile = _tally(tallies, part, chunks)
                    above = tl.load(
                        held + part * 2, mask=part < chunks, other=0, cache_modifier=".cg"
                    )
                    above += tl.sum(tl.where((bins > best)[None, :], tile, 0), 1)
                    tied = tl.sum(tl.where((bins == best)[None, :], tile, 0), 1)
                    # the counts are read by all before the first of them is overwritten
                    tl.debug_barrier()
                    ahead = over_before + tl.cumsum(above, 0) - above
                    tl.store(held + part * 2, ahead, mask=part < chunks)
                    ahead = tied_before + tl.cumsum(tied, 0) - tied
                    tl.store(held + part * 2 + 1, ahead, mask=part < chunks)
                    over_before += tl.sum(above)
                    tied_before += tl.sum(tied)


@triton.jit
def _tally(tallies, part, chunks):
    spot = part[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tl.load(tallies + spot, mask=(part < chunks)[:, None], other=0, cache_modifier=".cg")


@triton.jit
def _choose_aside(aside, indices, total, wanted, FEW: tl.constexpr):
    # the best of those put aside, which lie in the order of their indices
    spot = tl.arange(0, FEW)
    there = spot < total
    low = tl.load(aside + spot, mask=there, other=-1, cache_modifier=".cg")
    code = (low + 1).to(tl.uint32, bitcast=True)
    edge = _edge(code, wanted, total)
    over = code > edge
    level = code == edge
    running = tl.cumsum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    tied = running >> 16
    missing = wanted - tl.sum(over.to(tl.int32))
    take = over | (level & (tied <= missing))
    slot = (running & 0xFFFF) + tl.minimum(tied, missing) - 1
    at = tl.load(aside + FEW + spot, mask=there, other=-1, cache_modifier=".cg")
    tl.store(indices + slot, at, mask=take)


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "candidates", "capacity",
                               "state"])  # fmt: skip
def _write_long(
    scores, known, aside, held, tickets, chosen, count, start, stop, origin, positions, firsts,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    candidates, capacity, heads, query_len,
    n_sb, n_sh, n_sr, s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state, indices,
    PAGE: tl.constexpr, TAKEN: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_START: tl.constexpr,
    HAS_STOP: tl.constexpr, HAS_ORIGIN: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FEW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    code = _candidates(
        scores, start, stop, origin, positions, firsts, at, line, b, head, row, candidates,
        a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        s_sb, s_sh, s_sr, e_sb, e_sh, e_sr, f_sb, r_sb, state,
        PAGE, TAKEN, HAS_START, HAS_STOP, HAS_ORIGIN, KIND,
    )  # fmt: skip
    edge = tl.load(known + line * 3).to(tl.uint32, bitcast=True)
    missing = tl.load(known + line * 3 + 1)
    over_before = tl.load(held + (line * chunks + chunk) * 2)
    tied_before = tl.load(held + (line * chunks + chunk) * 2 + 1)
    few = tl.zeros([], tl.int32)
    below = tl.zeros([], tl.uint32)
    if BITS > 16:
        few += (tl.load(known + line * 3 + 2) <= FEW).to(tl.int32)
        # bits of the edge that are not known
        below += (few * ((1 << (BITS - 16)) - 1)).to(tl.uint32)
    over = code > (edge | below)
    level = (code | below) == (edge | below)
    running = tl.cumsum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    tied = tied_before + (running >> 16)
    # of those put aside none is taken here
    ties = missing * (1 - few)
    take = over | (level & (tied <= ties))
    slot = over_before + (running & 0xFFFF) + tl.minimum(tied, ties) - 1
    indices += line.to(tl.int64) * capacity
    tl.store(indices + slot, at, mask=take)
    if BITS > 16:
        aside += line.to(tl.int64) * 2 * FEW
        later = level & (tied <= few * FEW)
        tl.store(aside + tied - 1, (code & below).to(tl.int32), mask=later)
        tl.store(aside + FEW + tied - 1, at, mask=later)
    wanted = tl.load(chosen + line)
    for begin in range(chunk * SLOTS, capacity, chunks * SLOTS):
        rest = begin + tl.arange(0, SLOTS)
        tl.store(indices + rest, -1, mask=(rest >= wanted) & (rest < capacity))
    if few > 0:
        # every thread's part must be written before the ticket says so
        tl.debug_barrier()
        last = tl.atomic_add(tickets + line, 1, sem="acq_rel") == chunks - 1
        if last:
            tl.store(tickets + line, 0)
            total = tl.load(known + line * 3 + 2)
            _choose_aside(aside, indices + wanted - missing, total, missing, FEW)


@triton.jit(do_not_specialize=["state"])
def _row_numbers(
    numbers, positions, firsts, heads, query_len, lines, r_sb, state, BLOCK: tl.constexpr
):
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = line < lines
    row = line % query_len
    first = tl.load(firsts + (line // (query_len * heads)) * r_sb, mask=inside, other=0)
    place = tl.load(positions + row, mask=inside, other=0).to(tl.int64) - first
    bits = _mixed(tl.cast(state, tl.int64).to(tl.uint64, bitcast=True), (line // query_len) % heads)
    bits = _mixed(_mixed(bits, place), tl.zeros_like(place))
    number = ((bits >> 41).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    tl.store(numbers + line, number, mask=inside)


@triton.jit(do_not_specialize=["keys", "state"])
def _random_scores(
    scores, positions, firsts, heads, query_len, keys, r_sb, state, BLOCK: tl.constexpr
):
    line = tl.program_id(1)
    row = line % query_len
    head = (line // query_len) % heads
    b = line // (query_len * heads)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level = _drawn(positions, firsts, at, b, head, row, r_sb, state)
    score = (level.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    tl.store(scores + line.to(tl.int64) * keys + at, score, mask=at < keys)


@attrs.frozen(kw_only=True, eq=False)
class Draw:
    """Random numbers in the place of scores.

    Attributes:
        state: What they start from; see `sah_core.randomness.Random.state`.
        positions: Key index of every query row, int32 ``(1, query_len)``.
        first: First real key per sequence, int32 ``(batch | 1,)``.
    """

    state: int
    positions: Tensor
    first: Tensor


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
    levels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `sah_core.ops.Ops.masked_topk`."""
    limits = Limits(count, start, stop, taken, page_size, origin)
    kind, bits = "floats", 32
    if levels is not None and levels < 1 << 16:
        # 0 is what is no candidate
        kind, bits = "levels", 8 if levels < 1 << 8 else 16
    batch, heads, query_len, candidates = scores.shape
    shape = (batch, heads, query_len, candidates)
    return _select(scores.contiguous(), shape, capacity, limits, kind, bits, None)


def random_topk(
    draw: Draw,
    shape: tuple[int, int, int, int],
    capacity: int,
    *,
    count: Tensor | None = None,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    taken: Sequence[KeyRange] = (),
) -> tuple[Tensor, Tensor]:
    """See `sah_core.ops.Ops.random_topk`; the numbers are made where they are compared, and never
    written.
    """
    limits = Limits(count, start, stop, taken)
    return _select(draw.first, shape, capacity, limits, "random", 24, draw)


def random_scores(draw: Draw, shape: tuple[int, int, int, int]) -> Tensor:
    """See `sah_core.ops.Ops.random_scores`."""
    batch, heads, query_len, keys = shape
    scores = torch.empty(shape, dtype=torch.float32, device=draw.first.device)
    _random_scores[(-(-keys // 1024), batch * heads * query_len)](
        scores, draw.positions, draw.first, heads, query_len, keys,
        steps(draw.first, 0)[0], draw.state, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return scores


def row_numbers(draw: Draw, heads: int) -> Tensor:
    """See `sah_core.ops.Ops.row_numbers`."""
    shape = (draw.first.shape[0], heads, draw.positions.shape[1], 1)
    numbers = torch.empty(shape, dtype=torch.float32, device=draw.first.device)
    lines = numbers.numel()
    _row_numbers[(-(-lines // 128),)](
        numbers, draw.positions, draw.first, heads, shape[2], lines, steps(draw.first, 0)[0],
        draw.state, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return numbers


@attrs.frozen(eq=False)
class Limits:
    """What may be chosen; see `sah_core.ops.Ops.masked_topk`."""

    count: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    taken: Sequence[KeyRange] = ()
    page_size: int = 1
    origin: Tensor | None = None


def _strides(tensor: Tensor | None) -> list[int]:
    """Strides over batch, heads and rows of an optional limit, 0 where it is broadcast."""
    return [0, 0, 0] if tensor is None else steps(tensor, 0, 1, 2)


def _select(
    scores: Tensor,
    shape: tuple[int, int, int, int],
    capacity: int,
    limits: Limits,
    kind: str,
    bits: int,
    draw: Draw | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, query_len, candidates = shape
    device = scores.device
    lines = batch * heads * query_len
    indices = torch.empty((batch, heads, query_len, capacity), dtype=torch.int32, device=device)
    chosen = torch.empty((batch, heads, query_len), dtype=torch.int32, device=device)
    pointers: list[Tensor] = []
    numbers: list[int] = []
    for index in range(MAX_TAKEN):
        if index >= len(limits.taken):
            pointers += [chosen, chosen]
            numbers += [0] * 6
            continue
        part = limits.taken[index]
        pointers += [part.start_base, part.stop_base]
        numbers += [*steps(part.start_base, 0, 2), part.start_offset]
        numbers += [*steps(part.stop_base, 0, 2), part.stop_offset]
    count, start, stop, origin = limits.count, limits.start, limits.stop, limits.origin
    optional = [chosen if t is None else t for t in (count, start, stop, origin)]
    optional += [chosen, chosen] if draw is None else [draw.positions, draw.first]
    tail = [
        *optional, *pointers, *numbers, candidates, capacity, heads, query_len,
        *_strides(count), *_strides(start), *_strides(stop),
        0 if origin is None else steps(origin, 0)[0],
        0 if draw is None else steps(draw.first, 0)[0],
        0 if draw is None else draw.state,
    ]  # fmt: skip
    facts = {
        "PAGE": limits.page_size,
        "TAKEN": len(limits.taken),
        "HAS_COUNT": count is not None,
        "HAS_START": start is not None,
        "HAS_STOP": stop is not None,
        "HAS_ORIGIN": origin is not None,
        "KIND": kind,
    }
    slots = min(1024, max(16, triton.next_power_of_2(capacity)))
    if candidates <= SHORT:
        block = max(16, triton.next_power_of_2(candidates))
        warps = min(8, max(1, block // 256))
        _select_short[(lines,)](
            scores, indices, chosen, *tail, **facts, BLOCK=block, SLOTS=slots, num_warps=warps
        )
        return indices, chosen
    chunks = -(-candidates // CHUNK)
    few = min(FEW, max(16, triton.next_power_of_2(candidates) // 64))
    sizes = [lines * chunks * 256, lines * chunks * 2, lines * 3, lines * 2 * few]
    room = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    tallies, held, known, aside = room.split(sizes)
    tickets = TICKETS.take(lines, device)
    facts |= {"BITS": bits, "BLOCK": CHUNK, "FEW": few}
    part = min(PART, triton.next_power_of_2(chunks))
    for step in range(bits // 8):
        _narrow[(chunks, lines)](
            scores, known, tallies, held, tickets, chosen, *tail, **facts,
            STEP=step, PART=part, SINGLE=SINGLE, num_warps=4,
        )  # fmt: skip
    _write_long[(chunks, lines)](
        scores, known, aside, held, tickets, chosen, *tail, indices, **facts,
        SLOTS=slots, num_warps=8,
    )  # fmt: skip
    return indices, chosen
