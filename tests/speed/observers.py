"""What observers cost: decode steps of SmolLM2 on the CPU without any, with an idle one, with ours.

    python tests/speed/observers.py [--context 1000] [--rounds 5]

Prints milliseconds of CPU time per decode step after the first token, the minimum of interleaved
rounds in one process with one thread. ``plain`` is transformers' own ``generate`` with its own
cache, nothing of ours attached.
"""

import argparse
import time
import timeit
from collections.abc import Callable

import torch

from sah_core import MetricCall, Pipeline, Request, registry
from sah_core.attention import Session

NEW = 32
SPARSE = "sink(16) | local(64)"
CASES = (
    ("dense", ()),
    ("dense", ("density",)),
    (SPARSE, ()),
    (SPARSE, ("an observer without hooks",)),
    (SPARSE, ("density",)),
    (SPARSE, ("output-error",)),
    (SPARSE, ("output-error(every=8)",)),
    (SPARSE, ("mass",)),
    (SPARSE, ("recall",)),
)


class Clock:
    """Notes when the logits of each token are known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.process_time())
        return scores


class Idle:
    """Listens to nothing."""


def check_nanoseconds() -> float:
    """What a layer does where nobody observes: it looks twice whether there is a hook."""
    session = Session(Pipeline.parse(SPARSE), ())
    statement = "w = s.hook is not None and p in s.pipeline.phases\nif w: 0\nif w: 0"
    repeats = timeit.repeat(statement, globals={"s": session, "p": "decode"}, number=10**5)
    return min(repeats) / 10**5 * 1e9


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    adapter = registry.adapters["hf"]("smollm2-135m")
    text = "The grass is green. The sky is blue. Here we go, there and back again. " * 400
    ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"][: options.context]
    request = Request(context=adapter.tokenizer.decode(ids), questions="What now?", chat=False)
    generation = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    prefilled = adapter.prefill(request)

    def plain() -> float:
        clock = Clock()
        prompt = torch.tensor([prefilled.prompts[0].ids])
        adapter.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            pad_token_id=2,
            logits_processor=[clock.tick],
            **generation,
        )
        return (clock.times[-1] - clock.times[0]) / (NEW - 1)

    def of(pipeline: str, names: tuple[str, ...]) -> Callable[[], float]:
        def measured() -> float:
            observers = [Idle() if " " in n else MetricCall.parse(n).make() for n in names]
            clock = Clock()
            options = {**generation, "logits_processor": [clock.tick]}
            adapter.answer(prefilled, pipeline, options, observers=observers)
            return (clock.times[-1] - clock.times[0]) / (NEW - 1)

        return measured

    forms = {"plain, nothing of ours": plain}
    for pipeline, names in CASES:
        forms[f"{pipeline}, {' and '.join(names) or 'no observer'}"] = of(pipeline, names)
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, measure in forms.items():
            best[name] = min(best.get(name, float("inf")), measure())
    print(f"context {options.context}, {NEW - 1} steps each")
    layers = len(adapter.layer_types)
    print(f"the check itself: {check_nanoseconds():.0f} ns a layer, of which there are {layers}")
    for name, seconds in best.items():
        print(f"{name:50s} {1e3 * seconds:8.2f} ms/step")


if __name__ == "__main__":
    main()
