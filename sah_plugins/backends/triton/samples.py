"""Kernels around samples: what earlier ranges leave, their keys, and moments of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.mask import KeyRange

from .attention import MAX_RANGES, _outside, _span, steps

BLOCK = 4096
"""Logits of a row that are looked at at once."""
SLOTS = 128
"""Keys of ranges per program."""


@triton.jit
def _both(a_first, a_last, b_first, b_last):
    return tl.maximum(a_first, b_first), tl.minimum(a_last, b_last)


@triton.jit
def _size(first, last):
    return tl.maximum(last - first, 0)


@triton.jit
def _common(a_first, a_last, b_first, b_last):
    first, last = _both(a_first, a_last, b_first, b_last)
    return _size(first, last)


@triton.jit
def _ranges(
    low, high, b, row, a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    RANGES: tl.constexpr,
):  # fmt: skip
    a_first, a_last = low, low
    b_first, b_last = low, low
    c_first, c_last = low, low
    d_first, d_last = low, low
    if RANGES > 0:
        a_first, a_last = _span(
            a_start, a_stop, b, row, a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, low, high
        )
    if RANGES > 1:
        b_first, b_last = _span(
            b_start, b_stop, b, row, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off, low, high
        )
    if RANGES > 2:
        c_first, c_last = _span(
            c_start, c_stop, b, row, c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, low, high
        )
    if RANGES > 3:
        d_first, d_last = _span(
            d_start, d_stop, b, row, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off, low, high
        )
    return a_first, a_last, b_first, b_last, c_first, c_last, d_first, d_last


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off"])  # fmt: skip
def _left(
    start, stop, counts, query_len, s_sb, s_sr, e_sb, e_sr,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    RANGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // query_len
    row = tl.program_id(0) % query_len
    low = tl.load(start + b * s_sb + row * s_sr)
    high = tl.load(stop + b * e_sb + row * e_sr)
    a_first, a_last, b_first, b_last, c_first, c_last, d_first, d_last = _ranges(
        low, high, b, row, a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        RANGES,
    )  # fmt: skip
    # inclusion and exclusion
    ab_first, ab_last = _both(a_first, a_last, b_first, b_last)
    cd_first, cd_last = _both(c_first, c_last, d_first, d_last)
    one = _size(a_first, a_last) + _size(b_first, b_last)
    one += _size(c_first, c_last) + _size(d_first, d_last)
    two = _size(ab_first, ab_last) + _size(cd_first, cd_last)
    two += _common(a_first, a_last, c_first, c_last) + _common(a_first, a_last, d_first, d_last)
    two += _common(b_first, b_last, c_first, c_last) + _common(b_first, b_last, d_first, d_last)
    three = _common(ab_first, ab_last, c_first, c_last)
    three += _common(ab_first, ab_last, d_first, d_last)
    three += _common(a_first, a_last, cd_first, cd_last)
    three += _common(b_first, b_last, cd_first, cd_last)
    four = _common(ab_first, ab_last, cd_first, cd_last)
    left = _size(low, high) - (one - two + three - four)
    tl.store(counts + tl.program_id(0), left.to(tl.int64))


@triton.jit(do_not_specialize=["a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off",
                               "d_s_off", "d_e_off", "a_end", "b_end", "c_end",
                               "entries"])  # fmt: skip
def _entries(
    start, stop, keys, entries, a_end, b_end, c_end, query_len, s_sb, s_sr, e_sb, e_sr,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
    RANGES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(1)
    b = line // query_len
    row = line % query_len
    low = tl.load(start + b * s_sb + row * s_sr)
    high = tl.load(stop + b * e_sb + row * e_sr)
    a_first, a_last, b_first, b_last, c_first, c_last, d_first, d_last = _ranges(
        low, high, b, row, a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
        a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off,
        c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off,
        RANGES,
    )  # fmt: skip
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    at = a_first + slot
    at = tl.where((slot < a_end) & (at < a_last), at, -1)
    own = b_first + slot - a_end
    own = tl.where((slot >= a_end) & (slot < b_end) & (own < b_last), own, -1)
    at = tl.maximum(at, _outside(own, a_first, a_last))
    own = c_first + slot - b_end
    own = tl.where((slot >= b_end) & (slot < c_end) & (own < c_last), own, -1)
    own = _outside(own, a_first, a_last)
    at = tl.maximum(at, _outside(own, b_first, b_last))
    own = d_first + slot - c_end
    own = tl.where((slot >= c_end) & (own < d_last), own, -1)
    own = _outside(_outside(own, a_first, a_last), b_first, b_last)
    at = tl.maximum(at, _outside(own, c_first, c_last))
    tl.store(keys + line * entries + slot, at, mask=slot < entries)


@triton.jit(do_not_specialize=["drawn_len", "sure_len"])
def _moments(
    drawn, sure, chance, sinks, tops, moments, heads, query_len, lines, drawn_len, sure_len,
    HAS_CHANCE: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK: tl.constexpr, SURE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    spot = tl.arange(0, SURE)
    drawn += line.to(tl.int64) * drawn_len
    sure += line.to(tl.int64) * sure_len
    chance += line.to(tl.int64) * sure_len
    # no row is without a finite top
    peak = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    for begin in range(0, drawn_len, BLOCK):
        at = begin + lane
        peak = tl.maximum(peak, tl.load(drawn + at, mask=at < drawn_len, other=float("-inf")))
    top = tl.max(peak)
    peak = tl.full([SURE], -3.4028234663852886e38, tl.float32)
    for begin in range(0, sure_len, SURE):
        at = begin + spot
        peak = tl.maximum(peak, tl.load(sure + at, mask=at < sure_len, other=float("-inf")))
    top = tl.maximum(top, tl.max(peak))
    held = tl.zeros([SURE], tl.float64)
    if HAS_SINKS:
        sink = tl.load(sinks + (line // query_len) % heads).to(tl.float32)
        top = tl.maximum(top, sink)
        only = tl.where(spot == 0, tl.exp(sink - top), 0.0)
        held += only.to(tl.float64)
    for begin in range(0, sure_len, SURE):
        at = begin + spot
        weight = tl.exp(tl.load(sure + at, mask=at < sure_len, other=float("-inf")) - top)
        if HAS_CHANCE:
            weight = weight / tl.load(chance + at, mask=at < sure_len, other=1.0)
        held += weight.to(tl.float64)
    first = tl.zeros([BLOCK], tl.float64)
    there = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, drawn_len, BLOCK):
        at = begin + lane
        logit = tl.load(drawn + at, mask=at < drawn_len, other=float("-inf"))
        first += tl.exp(logit - top).to(tl.float64)
        there += (logit > float("-inf")).to(tl.float64)
    total = tl.sum(first)
    count = tl.sum(there)
    mean = total / tl.where(count > 0.0, count, 1.0)
    second = tl.zeros([BLOCK], tl.float64)
    fourth = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, drawn_len, BLOCK):
        at = begin + lane
        logit = tl.load(drawn + at, mask=at < drawn_len, other=float("-inf"))
        off = tl.where(logit > float("-inf"), tl.exp(logit - top).to(tl.float64) - mean, 0.0)
        square = off * off
        second += square
        fourth += square * square
    tl.store(tops + line, top)
    tl.store(moments + line, tl.sum(held))
    tl.store(moments + lines + line, total)
    tl.store(moments + 2 * lines + line, tl.sum(second))
    tl.store(moments + 3 * lines + line, tl.sum(fourth))


def range_arguments(ranges: Sequence[KeyRange], dummy: Tensor) -> tuple[list[Tensor], list[int]]:
    """Pointers, then numbers, of `MAX_RANGES` ranges."""
    pointers: list[Tensor] = []
    numbers: list[int] = []
    for part in ranges:
        pointers += [part.start_base, part.stop_base]
        numbers += [*steps(part.start_base, 0, 2), part.start_offset]
        numbers += [*steps(part.stop_base, 0, 2), part.stop_offset]
    missing = MAX_RANGES - len(ranges)
    return pointers + [dummy, dummy] * missing, numbers + [0] * (6 * missing)


def _lead(ranges: Sequence[KeyRange], allowed: Allowed) -> tuple[int, int]:
    """Sequences and rows that limits and ranges tell apart."""
    bounds = [allowed.start, allowed.stop]
    bounds += [t for part in ranges for t in (part.start_base, part.stop_base)]
    return max(t.shape[0] for t in bounds), max(t.shape[2] for t in bounds)


def residual_count(ranges: Sequence[KeyRange], allowed: Allowed) -> Tensor:
    """See `sah_core.ops.Ops.residual_count`."""
    start, stop = allowed.start, allowed.stop
    batch, rows = _lead(ranges, allowed)
    counts = torch.empty((batch, 1, rows), dtype=torch.int64, device=start.device)
    pointers, numbers = range_arguments(ranges, start)
    _left[(batch * rows,)](
        start, stop, counts, rows, *steps(start, 0, 2), *steps(stop, 0, 2), *pointers, *numbers,
        RANGES=len(ranges), num_warps=1,
    )  # fmt: skip
    return counts


def range_entries(ranges: Sequence[KeyRange], allowed: Allowed, key_len: int) -> Tensor:
    """See `sah_core.ops.Ops.range_entries`."""
    start, stop = allowed.start, allowed.stop
    batch, rows = _lead(ranges, allowed)
    ends = [0]
    for part in ranges:
        ends.append(ends[-1] + min(part.capacity, key_len))
    ends += [ends[-1]] * (MAX_RANGES - len(ranges))
    keys = torch.empty((batch, 1, rows, ends[-1]), dtype=torch.int32, device=start.device)
    pointers, numbers = range_arguments(ranges, start)
    _entries[(max(1, -(-ends[-1] // SLOTS)), batch * rows)](
        start, stop, keys, ends[-1], *ends[1:4], rows, *steps(start, 0, 2), *steps(stop, 0, 2),
        *pointers, *numbers, RANGES=len(ranges), SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
    return keys


def weight_moments(
    drawn: Tensor, sure: Tensor, chance: Tensor | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `sah_core.ops.Ops.weight_moments`."""
    batch, heads, query_len, count = drawn.shape
    lines = batch * heads * query_len
    top = torch.empty((batch, heads, query_len, 1), dtype=torch.float32, device=drawn.device)
    shape = (4, batch, heads, query_len)
    moments = torch.empty(shape, dtype=torch.float64, device=drawn.device)
    sure = sure.contiguous()
    chance = None if chance is None else chance.expand(sure.shape).contiguous()
    _moments[(lines,)](
        drawn.contiguous(), sure, sure if chance is None else chance,
        sure if sinks is None else sinks, top, moments, heads, query_len, lines, count,
        sure.shape[3], HAS_CHANCE=chance is not None, HAS_SINKS=sinks is not None,
        BLOCK=min(BLOCK, max(16, triton.next_power_of_2(count))),
        SURE=min(1024, max(16, triton.next_power_of_2(sure.shape[3]))), num_warps=8,
    )  # fmt: skip
    return top, moments
