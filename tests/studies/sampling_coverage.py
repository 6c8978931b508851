"""How often adaptive sampling keeps its error bound: on drawn logits and on real keys.

    python tests/studies/sampling_coverage.py [--draws N] [--no-model]

Prints a table in Markdown. Every case is one attention row per head, whose keys are sampled again
and again; the error is that of the estimated denominator (or numerator), relative to the exact one.
A bound is kept if the share of draws within epsilon is at least 1 - delta.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
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
LAYERS = (0, 9, 19, 29)
SETTINGS = (
    ("denominator", 0.1, 0.1, False),
    ("denominator", 0.1, 0.1, True),
    ("denominator", 0.05, 0.05, True),
    ("numerator", 0.1, 0.1, True),
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
    density: float
    draws: int


def coverage(case: Case, steps: tuple[Any, ...], epsilon: float, draws: int) -> Coverage:
    """Sample every row ``draws`` times: rows of one call and seeds are independent draws."""
    heads, key_len = case.query.shape[1], case.key.shape[2]
    query = case.query.expand(1, heads, ROWS, -1).contiguous()
    within = torch.zeros(2, heads, dtype=torch.float64)
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
        off = (torch.linalg.vector_norm(vector - exact, dim=-1)) / exact.norm(dim=-1)
        within[0] += ((total - whole).abs() <= epsilon * whole)[0].sum(-1)
        within[1] += (off <= epsilon)[0].sum(-1)
        selected += int((probability > 0).sum())
        done += ROWS
    density = selected / (done * heads * key_len)
    return Coverage(within[0] / done, within[1] / done, density, done)


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    print("| keys | heavy keys first | bound | ε | δ | formula | coverage | density |")
    print("|---|---|---|---|---|---|---|---|")
    cases = [*drawn_cases(), *(() if options.no_model else model_cases())]
    for case in cases:
        for heavy in (0.0, 0.1):
            for bound, epsilon, delta, cautious in SETTINGS:
                masker = AdaptiveSampling(
                    epsilon=epsilon, delta=delta, bound=bound, cautious=cautious
                )
                first = (OracleTopK(heavy_size=heavy),) if heavy else ()
                found = coverage(case, (*first, masker), epsilon, options.draws)
                kept = getattr(found, bound)
                least = "" if kept.numel() == 1 else f" (least head {float(kept.min()):.3f})"
                formula = "cautious" if cautious else "paper"
                print(
                    f"| {case.name} | {heavy:.0%} | {bound} | {epsilon} | {delta} | {formula} "
                    f"| {float(kept.mean()):.3f}{least} | {found.density:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
