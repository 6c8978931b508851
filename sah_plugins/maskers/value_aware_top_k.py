"""Value-aware top-k: the keys that contribute most to the output, by weight times value norm.

The oracle of value-aware selection; for example Yuan Feng, Junlin Lv, Yukun Cao, Xike Xie, S. Kevin
Zhou: Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, arXiv
2502.03805, and SOCKET, arXiv 2602.06283, which ranks by an estimate of the same product.

A key's contribution to the numerator is ``e^l |v|``, so keys are ranked by ``l + log |v|`` in
float32; equal scores go to the lower index. A value of norm 0 still moves the denominator: it ranks
last instead of never.

Differs from the papers in using the true weights and the plain Euclidean norm of the cached value
(no output projection). Reads every key and 4 bytes per value head once per query, and keeps 4 bytes
per token and KV head: the logarithms of the norms.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.selection import add_best
from sah_core.state import LayerInfo, TokenBuffer


@attrs.frozen(kw_only=True)
class ValueAwareTopK(Masker):
    """Select the ``heavy_size`` keys of the greatest weight times value norm, per query head."""

    name: ClassVar[str] = "value-aware-top-k"

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected per query head, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.01, 0.02, 0.05, 0.1, 0.2]),
    )

    def init_state(self, layer: LayerInfo) -> TokenBuffer:
        """Room for the logarithm of every value's norm."""
        return TokenBuffer(
            (layer.batch, layer.kv_heads, layer.capacity), torch.float32, layer.device
        )

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Take in the norms of the new values."""
        norm = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
        state.write(norm.clamp(min=torch.finfo(torch.float32).tiny).log(), start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the keys of the greatest contribution that ``previous`` does not hold yet."""
        norms: TokenBuffer = inputs.state
        bonus = norms.first(inputs.capacity).repeat_interleave(inputs.group, dim=1).unsqueeze(2)

        def score(part: Inputs) -> Tensor:
            logits = inputs.ops.logits(part.query, part.key, part.scaling, part.softcap)
            return logits.add_(bonus)

        return add_best(inputs, previous, self.heavy_size, score)

    def bytes_read(self, inputs: Inputs) -> int:
        """Every key, and the norm of every value."""
        norms = 4 * inputs.batch * inputs.kv_heads * inputs.capacity
        return inputs.key.numel() * inputs.key.element_size() + norms


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return ValueAwareTopK
