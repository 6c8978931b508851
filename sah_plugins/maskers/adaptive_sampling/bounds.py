"""What a base sample says of both sums of an attention row, from which budgets follow."""

import attrs
import torch
from torch import Tensor

from sah_core import Inputs


@attrs.frozen(kw_only=True, eq=False)
class Estimate:
    """What a base sample says of one call.

    Attributes:
        inputs: The call.
        base: Keys of the base sample, int32 ``(batch, heads, query_len, entries)``.
        seen: Their logits, -inf at entries that are none.
        count: Keys in the base sample per row, float64 ``(batch, heads, query_len)``.
        fixed: Keys that earlier steps selected, likewise.
        sure: Their logits.
        chance: Their probabilities, None if all are 1.
        left: Keys in the residual per row, float64.
        top: The greatest logit, float32 ``(batch, heads, query_len, 1)``.
        moments: Sums over the weights ``e^(l - top)``; see `Ops.weight_moments`.
    """

    inputs: Inputs
    base: Tensor
    seen: Tensor
    count: Tensor
    fixed: Tensor
    sure: Tensor
    chance: Tensor | None
    left: Tensor
    top: Tensor
    moments: Tensor

    def mean(self) -> Tensor:
        """Of ``e^(l - top)`` over the base sample, float64."""
        return self.moments[1] / self.count.clamp(min=1)

    def denominator(self) -> tuple[Tensor, Tensor]:
        """``n`` times the standard deviation of ``e^l`` in the residual, and the denominator."""
        spread = (self.moments[2] / (self.count - 1).clamp(min=1)).sqrt()
        return self.left * spread, self.moments[0] + self.left * self.mean()

    def inflation(self) -> Tensor:
        """What raises the variance of ``e^l`` in the base sample by one standard error of its own.

        The standard error is that of the sample's fourth moment. A sample of skewed weights shows
        less than their variance more often than not.
        """
        count = self.count.clamp(min=1)
        second, fourth = self.moments[2] / count, self.moments[3] / count
        kurtosis = fourth / second.square().clamp(min=torch.finfo(torch.float64).tiny)
        return 1 + ((kurtosis - 1).clamp(min=0) / count).sqrt()

    def numerator(self) -> tuple[Tensor, Tensor]:
        """``n`` times the root of the trace of the covariance of ``e^l v`` in the residual, and
        the length of the numerator.
        """
        ops, value = self.inputs.ops, self.inputs.value
        kept = (self.sure - self.top).exp()
        kept = kept if self.chance is None else kept / self.chance
        first, second = ops.moments_at(value, self.base, (self.seen - self.top).exp())
        count = self.count.clamp(min=1)
        mean = first.double() / count.unsqueeze(-1)
        trace = second.double() - count * mean.square().sum(-1)
        spread = (trace.clamp(min=0) / (self.count - 1).clamp(min=1)).sqrt()
        known, _ = ops.moments_at(value, self.fixed, kept)
        size = known.double() + self.left.unsqueeze(-1) * mean
        return self.left * spread, torch.linalg.vector_norm(size, dim=-1)


def student_quantile(z: float, freedom: Tensor) -> Tensor:
    """Quantile of Student's t from the normal one, by its expansion (Abramowitz and Stegun:
    Handbook of Mathematical Functions, 26.7.5).
    """
    freedom = freedom.clamp(min=1)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom.square()
