"""Eager: the reference. Any mask, any device, every logit computed; its savings are simulated."""

from typing import ClassVar

from torch import Tensor

from sah_core import Backend, Inputs, Mask, Problem, hookimpl
from sah_core.weights import attention_weights


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
        weights, lse = attention_weights(inputs, mask)
        flat = weights.view(batch, inputs.kv_heads, inputs.group * query_len, key_len)
        output = (flat @ inputs.value.to(flat.dtype)).view(batch, heads, query_len, -1)
        return output.transpose(1, 2).to(inputs.query.dtype).contiguous(), lse.float()


@hookimpl
def sah_backend() -> type[Backend]:
    """Register the backend."""
    return Eager
