"""A kernel for dot products with chosen keys: their logits, or the cosines of their angles.

Reads the keys that the indices name, or what labels say of them, once for all query heads that
share a selection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E, steps

BLOCK = 64
"""Keys per program."""


@triton.jit(do_not_specialize=["entries"])
def _gathered(
    query, key, affine, indices, center, out, entries, query_len, tiles,
    q_sb, q_sh, q_sr, q_sd, k_sb, k_sh, k_sk, k_sd, a_sb, a_sh, a_sk, a_si, i_sb, i_sh, i_sr,
    c_sb, c_sh, scale, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SELECTION_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, COSINE: tl.constexpr,
    WIDTH: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_CAP: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) % query_len
    tile = (tl.program_id(1) // query_len) % tiles
    b = (tl.program_id(1) // (query_len * tiles)).to(tl.int64)
    head = tile * ROWS
    kv_head = (head // GROUP).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    inside = entry < entries
    picked = indices + b * i_sb + (tile // SELECTION_TILES) * i_sh + row * i_sr
    at = tl.load(picked + entry, mask=inside, other=-1)
    there = at >= 0
    place = tl.maximum(at, 0).to(tl.int64)
    mask = there[:, None] & (dim < HEAD_DIM)[None, :]
    key += b * k_sb + kv_head * k_sh
    if WIDTH == 0:
        spot = place[:, None] * k_sk + dim[None, :] * k_sd
        keys = tl.load(key + spot, mask=mask, other=0.0).to(tl.float32)
    else:
        spot = place[:, None] * k_sk + (dim * WIDTH // 32)[None, :] * k_sd
        code = tl.load(key + spot, mask=mask, other=0) >> (dim * WIDTH % 32)[None, :]
        affine += b * a_sb + kv_head * a_sh + place * a_sk
        step = tl.load(affine, mask=there, other=0.0).to(tl.float32)
        least = tl.load(affine + a_si, mask=there, other=0.0).to(tl.float32)
        keys = (code & ((1 << WIDTH) - 1)).to(tl.float32) * step[:, None] + least[:, None]
        keys = tl.where(mask, keys, 0.0)
    if HAS_CENTER:
        mean = tl.load(center + b * c_sb + kv_head * c_sh + dim, mask=dim < HEAD_DIM, other=0.0)
        keys -= mean[None, :]
    length = tl.zeros([BLOCK], tl.float32)
    if COSINE:
        length = tl.sqrt(tl.sum(keys * keys, 1))
    for member in tl.static_range(ROWS):
        mine = query + b * q_sb + (head + member) * q_sh + row * q_sr
        q = tl.load(mine + dim * q_sd, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        if COSINE:
            q = q / tl.maximum(tl.sqrt(tl.sum(q * q)), 1e-12)
        dot = tl.sum(keys * q[None, :], 1)
        if COSINE:
            dot = tl.where(length > 0, dot / tl.where(length > 0, length, 1.0), 0.0)
            dot = tl.minimum(tl.maximum(dot, -1.0), 1.0)
        else:
            # scaled after the sum, so that keys of equal products stay equal
            dot = dot * scale
            if HAS_CAP:
                dot = softcap - 2.0 * softcap / (tl.exp2(dot * (2.0 * LOG2E / softcap)) + 1.0)
            dot = tl.where(there, dot, float("-inf"))
        line = ((b * tiles * ROWS + head + member) * query_len + row) * entries
        tl.store(out + line + entry, dot, mask=inside)


def gathered(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    *,
    scaling: float = 1.0,
    softcap: float | None = None,
    cosine: bool = False,
    center: Tensor | None = None,
    affine: Tensor | None = None,
    width: int = 0,
) -> Tensor:
    """Dot products of each query with chosen keys; see `sah_core.ops.Ops.logits_at`, and
    `sah_core.code_ops.CodeOps.cosines` for ``cosine`` and ``center``.

    With ``affine`` the keys are labels; see `sah_core.ops.Ops.label_logits_at`. ``width`` is the
    number of bits of a code's field.

    Returns:
        float32 ``(batch, heads, query_len, count)``.
    """
    batch, heads, query_len, head_dim = query.shape
    group = heads // key.shape[1]
    selections, entries = indices.shape[1], indices.shape[3]
    rows = min(group, heads // selections)
    tiles = heads // rows
    shape = (batch, heads, query_len, entries)
    out = torch.empty(shape, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    indices = indices if indices.stride(3) == 1 else indices.contiguous()
    center = None if center is None else center.contiguous()
    _gathered[(-(-entries // BLOCK), batch * tiles * query_len)](
        query, key, query if affine is None else affine, indices,
        query if center is None else center, out, entries, query_len, tiles,
        *query.stride(), *key.stride(), *([0] * 4 if affine is None else affine.stride()),
        *steps(indices, 0, 1, 2),
        *([0, 0] if center is None else center.stride()[:2]),
        scaling, 1.0 if softcap is None else softcap,
        GROUP=group, ROWS=rows, SELECTION_TILES=max(1, tiles // selections),
        HEAD_DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim), BLOCK=BLOCK,
        COSINE=cosine, WIDTH=width, HAS_CENTER=center is not None, HAS_CAP=softcap is not None,
        LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return out
