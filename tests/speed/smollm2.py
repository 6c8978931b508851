"""SmolLM2 on the CPU: one context of 3,900 tokens, 3 questions, 16 new tokens each.

    python tests/speed/smollm2.py [--rounds N]

Prints seconds per pipeline (prefill, answers, total) and the prefill against plain SDPA, all in one
process after a warm-up; the minimum of the interleaved rounds.
"""

import argparse
import time

import torch
from transformers import DynamicCache

from sah_core import Request, compat, registry

PIPELINES = (
    "dense",
    "sink(128) | local(128)",
    "sink(128) | local(128) | oracle-top-k(0.05)",
    "sink(128) | local(128) | quest(0.05, page_size=16, group_reduction=sum)",
)
CONTEXT, QUESTIONS, NEW = 3900, 3, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    adapter = registry.adapters["hf"]("smollm2-135m")
    text = "The grass is green. The sky is blue. Here we go, there and back again. " * 400
    ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"][:CONTEXT]
    request = Request(
        context=adapter.tokenizer.decode(ids),
        questions=[f"What is the colour of thing number {i}?" for i in range(QUESTIONS)],
        chat=False,
    )
    generation = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    prompt = torch.tensor([ids])
    name = compat.cache_argument(type(adapter.model).forward)

    def plain() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            cache = DynamicCache(config=adapter.model.config)
            adapter.model(prompt, **{name: cache}, logits_to_keep=1)
        return time.perf_counter() - begin

    best: dict[str, list[float]] = {}
    plain()
    plains = []
    for _ in range(rounds):
        plains.append(plain())
        for pipeline in PIPELINES:
            prefilled = adapter.prefill(request)
            begin = time.perf_counter()
            response = adapter.answer(prefilled, pipeline, generation)
            answers = time.perf_counter() - begin
            assert all(d.new_tokens == NEW for d in response.details)
            best.setdefault(pipeline, []).append(prefilled.seconds + answers)
            best.setdefault(pipeline + " prefill", []).append(prefilled.seconds)
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, {len(ids)} tokens")
    print(f"{'plain SDPA prefill':80s} {min(plains):6.2f} s")
    for pipeline in PIPELINES:
        total, prefill = min(best[pipeline]), min(best[pipeline + " prefill"])
        print(
            f"{pipeline:80s} {total:6.2f} s, prefill {prefill:5.2f} s "
            f"({prefill / min(plains):.3f} x plain)"
        )


if __name__ == "__main__":
    main()
