"""Random sampling: keys drawn uniformly and without replacement from what is not selected yet.

The uniform estimator of William G. Cochran: Sampling Techniques, 3rd edition, Wiley 1977, chapter
2, applied to attention as in the sampled part of Aditya Desai and others: vAttention: Verified
Sparse Attention, arXiv 2510.05688.

Of the ``n`` residual keys of a row (allowed, not selected by earlier steps), ``b`` are drawn, so
that each has the inclusion probability ``b / n`` exactly; attention divides its weight by that,
which makes numerator and denominator unbiased. With ``b >= n`` the rest is selected whole.

Differs from no paper: it is a definition. Costs a random number per key and query head; reads no
key to choose and keeps no state.
"""

from typing import ClassVar

import attrs
import torch

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.selection import join_rows, residual_count, row_pieces, sample

BYTES_PER_KEY = 32
"""Of one query row and head: a float32 number and the 64-bit words that it is mixed from."""


@attrs.frozen(kw_only=True)
class RandomSampling(Masker):
    """Draw ``sampling_rate`` keys per query head from the residual, each with the same chance."""

    name: ClassVar[str] = "random-sampling"
    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True)

    sampling_rate: Size = param(
        0.05,
        type=Size,
        help="Keys drawn per query head, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.01, 0.02, 0.05, 0.1, 0.2]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add a sample of the keys that ``previous`` does not hold yet."""
        budget = inputs.budget(self.sampling_rate)
        if not budget.capacity or previous.is_full:
            return previous
        left = residual_count(inputs, previous).expand(inputs.shape[:3])
        drawn = left.clamp(max=budget.capacity)
        if budget.count is not None:
            drawn = torch.minimum(drawn, budget.count)
        drawn = drawn.to(torch.int32)
        found, begin = [], 0
        for part, taken in row_pieces(inputs, previous, BYTES_PER_KEY):
            end = begin + part.query_len
            found.append(sample(part, taken, drawn[:, :, begin:end], budget.capacity))
            begin = end
        indices = join_rows(found)
        chance = drawn / left.clamp(min=1)
        probability = chance.unsqueeze(-1).expand(indices.shape).contiguous()
        mask = Mask.from_indices(inputs.shape, indices, probability=probability)
        return previous.union(mask, disjoint=True)


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return RandomSampling
