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
missed on small ones. Beyond the paper: ``two_sided=false`` and the offsets, which are the reference
hub's quantile and sampling range, and the importance modes, which are oracles. Reads the base
sample and what earlier steps selected (the importance modes: every key), draws a random number per
key and query head, and keeps no state.
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
            draw = {"uniform": uniform, "multinomial": self.multinomial, "gumbel": self.gumbel}
            indices, chance = draw[self.mode](inner, taken, count.to(torch.int32), left, capacity)
            found.append(indices)
            chances.append(chance.to(torch.float32))
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

    def need(self, estimate: "Estimate") -> Tensor:
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
        self, spread: Tensor, size: Tensor, epsilon: float, delta: float, estimate: "Estimate"
    ) -> Tensor:
        """``(z n spread / (epsilon size))^2``, with ``n spread`` given as one."""
        z = NormalDist().inv_cdf(1 - delta / 2 if self.two_sided else 1 - delta)
        tiny = torch.finfo(torch.float64).tiny
        ratio = (spread / (epsilon * size).clamp(min=tiny)).square()
        if not self.cautious:
            return z * z * ratio
        return student_quantile(z, estimate.count - 1).square() * estimate.inflation() * ratio

    def threshold_draws(self, estimate: "Estimate") -> Tensor:
        """What the random threshold of the mode gumbel costs, however even the weights are.

        The variance of a sum estimated from b keys by priority is at most its square over b - 1
        (Edith Cohen, Haim Kaplan: Tighter estimation using bottom-k sketches, VLDB 2008).
        """
        residual = estimate.left * estimate.mean()
        _, size = estimate.denominator()
        return 1 + self.draws(residual, size, self.epsilon, self.delta, estimate)

    # Importance sampling

    def weights(self, inputs: Inputs, previous: Mask) -> Tensor:
        """``logit / temperature`` of the residual, -inf elsewhere; every key is read."""
        logits = inputs.ops.logits(inputs.query, inputs.key, inputs.scaling, inputs.softcap)
        logits = residual_scores(logits / self.temperature, inputs, previous)
        keys = torch.arange(inputs.capacity, device=inputs.device, dtype=torch.int32)
        keys = keys.view(1, 1, 1, -1)
        outside = ~inputs.allowed.contains(keys) | previous.covers(keys)
        return logits.masked_fill(outside, float("-inf"))

    def multinomial(
        self, inputs: Inputs, previous: Mask, count: Tensor, left: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """Draw with replacement by weight; a key is in with probability ``1 - (1 - w)^count``.

        A budget of the whole residual takes the whole residual instead.
        """
        logits = self.weights(inputs, previous)
        share = torch.softmax(logits.double(), -1).nan_to_num(0.0)
        reached = share.cumsum(-1)
        slot = torch.arange(capacity, device=inputs.device).view(1, 1, 1, -1)
        rows = inputs.query_position - inputs.allowed.first.view(-1, 1)
        height = inputs.random.uniform64(inputs.heads, rows, slot, draw=FINAL)
        height = (height * reached[..., -1:]).contiguous()
        keys = torch.searchsorted(reached, height, right=True).clamp(max=inputs.capacity - 1)
        drawn = (slot < count.unsqueeze(-1)) & (share.gather(-1, keys) > 0)
        keys = torch.where(drawn, keys, inputs.capacity).sort(-1).values
        again = torch.zeros_like(drawn)
        again[..., 1:] = keys[..., 1:] == keys[..., :-1]
        keys = torch.where(again | (keys == inputs.capacity), -1, keys)
        chance = share.gather(-1, keys.clamp(min=0))
        chance = -torch.expm1(count.unsqueeze(-1) * torch.log1p(-chance))
        whole = (count >= left).unsqueeze(-1)
        everything, _ = inputs.ops.masked_topk(logits, capacity, count=count)
        indices = torch.where(whole, everything, keys.to(torch.int32))
        return indices, torch.where(whole, 1.0, chance)

    def gumbel(
        self, inputs: Inputs, previous: Mask, count: Tensor, left: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        """Draw without replacement by weight: the greatest of logits plus Gumbel noise.

        Given the greatest that is left out, k, a key is in with probability ``1 - exp(-e^(l -
        k))``, which makes the estimate unbiased (Wouter Kool and others: Stochastic Beams and Where
        to Find Them, arXiv 1903.06059, section 4).
        """
        logits = self.weights(inputs, previous)
        first = inputs.allowed.first.view(-1, 1)
        keys = torch.arange(inputs.capacity, device=inputs.device) - first
        height = inputs.random.uniform64(
            inputs.heads, inputs.query_position - first, keys[:, None, None, :], draw=FINAL
        )
        scores = (logits.double() - (-height.log()).log()).to(torch.float32)
        indices, _ = inputs.ops.masked_topk(scores, capacity + 1, count=count + 1)
        places = indices.clamp(min=0).long().clamp(max=inputs.capacity - 1)
        found = scores.gather(-1, places).masked_fill(indices < 0, float("inf"))
        bar = found.amin(-1, keepdim=True)
        bar = torch.where((left > count).unsqueeze(-1), bar, float("-inf"))
        indices = torch.where(found == bar, -1, indices)
        chance = -torch.expm1(-(logits.gather(-1, places).double() - bar.double()).exp())
        return indices, torch.where(indices >= 0, chance, 1.0)

    def bytes_read(self, inputs: Inputs) -> int:
        """The keys of the base sample, or every key for the importance modes."""
        whole = inputs.key.numel() * inputs.key.element_size()
        if self.mode != "uniform":
            return whole
        rows = inputs.batch * inputs.heads * inputs.query_len * self.base_capacity(inputs)
        return min(whole, rows * inputs.key.shape[3] * inputs.key.element_size())


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


def uniform(
    inputs: Inputs, previous: Mask, count: Tensor, left: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Draw uniformly without replacement; a key is in with probability ``count / left``."""
    indices = sample(inputs, previous, count, capacity, draw=FINAL)
    chance = (count / left.clamp(min=1)).unsqueeze(-1)
    return indices, chance.expand(indices.shape).contiguous()


def student_quantile(z: float, freedom: Tensor) -> Tensor:
    """Quantile of Student's t from the normal one, by its expansion (Abramowitz and Stegun:
    Handbook of Mathematical Functions, 26.7.5).
    """
    freedom = freedom.clamp(min=1)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom.square()


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """Repeat a selection that query heads share, for each of them."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return AdaptiveSampling
