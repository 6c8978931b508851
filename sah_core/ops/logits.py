"""Attention logits, of all keys and of chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sah_core.mask import spread_heads
from sah_core.ops.heads import take_rows


class LogitOps:
    """Logits before the softmax, by key."""

    def logits(
        self, query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attention logits before the softmax.

        Whatever else a query is multiplied with may stand in for the keys: the normals of
        hyperplanes, or centroids, one sub-vector a head.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``; strides may be 0.
            scaling: Factor on ``q . k``.
            softcap: Gemma 2's cap c in ``c * tanh(logit / c)``, or None.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``.
        """
        batch, heads, query_len, head_dim = query.shape
        kv_heads, key_len = key.shape[1], key.shape[2]
        rows = query.reshape(batch, kv_heads, heads // kv_heads * query_len, head_dim)
        # scaled after the sums, so that keys of equal products stay equal
        scores = torch.matmul(rows.float(), key.float().transpose(2, 3)).mul_(scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        return scores.view(batch, heads, query_len, key_len)

    def logits_at(
        self,
        query: Tensor,
        key: Tensor,
        indices: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention logits of chosen keys; no others are read where there is one query row.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)`` with ``heads'`` a divisor
                of the heads; negative entries are no keys.
            scaling: Factor on ``q . k``.
            softcap: Logit cap, or None.

        Returns:
            float32 ``(batch, heads, query_len, count)``, -inf at entries that are no keys.
        """
        batch, heads, query_len, _ = query.shape
        count = indices.shape[3]
        if query_len > 1 or count >= key.shape[2]:
            scores = self.logits(query, key, scaling, softcap)
            places = spread_heads(indices, heads).clamp(min=0).long()
            scores = scores.gather(-1, places.expand(batch, heads, query_len, count))
        else:
            scores = self.logits(query, take_rows(key, indices), scaling, softcap)
        return scores.masked_fill(spread_heads(indices, heads) < 0, float("-inf"))
