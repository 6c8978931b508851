"""Adaptive sampling (vAttention): as many sampled keys per row as an error bound asks for.

Aditya Desai, Kumar Krishna Agrawal, Shuo Yang, Alejandro Cuadron, Luis Gaspar Schroeder, Matei
Zaharia, Joseph E. Gonzalez, Ion Stoica: vAttention: Verified Sparse Attention, arXiv 2510.05688,
section 4 (budgets for the denominator, the numerator and the attention).

Earlier steps select the keys F that matter; R is the rest, n keys. A base sample of R estimates
the spread of ``e^l`` in R and the sums over F and R; from these follows the number b of keys to
draw so that the relative error stays below epsilon with probability 1 - delta, by the central limit
theorem. Then b keys of R are drawn, each with its inclusion probability.

Differs from the paper in drawing the final sample independently of the base sample, which only sets
the budget, so that ``p = b / n`` is the exact inclusion probability and the estimate is unbiased.
Its ``cautious`` default allows for the error of the base sample itself, without which the bound is
missed on small ones. No formula makes up for a base sample that misses the keys which hold most of
the spread: earlier steps must have selected them. Beyond the paper: ``two_sided=false`` and the
offsets, which are the reference hub's quantile and sampling range, and the importance modes, which
are oracles. Reads the base sample and what earlier steps selected (the importance modes: every
key), draws a random number per key and query head, and keeps no state.
"""

from statistics import NormalDist
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.selection import (
    count_overflow,
    join_rows,
    residual_count,
    residual_scores,
    row_pieces,
    sample,
    selected_entries,
)
from sah_plugins.maskers.adaptive_sampling.bounds import Estimate, student_quantile

BYTES_PER_KEY = 48
"""Of one query row and head: random words of 64 bits, or float64 weights and their sums."""

MIN_BASE = 2
"""Keys of a base sample, at least: a spread needs two."""

BASE, FINAL = 0, 1
"""Draws of `sah_core.randomness.Random`."""


@attrs.frozen(kw_only=True)
class AdaptiveSampling(Masker):
    """Sample the residual until the estimated relative error is below ``epsilon``."""

    name: ClassVar[str] = "adaptive-sampling"
    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True, unbounded=True)

    base_rate_sampling: Size = param(
        0.05,
        type=Size,
        help="Base sample that sets the budget, of the residual; at least 2 keys.",
        unit="tokens or fraction of the residual",
        search=Search.choice([0.01, 0.02, 0.03, 0.05]),
    )
    epsilon: float = param(
        0.1,
        type=float,
        minimum=0.0,
        exclusive_minimum=True,
        help="Relative error to stay below.",
        search=Search.choice([0.01, 0.025, 0.05, 0.1, 0.2, 0.3]),
    )
    delta: float = param(
        0.1,
        type=float,
        minimum=0.0,
        maximum=0.5,
        exclusive_minimum=True,
        help="Probability with which the error may be above epsilon.",
        search=Search.choice([0.01, 0.025, 0.05, 0.1, 0.2, 0.3]),
    )
    init_offset: Size = param(
        0,
        type=Size,
        help="First keys that are never sampled; 0 samples whatever is not selected yet.",
        unit="tokens or fraction of the keys",
    )
    local_offset: Size = param(
        0,
        type=Size,
        help="Last keys up to the query's own that are never sampled.",
        unit="tokens or fraction of the keys",
    )
    mode: str = param(
        "uniform",
        type=str,
        choices=("uniform", "multinomial", "gumbel"),
        help="How keys are drawn: uniform, or by their true weights, with or without replacement.",
    )
    bound: str = param(
        "denominator",
        type=str,
        choices=("denominator", "numerator", "attention"),
        help="What the error is that of: one of the two sums, or their ratio.",
    )
    two_sided: bool = param(
        True, help="Bound the absolute error; false bounds an overestimate only, as the seed does."
    )
    cautious: bool = param(
        True,
        help="Allow for the base sample's own error: Student's quantile, the variance one standard "
        "error up. False: the paper's formula.",
    )
    temperature: float = param(
        1.0,
        type=float,
        minimum=0.0,
        exclusive_minimum=True,
        help="Weights of the modes multinomial and gumbel are e^(logit / temperature).",
    )
    max_size: Size | None = param(
        None,
        type=Size,
        help="Most keys sampled per query head. None: no limit.",
        unit="tokens or fraction of the keys",
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add a sample of the keys that ``previous`` does not hold yet."""
        if previous.is_full:
            return previous
        limit = None if self.max_size is None else inputs.budget(self.max_size)
        found, chances = [], []
        for part, taken in row_pieces(inputs, previous, BYTES_PER_KEY):
            inner = self.sampling_range(part)
            left = residual_count(inner, taken).expand(part.shape[:3])
            wanted = self.wanted(part, inner, taken, left)
            count, capacity = wanted, inputs.capacity
            if limit is not None:
                capacity = limit.capacity
                count = wanted.clamp(max=capacity)
                if limit.count is not None:
                    count = torch.minimum(count, limit.count)
                count_overflow(inputs, wanted > count)
            elif inputs.key_len is not None:
                capacity = int(wanted.max()) if wanted.numel() else 0
            indices, chance = self.draw(inner, taken, count.to(torch.int32), left, capacity)
            found.append(indices)
            chances.append(chance)
        indices, probability = join_rows(found), join_rows(chances, fill=1.0)
        if not indices.shape[-1]:
            return previous
        sampled = Mask.from_indices(inputs.shape, indices, probability=probability)
        return previous.union(sampled, disjoint=True)

    def sampling_range(self, inputs: Inputs) -> Inputs:
        """The call with limits that leave out the offsets."""
        allowed = inputs.allowed
        start, stop = allowed.start, allowed.stop
        if self.init_offset.plain():
            budget = inputs.budget(self.init_offset)
            skipped = budget.capacity if budget.count is None else budget.count
            start = torch.maximum(start, (allowed.first.view(-1, 1, 1) + skipped).to(torch.int32))
        if self.local_offset.plain():
            budget = inputs.budget(self.local_offset)
            skipped = budget.capacity if budget.count is None else budget.count
            last = inputs.query_position.unsqueeze(1) + 1 - skipped
            stop = torch.minimum(stop, last.to(torch.int32))
        if start is allowed.start and stop is allowed.stop:
            return inputs
        narrow = attrs.evolve(allowed, start=start, stop=stop, known_bounds=None)
        return attrs.evolve(inputs, allowed=narrow)

    # The budget

    def wanted(self, inputs: Inputs, inner: Inputs, previous: Mask, left: Tensor) -> Tensor:
        """Keys that the bound asks for, int64 ``(batch, heads, query_len)``, at most ``left``."""
        base_count = self.base_count(left)
        base = sample(inner, previous, base_count, self.base_capacity(inputs), draw=BASE)
        fixed, chance = selected_entries(inputs, previous)
        ops, query, key = inputs.ops, inputs.query, inputs.key
        seen = ops.logits_at(query, key, base, inputs.scaling, inputs.softcap)
        sure = ops.logits_at(query, key, fixed, inputs.scaling, inputs.softcap)
        if chance is not None:
            chance = per_head(chance, inputs.heads)
        top, moments = ops.weight_moments(seen, sure, chance, inputs.sinks)
        estimate = Estimate(
            inputs=inputs,
            base=base,
            seen=seen,
            count=base_count.double(),
            fixed=fixed,
            sure=sure,
            chance=chance,
            left=left.double(),
            top=top,
            moments=moments,
        )
        need = self.need(estimate)
        if self.mode == "gumbel":
            need = torch.maximum(need, self.threshold_draws(estimate))
        return torch.minimum(torch.maximum(need.ceil(), base_count.double()), left.double()).long()

    def base_count(self, left: Tensor) -> Tensor:
        """Keys of the base sample per row, int32."""
        size = self.base_rate_sampling
        if size.tokens is not None:
            count = torch.full_like(left, max(MIN_BASE, size.tokens))
        else:
            count = (left.double() * size.plain()).floor().long().clamp(min=MIN_BASE)
        return torch.minimum(count, left).to(torch.int32)

    def base_capacity(self, inputs: Inputs) -> int:
        """A host bound on the base sample."""
        return min(max(MIN_BASE, self.base_rate_sampling.resolve(inputs.capacity)), inputs.capacity)

    def need(self, estimate: Estimate) -> Tensor:
        """The budget of the bound, float64, not yet within its limits."""
        if self.bound != "attention":
            spread, size = getattr(estimate, self.bound)()
            return self.draws(spread, size, self.epsilon, self.delta, estimate)
        # with both sums within e, their ratio is within 2 e / (1 - e): solved for e
        epsilon, delta = self.epsilon / (2 + self.epsilon), self.delta / 2
        return torch.maximum(
            self.draws(*estimate.denominator(), epsilon, delta, estimate),
            self.draws(*estimate.numerator(), epsilon, delta, estimate),
        )

    def draws(
        self, spread: Tensor, size: Tensor, epsilon: float, delta: float, estimate: Estimate
    ) -> Tensor:
        """``(z n spread / (epsilon size))^2``, with ``n spread`` given as one."""
        z = NormalDist().inv_cdf(1 - delta / 2 if self.two_sided else 1 - delta)
        tiny = torch.finfo(torch.float64).tiny
        ratio = (spread / (epsilon * size).clamp(min=tiny)).square()
        if not self.cautious:
            return z * z * ratio
        return student_quantile(z, estimate.count - 1).square() * estimate.inflation() * ratio

    def threshold_draws(self, estimate: Estimate) -> Tensor:
        """What the random threshold of the mode gumbel costs, however even the weights are.

        The variance of a sum estimated from b keys by priority is at most its square over b - 1
        (Edith Cohen, Haim Kaplan: Tighter estimation using bottom-k sketches, VLDB 2008).
        """
        residual = estimate.left * estimate.mean()
        _, size = estimate.denominator()
        return 1 + self.draws(residual, size, self.epsilon, self.delta, estimate)

    # The final sample

    def draw(
        self, inputs: Inputs, previous: Mask, count: Tensor, left: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """Keys ``(batch, heads, query_len, entries)`` as the mode draws them, -1 at entries that
        are none, and their inclusion probabilities, float32.
        """
        if self.mode == "uniform":
            indices = sample(inputs, previous, count, capacity, draw=FINAL)
            chance = (count / left.clamp(min=1)).unsqueeze(-1)
            return indices, chance.expand(indices.shape).contiguous()
        ops = inputs.ops
        by_weight = ops.weighted_topk if self.mode == "gumbel" else ops.weighted_draws
        return by_weight(
            inputs.random,
            self.weights(inputs, previous),
            inputs.query_position,
            inputs.allowed.first,
            capacity,
            count=count,
            draw=FINAL,
        )

    def weights(self, inputs: Inputs, previous: Mask) -> Tensor:
        """``logit / temperature`` of the residual, -inf elsewhere; every key is read."""
        logits = inputs.ops.logits(inputs.query, inputs.key, inputs.scaling, inputs.softcap)
        logits = residual_scores(logits / self.temperature, inputs, previous)
        keys = torch.arange(inputs.capacity, device=inputs.device, dtype=torch.int32)
        keys = keys.view(1, 1, 1, -1)
        outside = ~inputs.allowed.contains(keys) | previous.covers(keys)
        return logits.masked_fill(outside, float("-inf"))

    def bytes_read(self, inputs: Inputs) -> int:
        """The keys of the base sample, or every key for the importance modes."""
        whole = inputs.key.numel() * inputs.key.element_size()
        if self.mode != "uniform":
            return whole
        rows = inputs.batch * inputs.heads * inputs.query_len * self.base_capacity(inputs)
        return min(whole, rows * inputs.key.shape[3] * inputs.key.element_size())


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """Repeat a selection that query heads share, for each of them."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return AdaptiveSampling
