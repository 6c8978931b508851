"""Kernels for packed codes: label caches (Double Sparsity) and signatures (HashAttention).

A scoring program reads the words of a block of keys once, as they lie in memory, and unpacks them
in registers. What the query heads of a KV group share is reduced before anything is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Keys per program."""
LINES = 16
"""Most query rows (of all heads that score one set of labels) per program."""


@triton.jit
def _joined(sofar, fresh, REDUCTION: tl.constexpr):
    if REDUCTION == "max":
        return tl.maximum(sofar, fresh)
    return sofar + fresh


@triton.jit
def _shared(joined, SHARE: tl.constexpr, REDUCTION: tl.constexpr):
    if REDUCTION == "mean":
        # rounded as a division is: equal scores stay equal to those of the reference
        return tl.math.div_rn(joined, tl.full(joined.shape, SHARE, tl.float32))
    return joined


@triton.jit(do_not_specialize=["keys"])
def _label_scores(
    rows, labels, affine, scores, groups, lines, keys,
    l_sb, l_sh, l_sk, a_sb, a_sh, a_sk, a_si, scale,
    TILE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr,
    OWN_LABELS: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = at < keys
    present = line < lines
    place = at.to(tl.int64)
    joined = tl.zeros([TILE, BLOCK], tl.float32)
    if REDUCTION == "max":
        joined -= float("inf")
    for member in tl.static_range(SHARE):
        head = group.to(tl.int64)
        if OWN_LABELS:
            head = head * SHARE + member
        spot = b * a_sb + head * a_sh + place * a_sk
        step = tl.load(affine + spot, mask=inside, other=0.0).to(tl.float32)
        least = tl.load(affine + spot + a_si, mask=inside, other=0.0).to(tl.float32)
        words = labels + b * l_sb + head * l_sh + place * l_sk
        own = rows + ((b * groups + group) * SHARE + member) * lines * COUNT + line * COUNT
        score = tl.zeros([TILE, BLOCK], tl.float32)
        whole = tl.zeros([TILE], tl.float32)
        word = tl.zeros([BLOCK], tl.int32)
        for channel in tl.static_range(COUNT):
            if channel * WIDTH % 32 == 0:
                word = tl.load(words + channel * WIDTH // 32, mask=inside, other=0)
            code = (word >> (channel * WIDTH % 32)) & ((1 << WIDTH) - 1)
            # 2^23 + code, as the bits of a float: conversions run at a quarter of the speed
            value = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            weight = tl.load(own + channel, mask=present, other=0.0)
            score += weight[:, None] * value[None, :]
            whole += weight
        score = score * step[None, :] + whole[:, None] * least[None, :]
        joined = _joined(joined, score, REDUCTION)
    out = scores + ((b * groups + group) * lines + line)[:, None] * keys + at[None, :]
    # scaled after the sums, so that keys of equal products stay equal
    joined = _shared(joined, SHARE, REDUCTION) * scale
    tl.store(out, joined, mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["keys"])
def _hamming_scores(
    query, key, scores, groups, lines, keys, k_sb, k_sh, k_sk, k_sw, bits,
    TILE: tl.constexpr, WORDS: tl.constexpr, SHARE: tl.constexpr, OWN_KEYS: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = at < keys
    present = line < lines
    place = at.to(tl.int64)
    joined = tl.zeros([TILE, BLOCK], tl.int32)
    for member in tl.static_range(SHARE):
        head = group.to(tl.int64)
        if OWN_KEYS:
            head = head * SHARE + member
        signature = key + b * k_sb + head * k_sh + place * k_sk
        own = query + ((b * groups + group) * SHARE + member) * lines * WORDS + line * WORDS
        agree = tl.zeros([TILE, BLOCK], tl.int32) + bits
        for word in tl.static_range(WORDS):
            mine = tl.load(own + word, mask=present, other=0)
            theirs = tl.load(signature + word * k_sw, mask=inside, other=0)
            agree -= _set_bits(mine[:, None] ^ theirs[None, :])
        joined = _joined(joined, agree, REDUCTION)
    out = scores + ((b * groups + group) * lines + line)[:, None] * keys + at[None, :]
    shared = _shared(joined.to(tl.float32), SHARE, REDUCTION)
    tl.store(out, shared, mask=present[:, None] & inside[None, :])


@triton.jit
def _set_bits(words):
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


@triton.jit
def _nearest(value, TYPE: tl.constexpr):
    # rounded to a type, ties to even, also where the interpreter would cut bfloat16 off
    if TYPE == tl.bfloat16:  # noqa: SIM300  (a constexpr compares from the left)
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return value.to(TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["start", "new"])
def _label_update(
    labels, affine, key, channels, start, new, heads, per_list, per_kv_head,
    l_sb, l_sh, l_sk, l_sw, a_sb, a_sh, a_sk, a_si, k_sb, k_sh, k_sk, k_sd,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr, WORDS: tl.constexpr,
    WORD_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if ON_DEVICE:
        begin = tl.load(start)
    else:
        begin = tl.zeros([], tl.int32) + start
    PER_WORD: tl.constexpr = 32 // WIDTH
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    field = tl.arange(0, WORD_BLOCK * PER_WORD)
    held = (field < COUNT)[None, :]
    fits = at < new
    channel = tl.load(channels + head // per_list * COUNT + field, mask=field < COUNT, other=0)
    value = tl.load(
        key + b * k_sb + head // per_kv_head * k_sh + at.to(tl.int64)[:, None] * k_sk
        + channel[None, :] * k_sd,
        mask=fits[:, None] & held,
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    least = tl.min(tl.where(held, value, float("inf")), 1)
    most = tl.max(tl.where(held, value, float("-inf")), 1)
    step = tl.math.div_rn(most - least, tl.full([BLOCK], LEVELS, tl.float32))
    # the codes are those of the step as it is kept
    step = _nearest(step, affine.dtype.element_ty)
    step = tl.where(step > 0, step, 1.0)
    code = tl.math.div_rn(value - least[:, None], tl.broadcast_to(step[:, None], value.shape))
    # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    code = (code + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)
    code = tl.reshape(tl.where(held, code, 0), (BLOCK, WORD_BLOCK, PER_WORD))
    # fields do not overlap, so that the sum is their union
    packed = tl.sum(code << (tl.arange(0, PER_WORD) * WIDTH)[None, None, :], 2)
    word = tl.arange(0, WORD_BLOCK)
    place = (begin + at).to(tl.int64)
    tl.store(
        labels + b * l_sb + head * l_sh + place[:, None] * l_sk + word[None, :] * l_sw,
        packed,
        mask=fits[:, None] & (word < WORDS)[None, :],
    )
    spot = affine + b * a_sb + head * a_sh + place * a_sk
    tl.store(spot, step.to(affine.dtype.element_ty), mask=fits)
    tl.store(spot + a_si, least.to(affine.dtype.element_ty), mask=fits)


def label_update(
    labels: Tensor,
    affine: Tensor,
    key: Tensor,
    channels: Tensor,
    start: int | Tensor,
    bits: int,
    width: int,
) -> None:
    """See `sah_core.ops.Ops.label_update`, for labels of less than 16 bits.

    Args:
        labels: Codes.
        affine: Step and minimum of each label.
        key: New keys.
        channels: Channels that a label holds.
        start: Key index of the first new key.
        bits: Bits per channel.
        width: Bits of a code's field.
    """
    batch, kv_heads, new, _ = key.shape
    if not new:
        return
    heads, words = labels.shape[1], labels.shape[3]
    lists, count = channels.shape
    word_block = triton.next_power_of_2(words)
    block = max(1, min(triton.next_power_of_2(new), 2048 // (word_block * 32 // width)))
    _label_update[(-(-new // block), batch * heads)](
        labels, affine, key, channels.contiguous(), start, new, heads, heads // lists,
        heads // kv_heads, *labels.stride(), *affine.stride(), *key.stride(),
        COUNT=count, WIDTH=width, LEVELS=2**bits - 1, WORDS=words, WORD_BLOCK=word_block,
        BLOCK=block, ON_DEVICE=not isinstance(start, int), num_warps=1 if block == 1 else 4,
    )  # fmt: skip


def label_scores(
    rows: Tensor,
    labels: Tensor,
    affine: Tensor,
    width: int,
    scale: float,
    kv_heads: int,
    reduction: str = "none",
) -> Tensor:
    """Scores of packed labels.

    Args:
        rows: What each query head multiplies its label's channels with, float32 ``(batch, heads,
            query_len, channels)``.
        labels: int32 ``(batch, label_heads, key_len, words)``; see `Ops.label_update`.
        affine: Step and minimum ``(batch, label_heads, key_len, 2)``.
        width: Bits of a code's field.
        scale: Factor on the scores.
        kv_heads: KV heads, of which the query heads form groups.
        reduction: As in `Ops.label_scores`.
    """
    batch, heads, query_len, count = rows.shape
    groups, lines, share, own = _grouping(heads, query_len, labels.shape[1], kv_heads, reduction)
    keys = labels.shape[2]
    shape = (batch, heads if reduction == "none" else kv_heads, query_len, keys)
    scores = torch.empty(shape, dtype=torch.float32, device=rows.device)
    if labels.stride(3) != 1:
        labels = labels.contiguous()
    tile = min(LINES, triton.next_power_of_2(lines))
    block = BLOCK if tile <= 4 else BLOCK // 4
    grid = (-(-keys // block), batch * groups, -(-lines // tile))
    _label_scores[grid](
        rows.contiguous(), labels, affine, scores, groups, lines, keys,
        *labels.stride()[:3], *affine.stride(), scale,
        TILE=tile, COUNT=count, WIDTH=width, SHARE=share, OWN_LABELS=own, REDUCTION=reduction,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return scores


def hamming_scores(
    query: Tensor, key: Tensor, bits: int, kv_heads: int, reduction: str = "none"
) -> Tensor:
    """See `sah_core.ops.Ops.hamming_scores`."""
    batch, heads, query_len, words = query.shape
    groups, lines, share, own = _grouping(heads, query_len, key.shape[1], kv_heads, reduction)
    keys = key.shape[2]
    shape = (batch, heads if reduction == "none" else kv_heads, query_len, keys)
    scores = torch.empty(shape, dtype=torch.float32, device=query.device)
    tile = min(LINES, triton.next_power_of_2(lines))
    block = BLOCK if tile <= 4 else BLOCK // 4
    grid = (-(-keys // block), batch * groups, -(-lines // tile))
    _hamming_scores[grid](
        query.contiguous(), key, scores, groups, lines, keys, *key.stride(), bits,
        TILE=tile, WORDS=words, SHARE=share, OWN_KEYS=own, REDUCTION=reduction, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return scores


def _grouping(
    heads: int, query_len: int, label_heads: int, kv_heads: int, reduction: str
) -> tuple[int, int, int, bool]:
    """How the rows lie: groups of rows, rows in each, heads that are reduced to one, and whether
    each of those has labels of its own.
    """
    if reduction == "none":
        return label_heads, heads // label_heads * query_len, 1, True
    return kv_heads, query_len, heads // kv_heads, label_heads != kv_heads
