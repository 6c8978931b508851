"""Attention weights by their definition: what every backend computes, as a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Inputs
from .mask import Mask

CHUNK = 2**24
"""Numbers of the key cache converted to float32 at once."""


def dense_logits(inputs: Inputs) -> Tensor:
    """Scaled and capped logits in float32 ``(batch, heads, query_len, key_len)``; ``-inf`` where a
    key may not be attended. float64 stays float64.
    """
    batch, heads, query_len, key_len = inputs.shape
    exact = torch.promote_types(inputs.query.dtype, torch.float32)
    rows = inputs.query.reshape(batch, inputs.kv_heads, inputs.group * query_len, -1).to(exact)
    rows = rows * inputs.scaling
    pieces = [rows @ inputs.key[:, :, b:e].to(exact).mT for b, e in chunks(inputs.key, exact)]
    logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    logits = logits.view(batch, heads, query_len, key_len)
    if inputs.softcap is not None:
        logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
    return logits.masked_fill(~inputs.allowed.to_dense(key_len), float("-inf"))


def attention_weights(
    inputs: Inputs, mask: Mask | None = None, *, sinks: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that a mask selects, each weight divided by the probability with which
    its key was selected.

    Args:
        inputs: The call.
        mask: What is selected; every allowed key when None.
        sinks: Count learned sinks in the denominator, as the model does; without them the weights
            of the keys add up to 1.

    Returns:
        Weights ``(batch, heads, query_len, key_len)``, 0 where a key is not attended and in rows
        that attend nothing, and the log-sum-exp ``(batch, heads, query_len)``; in float32 (float64
        stays float64).
    """
    logits = dense_logits(inputs)
    if mask is not None and not mask.is_full:
        probability = mask.to_dense().to(logits)
        keep = probability > 0
        logits = logits - torch.where(keep, probability, 1.0).log()
        logits = logits.masked_fill(~keep, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    learned = None
    if sinks and inputs.sinks is not None:
        learned = inputs.sinks.to(logits.dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, learned)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if learned is not None:
        total = total + torch.exp(learned - top)
    lse = (total.log() + top).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1.0), lse


def chunks(cache: Tensor, exact: torch.dtype) -> Iterator[tuple[int, int]]:
    """Runs of keys that are converted together; all of them where nothing is to be converted."""
    keys = max(1, cache.shape[2])
    size = keys if cache.dtype == exact else max(1, CHUNK * keys // max(1, cache.numel()))
    for begin in range(0, keys, size):
        yield begin, min(keys, begin + size)
