"""Rows, channels and groups of tensors that lie head by head."""

from __future__ import annotations

from torch import Tensor

from sah_core.mask import spread_heads

GROUP_REDUCTIONS = ("none", "sum", "mean", "max")


def reduce_groups(scores: Tensor, kv_heads: int, reduction: str) -> Tensor:
    """Scores ``(batch, heads, query_len, keys)`` as the query heads of each KV group share them."""
    if reduction == "none":
        return scores
    batch, heads, query_len, keys = scores.shape
    grouped = scores.view(batch, kv_heads, heads // kv_heads, query_len, keys)
    if reduction == "max":
        return grouped.amax(dim=2)
    return grouped.sum(dim=2) if reduction == "sum" else grouped.mean(dim=2)


def write_rows(buffer: Tensor, rows: Tensor, start: int | Tensor) -> None:
    """Write rows along dimension 2; a start on the device stays there."""
    if isinstance(start, int):
        buffer[:, :, start : start + rows.shape[2]] = rows
    else:
        buffer.index_copy_(2, start.long(), rows)


def channels_of(tensor: Tensor, channels: Tensor) -> Tensor:
    """The channels of each head, ``(batch, heads, rows, channels)``; the more numerous of tensor
    heads and channel lists says how many heads.
    """
    batch, heads, rows, head_dim = tensor.shape
    lists, count = channels.shape
    if lists < heads:
        channels = channels.repeat_interleave(heads // lists, dim=0)
    share = max(1, lists // heads)
    index = channels.view(1, heads, share, 1, count).expand(batch, -1, -1, rows, -1)
    spread = tensor.unsqueeze(2).expand(-1, -1, share, -1, -1)
    return spread.gather(4, index).flatten(1, 2)


def take_rows(source: Tensor, indices: Tensor) -> Tensor:
    """Rows of the cache by index, for one query row.

    Args:
        source: ``(batch, kv_heads, key_len, channels)``.
        indices: int ``(batch | 1, heads', 1, count)``; negative entries take row 0.

    Returns:
        ``(batch, selections, count, channels)``, ``selections`` the greater of ``heads'`` and
        ``kv_heads``.
    """
    batch, kv_heads, _, channels = source.shape
    selections = max(kv_heads, indices.shape[1])
    places = spread_heads(indices[:, :, 0], selections).clamp(min=0).long()
    places = places.expand(batch, selections, -1)
    group = selections // kv_heads
    flat = places.reshape(batch, kv_heads, -1, 1).expand(-1, -1, -1, channels)
    rows = source.gather(2, flat)
    return rows.view(batch, kv_heads * group, -1, channels)
