"""SDPA: torch's fused dense attention for everything that runs dense, without a mask tensor where
none is needed.

A full mask over causal, unpadded keys goes to the fused kernel as it is. Rows whose limits differ
(a chunk on a cache, a sliding window, left padding) run in blocks of rows over the keys that the
block can see, with a boolean mask of that size only.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sah_core import Allowed, Backend, Inputs, Mask, Problem, hookimpl

ROWS = 512
"""Query rows per block where a mask is needed."""


class Sdpa(Backend):
    """Dense attention by `torch.nn.functional.scaled_dot_product_attention`."""

    name: ClassVar[str] = "sdpa"
    rank: ClassVar[int] = 100
    realised: ClassVar[bool] = False

    def refuses(self, problem: Problem) -> str | None:
        """Accept full masks without softcap and learned sinks."""
        if not problem.is_full:
            return "only dense attention"
        if problem.softcap:
            return "no softcap"
        if problem.sinks:
            return "no learned sinks"
        if problem.needs_lse:
            return "gives no log-sum-exp"
        return None

    def attend(self, inputs: Inputs, mask: Mask) -> tuple[Tensor, None]:
        """Run the fused kernel over the allowed keys."""
        allowed = inputs.allowed
        if inputs.key_len is None:
            return masked(inputs, allowed.to_dense(inputs.capacity)), None
        if allowed.keep is None and allowed.start.shape[0] == allowed.stop.shape[0] == 1:
            return one_limit(inputs, allowed), None
        parts = [masked(b, b.allowed.to_dense(inputs.capacity)) for b in blocks(inputs)]
        return torch.cat(parts, dim=1), None


def one_limit(inputs: Inputs, allowed: Allowed) -> Tensor:
    """Sequences that share their limits: no padding."""
    (starts,), (stops,) = allowed.bounds
    query_len = inputs.query_len
    unwindowed = max(starts) == min(starts)
    if unwindowed and min(stops) == max(stops):
        return plain(inputs, starts[0], stops[0])
    causal = unwindowed and len(stops) == query_len and starts[0] == 0 and stops[0] == 1
    if causal and stops[-1] == query_len == inputs.capacity:
        output = scaled_dot_product_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            is_causal=True,
            scale=inputs.scaling,
            enable_gqa=inputs.group > 1,
        )
        return output.transpose(1, 2)
    parts = []
    for block in blocks(inputs):
        (starts,), (stops,) = block.allowed.bounds
        low, high = max(0, min(starts)), max(stops)
        if high <= low:  # rows of padding alone
            parts.append(plain(block, low, high))
            continue
        position = torch.arange(low, high, device=inputs.device, dtype=torch.int32)
        keep = (position >= block.allowed.start.unsqueeze(-1)) & (
            position < block.allowed.stop.unsqueeze(-1)
        )
        parts.append(masked(block, keep, low, high))
    return torch.cat(parts, dim=1)


def blocks(inputs: Inputs) -> list[Inputs]:
    """The call cut into blocks of query rows."""
    query_len = inputs.query_len
    if query_len <= ROWS:
        return [inputs]
    return [inputs.rows(b, min(b + ROWS, query_len)) for b in range(0, query_len, ROWS)]


def plain(inputs: Inputs, start: int, stop: int) -> Tensor:
    """All rows see keys ``start`` to ``stop``: the group joins the query rows, so that KV is read
    once.
    """
    batch, heads, query_len, _ = inputs.query.shape
    if stop <= start:
        return inputs.value.new_zeros(batch, query_len, heads, inputs.value.shape[3])
    rows = inputs.query.reshape(batch, inputs.kv_heads, inputs.group * query_len, -1)
    output = scaled_dot_product_attention(
        rows,
        inputs.key[:, :, start:stop],
        inputs.value[:, :, start:stop],
        scale=inputs.scaling,
    )
    # some kernels lay their output out by rows, so that the group cannot be told apart in place
    return output.reshape(batch, heads, query_len, -1).transpose(1, 2)


def masked(inputs: Inputs, keep: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Keys ``start`` to ``stop`` under a boolean mask; a row without any key gives 0."""
    output = scaled_dot_product_attention(
        inputs.query,
        inputs.key[:, :, start:stop],
        inputs.value[:, :, start:stop],
        attn_mask=keep,
        scale=inputs.scaling,
        enable_gqa=inputs.group > 1,
    )
    some = keep.any(-1, keepdim=True)
    return torch.where(some, output, 0.0).transpose(1, 2)


@hookimpl
def sah_backend() -> type[Backend]:
    """Register the backend."""
    return Sdpa
