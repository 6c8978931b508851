"""Eager: the reference. Any mask, any device, every logit computed; its savings are simulated."""

from typing import ClassVar

import torch
from torch import Tensor

from sah_core import Backend, Inputs, Mask, Problem, hookimpl


class Eager(Backend):
    """Dense logits, the mask applied as it is defined, softmax in float32 (float64 inputs stay
    float64).
    """

    name: ClassVar[str] = "eager"
    rank: ClassVar[int] = 0
    realised: ClassVar[bool] = False

    def refuses(self, problem: Problem) -> str | None:
        """Accept everything."""
        return None

    def attend(self, inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor]:
        """Compute the weighted attention from the definition."""
        batch, heads, query_len, key_len = inputs.shape
        kv_heads, group = inputs.kv_heads, inputs.group
        exact = torch.promote_types(inputs.query.dtype, torch.float32)
        rows = inputs.query.reshape(batch, kv_heads, group * query_len, -1).to(exact)
        logits = (rows * inputs.scaling) @ inputs.key.to(exact).transpose(2, 3)
        logits = logits.view(batch, heads, query_len, key_len)
        if inputs.softcap is not None:
            logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
        keep = inputs.allowed.to_dense(key_len)
        if not mask.is_full:
            probability = mask.to_dense().to(inputs.device)
            keep = keep & (probability > 0)
            logits = logits - probability.to(exact).log()
        logits = logits.masked_fill(~keep, float("-inf"))
        top = logits.amax(-1, keepdim=True)
        if inputs.sinks is not None:
            sinks = inputs.sinks.to(exact).view(1, -1, 1, 1)
            top = torch.maximum(top, sinks)
        top = top.masked_fill(top == float("-inf"), 0.0)
        weights = torch.exp(logits - top)
        total = weights.sum(-1, keepdim=True)
        if inputs.sinks is not None:
            total = total + torch.exp(sinks - top)
        lse = (total.log() + top).squeeze(-1).float()
        weights = weights / total.masked_fill(total == 0, 1.0)
        flat = weights.view(batch, kv_heads, group * query_len, key_len)
        output = (flat @ inputs.value.to(exact)).view(batch, heads, query_len, -1)
        return output.transpose(1, 2).to(inputs.query.dtype).contiguous(), lse


@hookimpl
def sah_backend() -> type[Backend]:
    """Register the backend."""
    return Eager
