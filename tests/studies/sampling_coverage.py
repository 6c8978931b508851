"""How often adaptive sampling keeps its error bound: on drawn logits and on real keys.

    python tests/studies/sampling_coverage.py [--draws N] [--tokens N] [--no-model]

Prints a table in Markdown. Every case is one attention row per head, whose keys are sampled again
and again; the error is that of what the bound is for (the estimated denominator, numerator or
attention), relative to the exact one. A bound is kept if the share of draws within epsilon is at
least 1 - delta.

A second table says of the model's rows what the numerator's bound stands on: the trace of the
covariance of ``e^l v`` in the residual, of which a base sample must see enough.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import Allowed, Inputs, attach, hookimpl
from sah_core.attention import build_mask
from sah_core.randomness import Random
from sah_plugins.maskers.adaptive_sampling import AdaptiveSampling
from sah_plugins.maskers.oracle_top_k import OracleTopK

ROWS = 100
BASE_RATE = 0.05
LAYERS = (0, 9, 19, 29)
SETTINGS = (
    ("denominator", 0.1, 0.1, False),
    ("denominator", 0.1, 0.1, True),
    ("denominator", 0.05, 0.05, True),
    ("numerator", 0.1, 0.1, False),
    ("numerator", 0.1, 0.1, True),
    ("attention", 0.2, 0.1, False),
    ("attention", 0.2, 0.1, True),
)
TEXT = Path(__file__).parents[2] / "LICENSE"


@attrs.frozen(eq=False)
class Case:
    """Attention rows to sample from, one per head."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@attrs.frozen
class Coverage:
    """Share of draws within the bound, mean density, and the number of draws; per head."""

    denominator: Tensor
    numerator: Tensor
    attention: Tensor
    density: float
    draws: int


def coverage(case: Case, steps: tuple[Any, ...], epsilon: float, draws: int) -> Coverage:
    """Sample every row ``draws`` times: rows of one call and seeds are independent draws."""
    heads, key_len = case.query.shape[1], case.key.shape[2]
    query = case.query.expand(1, heads, ROWS, -1).contiguous()
    within = torch.zeros(3, heads, dtype=torch.float64)
    selected, done = 0, 0
    for seed in range(-(-draws // ROWS)):
        inputs = Inputs(
            query=query,
            key=case.key,
            value=case.value,
            allowed=Allowed.everything(key_len),
            scaling=case.scaling,
            key_len=key_len,
            random=Random(seed=seed),
        )
        probability = build_mask(steps, inputs, seed=seed).to_dense().double()
        logits = inputs.ops.logits(query[:, :, :1], case.key, case.scaling).double()
        weight = (logits - logits.amax(-1, keepdim=True)).exp()
        group = heads // case.key.shape[1]
        value = case.value.double().repeat_interleave(group, 1)
        factor = torch.where(probability > 0, 1 / probability, 0.0) * weight
        total, whole = factor.sum(-1), weight.sum(-1)
        vector, exact = factor @ value, weight @ value
        within[0] += ((total - whole).abs() <= epsilon * whole)[0].sum(-1)
        ratio, right = vector / total.unsqueeze(-1), exact / whole.unsqueeze(-1)
        for place, found, true in ((1, vector, exact), (2, ratio, right)):
            off = torch.linalg.vector_norm(found - true, dim=-1)
            within[place] += (off <= epsilon * torch.linalg.vector_norm(true, dim=-1))[0].sum(-1)
        selected += int((probability > 0).sum())
        done += ROWS
    density = selected / (done * heads * key_len)
    return Coverage(*(within / done), density, done)


@attrs.frozen
class Trace:
    """How hard the trace of a row's residual is to see; per head.

    Attributes:
        top: Share of the trace that the 1 % of the keys with the most of it hold.
        seen: Median over base samples of the trace that they show, over the true one.
        known: Share of draws within the numerator's bound if the budget is that of the true trace
            and the true numerator.
    """

    top: Tensor
    seen: Tensor
    known: Tensor


def trace(case: Case, heavy: float, epsilon: float, delta: float, draws: int) -> Trace:
    """Sample the residual behind the heavy keys with the paper's budget from exact moments."""
    heads, key_len = case.query.shape[1], case.key.shape[2]
    z = NormalDist().inv_cdf(1 - delta / 2)
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(3, heads, dtype=torch.float64)
    for head in range(heads):
        kv_head = head * case.key.shape[1] // heads
        value = case.value[0, kv_head].double()
        logits = case.key[0, kv_head].double() @ case.query[0, head, 0].double() * case.scaling
        order = logits.argsort(descending=True)
        terms = ((logits - logits.max()).exp().unsqueeze(1) * value)[order]
        size, rest = terms.sum(0).norm(), terms[int(heavy * key_len) :]
        left = len(rest)
        squares = (rest - rest.mean(0)).square().sum(1).sort(descending=True).values
        true = squares.sum() / (left - 1)
        found[0, head] = squares[: max(1, left // 100)].sum() / squares.sum()

        ranks = torch.rand(draws, left, generator=generator).argsort(dim=1)
        base = max(2, int(BASE_RATE * left))
        drawn = (ranks < base).double()
        shown = drawn @ rest.square().sum(1) - (drawn @ rest).square().sum(1) / base
        found[1, head] = (shown / (base - 1) / true).median()

        wanted = float((z * left * true.sqrt() / (epsilon * size)) ** 2)
        budget = min(left, max(base, -int(-wanted // 1)))
        estimate = left / budget * ((ranks < budget).double() @ rest)
        error = torch.linalg.vector_norm(estimate - rest.sum(0), dim=1)
        found[2, head] = (error <= epsilon * size).double().mean()
    return Trace(*found)


def drawn_cases(key_len: int = 4096) -> Iterator[Case]:
    """Logits of known distributions, one row each; values with a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(key_len, generator=generator)
    student = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    shapes = {
        "Gaussian, σ = 0.5": normal * 0.5,
        "Gaussian, σ = 1": normal,
        "Gaussian, σ = 2": normal * 2,
        "Gaussian, σ = 3": normal * 3,
        "Student t, 3 degrees": student.sample((key_len,)),
        "one key at 8 over σ = 1": torch.cat([normal[:-1], torch.full((1,), 8.0)]),
    }
    for name, logits in shapes.items():
        key = torch.zeros(1, 1, key_len, 2)
        key[0, 0, :, 0] = logits
        value = torch.randn(1, 1, key_len, 8, generator=generator) + 2
        query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        yield Case(name, query, key, value, 1.0)
        if name == "Gaussian, σ = 1":
            value = student.sample((1, 1, key_len, 8)) + 2
            yield Case(f"{name}, values Student t", query, key, value, 1.0)


def model_cases(tokens: int = 2048) -> Iterator[Case]:
    """The last row of a real text in some layers of SmolLM2, all query heads."""
    from sah_core import registry

    adapter = registry.adapters["hf"]("smollm2-135m", model_kwargs={"dtype": "float32"})
    calls: dict[int, Inputs] = {}

    class Keep:
        @hookimpl
        def sah_mask_built(self, inputs: Inputs) -> None:
            calls[inputs.layer] = inputs

    ids = adapter.tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"][:, :tokens]
    with torch.no_grad(), attach(adapter.model, "local(1.0) @ prefill=sparse", observers=[Keep()]):
        adapter.model(ids, logits_to_keep=1)
    for layer in LAYERS:
        inputs = calls[layer]
        query = inputs.query[:, :, -1:].float()
        key, value = inputs.key.float(), inputs.value.float()
        yield Case(f"SmolLM2, layer {layer}", query, key, value, inputs.scaling)


def coverage_table(cases: list[Case], draws: int) -> None:
    print("| keys | heavy keys first | bound | ε | δ | formula | coverage | density |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        for heavy in (0.0, 0.1):
            for bound, epsilon, delta, cautious in SETTINGS:
                masker = AdaptiveSampling(
                    base_rate_sampling=BASE_RATE,
                    epsilon=epsilon,
                    delta=delta,
                    bound=bound,
                    cautious=cautious,
                )
                first = (OracleTopK(heavy_size=heavy),) if heavy else ()
                found = coverage(case, (*first, masker), epsilon, draws)
                formula = "cautious" if cautious else "paper"
                print(
                    f"| {case.name} | {heavy:.0%} | {bound} | {epsilon} | {delta} | {formula} "
                    f"| {shown(getattr(found, bound))} | {found.density:.3f} |",
                    flush=True,
                )


def trace_table(cases: list[Case], draws: int) -> None:
    print(
        "| keys | heavy keys first | in 1% of the keys | seen | true trace | paper | cautious "
        "| cautious, base 10% |"
    )
    print("|---|---|---|---|---|---|---|---|")
    epsilon = delta = 0.1
    for case in cases:
        for heavy in (0.02, 0.05, 0.1):
            about, kept = trace(case, heavy, epsilon, delta, draws), []
            for rate, cautious in ((BASE_RATE, False), (BASE_RATE, True), (2 * BASE_RATE, True)):
                masker = AdaptiveSampling(
                    base_rate_sampling=rate,
                    epsilon=epsilon,
                    delta=delta,
                    bound="numerator",
                    cautious=cautious,
                )
                steps = OracleTopK(heavy_size=heavy), masker
                kept.append(shown(coverage(case, steps, epsilon, draws).numerator))
            print(
                f"| {case.name} | {heavy:.0%} | {float(about.top.mean()):.2f} "
                f"| {float(about.seen.mean()):.2f} | {shown(about.known)} | {' | '.join(kept)} |",
                flush=True,
            )


def shown(kept: Tensor) -> str:
    """Mean over the heads, and the least of them."""
    least = "" if kept.numel() == 1 else f" (least head {float(kept.min()):.3f})"
    return f"{float(kept.mean()):.3f}{least}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    real = [] if options.no_model else list(model_cases(options.tokens))
    coverage_table([*drawn_cases(), *real], options.draws)
    if real:
        print()
        trace_table(real, options.draws)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
