"""The attention kernel: one launch over ranges and selected keys, split along the keys.

A program takes the query heads that share a selection, one query row, and every ``splits``-th block
of keys. Blocks of ranges come first, then blocks of selected entries; the last program of a row to
finish joins the partial results. How many programs run is decided on the host from capacities
alone, so that nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from sah_core.inputs import Inputs
from sah_core.mask import KeyRange, Mask

MAX_RANGES = 4
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@triton.jit
def _span(start, stop, b, row, sb, sr, s_off, eb, er, e_off, low, high):
    first = tl.maximum(tl.load(start + b * sb + row * sr) + s_off, low)
    last = tl.minimum(tl.load(stop + b * eb + row * er) + e_off, high)
    return first, last


@triton.jit
def _outside(key, first, last):
    return tl.where((key >= first) & (key < last), -1, key)


@triton.jit
def _of_range(block, begin, end, first, last, LANES: tl.constexpr):
    key = first + (block - begin) * LANES + tl.arange(0, LANES)
    last = tl.minimum(last, first + (end - begin) * LANES)
    return tl.where((key >= first) & (key < last), key, -1)


@triton.jit(
    do_not_specialize=[
        "a_s_off", "a_e_off", "b_s_off", "b_e_off", "c_s_off", "c_e_off", "d_s_off", "d_e_off",
        "a_end", "b_end", "c_end", "d_end", "blocks", "key_len", "entries",
    ]
)  # fmt: skip
def _attend(
    query, key, value, output, lse, part, stats, tickets, sinks,
    indices, counts, chances, allow_start, allow_stop, origin,
    a_start, a_stop, b_start, b_stop, c_start, c_stop, d_start, d_stop,
    a_sb, a_sr, a_s_off, a_eb, a_er, a_e_off, a_end,
    b_sb, b_sr, b_s_off, b_eb, b_er, b_e_off, b_end,
    c_sb, c_sr, c_s_off, c_eb, c_er, c_e_off, c_end,
    d_sb, d_sr, d_s_off, d_eb, d_er, d_e_off, d_end,
    blocks, key_len, entries, query_len, tiles,
    q_sb, q_sh, q_sr, q_sd, k_sb, k_sh, k_sk, k_sd, v_sb, v_sh, v_sk, v_sd,
    o_sb, o_sr, o_sh, l_sb, l_sh, l_sr,
    i_sb, i_sh, i_sr, n_sb, n_sh, n_sr, p_sb, p_sh, p_sr,
    s_sb, s_sr, e_sb, e_sr, f_sb,
    scale, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SELECTION_TILES: tl.constexpr, LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, RANGES: tl.constexpr,
    HAS_SELECTED: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_CHANCE: tl.constexpr,
    HAS_ORIGIN: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr, ROW_BLOCK: tl.constexpr, ROW_PART: tl.constexpr,
    DIM_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, JOIN: tl.constexpr,
    PRECISION: tl.constexpr, LOG2E: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    tile = tl.program_id(1)
    b = (tl.program_id(2) // query_len).to(tl.int64)
    row = tl.program_id(2) % query_len
    head = tile * ROWS
    kv_head = head // GROUP

    low = tl.load(allow_start + b * s_sb + row * s_sr)
    high = tl.minimum(tl.load(allow_stop + b * e_sb + row * e_sr), key_len)
    low = tl.maximum(low, 0)
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
    range_blocks = 0
    if RANGES > 0:
        range_blocks = d_end
    limit = entries
    first_page = 0
    if HAS_SELECTED:
        chosen = tile // SELECTION_TILES
        indices += b * i_sb + chosen * i_sh + row * i_sr
        if HAS_COUNT:
            limit = tl.minimum(limit, tl.load(counts + b * n_sb + chosen * n_sh + row * n_sr))
        if HAS_CHANCE:
            chances += b * p_sb + chosen * p_sh + row * p_sr
        if HAS_ORIGIN:
            first_page = tl.load(origin + b * f_sb)

    member = tl.arange(0, ROW_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    value_dim = tl.arange(0, VALUE_BLOCK)
    lane = tl.arange(0, LANES)
    q = tl.load(
        query + b * q_sb + (head + member)[:, None] * q_sh + row * q_sr + dim[None, :] * q_sd,
        mask=(member < ROWS)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += b * k_sb + kv_head.to(tl.int64) * k_sh
    value += b * v_sb + kv_head.to(tl.int64) * v_sh

    top = tl.full([ROW_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([ROW_BLOCK], tl.float32)
    acc = tl.zeros([ROW_BLOCK, VALUE_BLOCK], tl.float32)
    for block in range(split, blocks, SPLITS):
        at = tl.full([LANES], -1, tl.int32)
        if HAS_SELECTED:
            flat = (block - range_blocks) * LANES + lane
            entry = flat // PAGE
            mine = (flat >= 0) & (entry < limit)
            picked = tl.load(indices + entry, mask=mine, other=-1)
            at = picked * PAGE + flat % PAGE + first_page
            at = tl.where((picked >= 0) & (at >= low) & (at < high), at, -1)
            if RANGES > 0:
                at = _outside(at, a_first, a_last)
            if RANGES > 1:
                at = _outside(at, b_first, b_last)
            if RANGES > 2:
                at = _outside(at, c_first, c_last)
            if RANGES > 3:
                at = _outside(at, d_first, d_last)
        # a block belongs to one part; of overlapping ranges the first counts a key
        if RANGES > 0:
            at = tl.maximum(at, _of_range(block, 0, a_end, a_first, a_last, LANES))
        if RANGES > 1:
            own = _of_range(block, a_end, b_end, b_first, b_last, LANES)
            at = tl.maximum(at, _outside(own, a_first, a_last))
        if RANGES > 2:
            own = _of_range(block, b_end, c_end, c_first, c_last, LANES)
            own = _outside(own, a_first, a_last)
            at = tl.maximum(at, _outside(own, b_first, b_last))
        if RANGES > 3:
            own = _of_range(block, c_end, d_end, d_first, d_last, LANES)
            own = _outside(_outside(own, a_first, a_last), b_first, b_last)
            at = tl.maximum(at, _outside(own, c_first, c_last))
        valid = at >= 0
        where = tl.maximum(at, 0).to(tl.int64)
        if HEAD_DIM == DIM_BLOCK:
            k = tl.load(
                key + where[:, None] * k_sk + dim[None, :] * k_sd, mask=valid[:, None], other=0.0
            )
        else:
            k = tl.load(
                key + where[:, None] * k_sk + dim[None, :] * k_sd,
                mask=valid[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
        if VALUE_DIM == VALUE_BLOCK:
            v = tl.load(
                value + where[:, None] * v_sk + value_dim[None, :] * v_sd,
                mask=valid[:, None],
                other=0.0,
            )
        else:
            v = tl.load(
                value + where[:, None] * v_sk + value_dim[None, :] * v_sd,
                mask=valid[:, None] & (value_dim < VALUE_DIM)[None, :],
                other=0.0,
            )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (e^2x + 1)
            logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2E / softcap)) + 1.0)
        logits *= LOG2E
        if HAS_CHANCE:
            chance = tl.load(chances + entry, mask=mine, other=1.0)
            valid = valid & (chance > 0)
            logits -= tl.log2(tl.where(chance > 0, chance, 1.0))[None, :]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        fresh = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(fresh == float("-inf"), 0.0, fresh)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = fresh

    place = tl.program_id(2) * tiles + tile
    done = True
    if SPLITS > 1:
        slot = place * SPLITS + split
        present = member < ROWS
        tl.store(stats + slot * 2 * ROWS + member, top, mask=present)
        tl.store(stats + slot * 2 * ROWS + ROWS + member, total, mask=present)
        tl.store(
            part + (slot.to(tl.int64) * ROWS + member)[:, None] * VALUE_DIM + value_dim[None, :],
            acc,
            mask=present[:, None] & (value_dim < VALUE_DIM)[None, :],
        )
        # every thread's partial results must be written before the ticket says so
        tl.debug_barrier()
        done = tl.atomic_add(tickets + place, 1, sem="acq_rel") == SPLITS - 1
    if done:
        if SPLITS > 1:
            tl.store(tickets + place, 0)
            part_row = tl.arange(0, ROW_PART)
            here = part_row < ROWS
            every = tl.arange(0, SPLITS)
            spot = (place * SPLITS + every)[:, None] * 2 * ROWS + part_row[None, :]
            tops = tl.load(
                stats + spot, mask=here[None, :], other=float("-inf"), cache_modifier=".cg"
            )
            totals = tl.load(
                stats + spot + ROWS, mask=here[None, :], other=0.0, cache_modifier=".cg"
            )
            best = tl.max(tops, 0)
            shift_part = tl.where(best == float("-inf"), 0.0, best)
            whole = tl.sum(totals * tl.exp2(tops - shift_part[None, :]), 0)
            joined = tl.zeros([ROW_PART, VALUE_BLOCK], tl.float32)
            for begin in tl.static_range(0, SPLITS, JOIN):
                some = place * SPLITS + begin + tl.arange(0, JOIN)
                tops_some = tl.load(
                    stats + some[:, None] * 2 * ROWS + part_row[None, :],
                    mask=here[None, :],
                    other=float("-inf"),
                    cache_modifier=".cg",
                )
                share = tl.exp2(tops_some - shift_part[None, :])
                line = (some.to(tl.int64)[:, None] * ROWS + part_row[None, :]) * VALUE_DIM
                pieces = tl.load(
                    part + line[:, :, None] + value_dim[None, None, :],
                    mask=here[None, :, None] & (value_dim < VALUE_DIM)[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                joined += tl.sum(pieces * share[:, :, None], 0)
            _finish(
                output, lse, sinks, best, whole, joined, part_row, value_dim, head, b, row,
                o_sb, o_sr, o_sh, l_sb, l_sh, l_sr, ROWS, VALUE_DIM, HAS_SINKS, LOG2E, LN2,
            )  # fmt: skip
        else:
            _finish(
                output, lse, sinks, top, total, acc, member, value_dim, head, b, row,
                o_sb, o_sr, o_sh, l_sb, l_sh, l_sr, ROWS, VALUE_DIM, HAS_SINKS, LOG2E, LN2,
            )  # fmt: skip


@triton.jit
def _finish(
    output, lse, sinks, top, total, acc, member, value_dim, head, b, row,
    o_sb, o_sr, o_sh, l_sb, l_sh, l_sr,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
    LOG2E: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    present = member < ROWS
    if HAS_SINKS:
        sink = tl.load(sinks + head + member, mask=present, other=0.0).to(tl.float32) * LOG2E
        best = tl.maximum(top, sink)
        fade = tl.exp2(top - best)
        total = total * fade + tl.exp2(sink - best)
        acc = acc * fade[:, None]
        top = best
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        output + b * o_sb + row * o_sr + (head + member)[:, None] * o_sh + value_dim[None, :],
        acc.to(output.dtype.element_ty),
        mask=present[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
    level = tl.where(
        total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf")
    )
    tl.store(lse + b * l_sb + (head + member) * l_sh + row * l_sr, level, mask=present)


@attrs.frozen
class Plan:
    """How a call is cut up.

    Attributes:
        lanes: Keys per block.
        splits: Programs per row of a tile, a power of two.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """

    lanes: int
    splits: int
    warps: int
    stages: int


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def plan_for(keys: int, tiles: int, dims: int, itemsize: int, units: int) -> Plan:
    """Cut a call up by its capacities.

    Args:
        keys: Keys per row at most.
        tiles: Rows times head tiles.
        dims: The larger of the padded key and value channels.
        itemsize: Bytes per element.
        units: Multiprocessors.
    """
    wanted = max(1, 2 * units // tiles)
    # the few rows of a decode step wait for memory: larger blocks have more loads under way
    wide = tiles <= units and dims * itemsize <= 256 and keys >= 128 * min(wanted, 64)
    lanes = 64 if wide else 32 if dims * itemsize <= 512 else 16
    blocks = max(1, -(-keys // lanes))
    splits = 1
    while splits * 2 <= min(wanted, blocks, 64):
        splits *= 2
    if blocks <= splits:
        return Plan(lanes, splits, warps=2, stages=1)
    # an index, the key that it names and the next index are under way at once
    return Plan(lanes, splits, warps=2, stages=3) if wide else Plan(lanes, splits, 4, 5)


class Tickets:
    """Counters that the kernel leaves at zero; each call takes its own, so calls may overlap."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.size = size
        self.pools: dict[torch.device, tuple[Tensor, int]] = {}

    def take(self, count: int, device: torch.device) -> Tensor:
        """That many zeroed int32 counters."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if count > self.size or (capturing and device not in self.pools):
            return torch.zeros(count, dtype=torch.int32, device=device)
        if device not in self.pools:
            self.pools[device] = (torch.zeros(self.size, dtype=torch.int32, device=device), 0)
        pool, used = self.pools[device]
        begin = used if used + count <= self.size else 0
        self.pools[device] = (pool, begin + count)
        return pool[begin : begin + count]


TICKETS = Tickets()


def join_size(splits: int, size: int) -> int:
    """Partial results joined at once, so that they fit into registers."""
    return max(1, min(splits, 8192 // size))


def steps(tensor: Tensor, *dims: int) -> list[int]:
    """Strides of some dimensions, 0 where the dimension is broadcast."""
    return [0 if tensor.shape[d] == 1 else tensor.stride(d) for d in dims]


def range_arguments(
    ranges: tuple[KeyRange, ...], dummy: Tensor, lanes: int
) -> tuple[list[Tensor], list[int], int]:
    """Pointers, then numbers, of `MAX_RANGES` ranges for the kernel, and their blocks in all."""
    pointers: list[Tensor] = []
    numbers: list[int] = []
    end = 0
    for index in range(MAX_RANGES):
        if index >= len(ranges):
            pointers += [dummy, dummy]
            numbers += [0, 0, 0, 0, 0, 0, end]
            continue
        part = ranges[index]
        end += -(-part.capacity // lanes)
        pointers += [part.start_base, part.stop_base]
        numbers += [*steps(part.start_base, 0, 2), part.start_offset]
        numbers += [*steps(part.stop_base, 0, 2), part.stop_offset, end]
    return pointers, numbers, end


def attend(inputs: Inputs, mask: Mask, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Attention over the ranges and the selected keys of a mask; see `sah_core.Backend.attend`."""
    query, key, value, allowed = inputs.query, inputs.key, inputs.value, inputs.allowed
    batch, heads, query_len, head_dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    group = heads // kv_heads
    selected = mask.selected
    rows = group if selected is None else min(group, heads // selected.heads)
    tiles = heads // rows
    keys = sum(part.capacity for part in mask.ranges)
    if selected is not None:
        keys += selected.capacity * selected.page_size
    dim_block = max(16, triton.next_power_of_2(head_dim))
    value_block = max(16, triton.next_power_of_2(value_dim))
    places = tiles * batch * query_len
    if plan is None:
        units = processors(query.device)
        plan = plan_for(keys, places, max(dim_block, value_block), query.element_size(), units)
    pointers, numbers, blocks = range_arguments(mask.ranges, allowed.start, plan.lanes)
    dummy = allowed.start
    counts = chances = origin = None
    if selected is None:
        indices, entries, page = dummy, 0, 1
        selected_steps = [0] * 9
    else:
        indices, entries, page = selected.indices, selected.capacity, selected.page_size
        indices = indices if indices.stride(3) == 1 else indices.contiguous()
        counts, chances = selected.count, selected.probability
        origin = selected.origin if page > 1 else None
        if chances is not None and chances.stride(3) != 1:
            chances = chances.contiguous()
        blocks += -(-entries * page // plan.lanes)
        selected_steps = steps(indices, 0, 1, 2)
        selected_steps += [0] * 3 if counts is None else steps(counts, 0, 1, 2)
        selected_steps += [0] * 3 if chances is None else steps(chances, 0, 1, 2)
    output = torch.empty(
        (batch, query_len, heads, value_dim), dtype=query.dtype, device=query.device
    )
    lse = torch.empty((batch, heads, query_len), dtype=torch.float32, device=query.device)
    part = stats = lse
    tickets = dummy
    if plan.splits > 1:
        slots = places * plan.splits * rows
        room = torch.empty(slots * (value_dim + 2), dtype=torch.float32, device=query.device)
        part, stats = room[: slots * value_dim], room[slots * value_dim :]
        tickets = TICKETS.take(places, query.device)
    sinks = inputs.sinks
    _attend[(plan.splits, tiles, batch * query_len)](
        query, key, value, output, lse, part, stats, tickets,
        dummy if sinks is None else sinks,
        indices,
        dummy if counts is None else counts,
        dummy if chances is None else chances,
        allowed.start, allowed.stop,
        dummy if origin is None else origin,
        *pointers, *numbers,
        blocks, inputs.capacity, entries, query_len, tiles,
        *query.stride(), *key.stride(), *value.stride(), *output.stride()[:3], *lse.stride(),
        *selected_steps,
        *steps(allowed.start, 0, 2), *steps(allowed.stop, 0, 2),
        0 if origin is None else steps(origin, 0)[0],
        inputs.scaling, 1.0 if inputs.softcap is None else inputs.softcap,
        GROUP=group, ROWS=rows,
        SELECTION_TILES=1 if selected is None else max(1, tiles // selected.heads),
        LANES=plan.lanes, HEAD_DIM=head_dim, VALUE_DIM=value_dim, PAGE=page,
        RANGES=len(mask.ranges), HAS_SELECTED=selected is not None, HAS_COUNT=counts is not None,
        HAS_CHANCE=chances is not None, HAS_ORIGIN=origin is not None,
        HAS_SINKS=sinks is not None, HAS_CAP=inputs.softcap is not None,
        SPLITS=plan.splits, ROW_BLOCK=max(16, triton.next_power_of_2(rows)),
        ROW_PART=triton.next_power_of_2(rows), DIM_BLOCK=dim_block, VALUE_BLOCK=value_block,
        JOIN=join_size(plan.splits, triton.next_power_of_2(rows) * value_block),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        LOG2E=LOG2E, LN2=LN2, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return output, lse
