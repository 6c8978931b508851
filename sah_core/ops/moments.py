"""Sums over weighted samples, from which an error is estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from sah_core.mask import spread_heads
from sah_core.ops.heads import take_rows


class MomentOps:
    """Moments of weights, and of weighted values."""

    def weight_moments(
        self,
        drawn: Tensor,
        sure: Tensor,
        chance: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums over attention weights, of some keys of each row and of a sample of the others.

        Weights are ``e^(logit - top)``, with the greatest of all logits of the row as ``top``, so
        that none overflows; sums are in float64.

        Args:
            drawn: Logits of the sample, float32 ``(batch, heads, query_len, count)``; -inf is none.
            sure: Logits of the other keys, likewise with a count of their own.
            chance: By what weights of ``sure`` are divided, float32, broadcastable to it; None = 1.
            sinks: Learned sink logit per head, float ``(heads,)``, which joins ``sure``; or None.

        Returns:
            ``top``, float32 ``(batch, heads, query_len, 1)``, and four sums, float64 ``(4, batch,
            heads, query_len)``: of the weights of ``sure``; of those of ``drawn``; of the squares
            and of the fourth powers of what the latter are from their mean.
        """
        top = torch.cat([drawn, sure], -1).amax(-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks.float().view(1, -1, 1, 1))
        top = top.clamp(min=torch.finfo(torch.float32).min)
        weights, kept = (drawn - top).exp().double(), (sure - top).exp()
        held = (kept if chance is None else kept / chance).double().sum(-1)
        if sinks is not None:
            held = held + (sinks.double().view(1, -1, 1) - top.squeeze(-1).double()).exp()
        there = drawn > float("-inf")
        total = weights.sum(-1)
        mean = total / there.sum(-1).clamp(min=1)
        square = torch.where(there, weights - mean.unsqueeze(-1), 0.0).square()
        return top, torch.stack([held, total, square.sum(-1), square.square().sum(-1)])

    def moments_at(self, value: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment of weighted values at chosen keys.

        Args:
            value: ``(batch, kv_heads, key_len, value_dim)``.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)``; negative entries are no
                keys, and their weights must be 0.
            weights: float32 ``(batch, heads, query_len, count)``.

        Returns:
            ``sum_j w_j v_j``, float32 ``(batch, heads, query_len, value_dim)``, and ``sum_j w_j^2
            |v_j|^2``, float32 ``(batch, heads, query_len)``.
        """
        batch, heads, query_len, count = weights.shape
        kv_heads, key_len, value_dim = value.shape[1:]
        if query_len > 1 or count >= key_len:
            places = spread_heads(indices, heads).clamp(min=0).long()
            dense = torch.zeros((batch, heads, query_len, key_len), device=value.device)
            dense.scatter_add_(-1, places.expand(weights.shape), weights)
            dense = dense.view(batch, kv_heads, heads // kv_heads * query_len, key_len)
            rows = value.float()
        else:
            rows = take_rows(value, indices).float()
            dense = weights.reshape(batch, rows.shape[1], heads // rows.shape[1], count)
        squares = rows.square().sum(-1, keepdim=True)
        first, second = dense @ rows, dense.square() @ squares
        shape = (batch, heads, query_len)
        return first.view(*shape, value_dim), second.view(shape)
