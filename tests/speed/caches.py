"""What an offloaded cache costs and saves: memory of the card, and seconds per token.

    python tests/speed/caches.py [--context 32768] [--pipeline PIPELINE ...]

A random Llama of 16 layers, bfloat16, KV heads and channels as in Llama-3.1-8B; greedy answers of
64 tokens behind a context of random tokens.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from sah_core import Pipeline, compat
from sah_core.attention import Session
from sah_core.patching import use

LAYERS, NEW, WARM_UP = 16, 64, 8


def model_of(context: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=1024,
        max_position_embeddings=context + 256,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def measure(model, ids, pipeline: str, *, offloaded: bool) -> dict[str, object]:
    parsed = Pipeline.parse(pipeline)
    session = Session(parsed, compat.layer_types(model))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    kv_cache = compat.make_cache(model, ids.shape[1] + NEW + WARM_UP + 1, offloaded=offloaded)
    argument = {compat.cache_argument(type(model).forward): kv_cache}
    for begin in range(0, ids.shape[1], 2048):
        model(ids[:, begin : begin + 2048], use_cache=True, logits_to_keep=1, **argument)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    token = ids[:, :1]
    with use(model, session):
        for step in range(WARM_UP + NEW):
            if step == WARM_UP:
                begin.record()
            output = model(token, use_cache=True, logits_to_keep=1, **argument)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        end.record()
    torch.cuda.synchronize()
    return {
        "pipeline": pipeline,
        "cache": "offloaded" if offloaded else "on the card",
        "held_mb": round(held / 2**20),
        "peak_mb": round((torch.cuda.max_memory_allocated() - before) / 2**20),
        "ms_per_token": round(begin.elapsed_time(end) / NEW, 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--context", type=int, default=32768)
    arguments.add_argument("--pipeline", nargs="*", default=["dense", "sink(16) | local(512)"])
    asked = arguments.parse_args()
    torch.manual_seed(0)
    model = model_of(asked.context)
    ids = torch.randint(0, 1024, (1, asked.context), device="cuda")
    for pipeline in asked.pipeline:
        for offloaded in (False, True):
            made = measure(model, ids, pipeline, offloaded=offloaded)
            sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
