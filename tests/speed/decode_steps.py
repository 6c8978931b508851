"""Whole decode steps of a Llama-3.1-8B shape with random weights, captured and eager, on one GPU.

    python tests/speed/decode_steps.py [--context 131072] [--batch 2] [--layers 32]

The cache is filled with random keys instead of a prefill: the time of a decode step does not
depend on what the keys are, and their page bounds are built by the masker as always. Prints tokens
per second of dense and sparse pipelines, each captured in a CUDA graph and eager, in one process.
"""

import argparse
import gc
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sah_core import Allowed, Inputs, Pipeline, compat
from sah_core.attention import Session
from sah_core.patching import use
from sah_plugins.adapters.hf.captured import CapturedDecode

PIPELINES = (
    "dense",
    "sink(128) | local(128)",
    "sink(128) | local(128) | quest(0.05, page_size=32, group_reduction=sum)",
    "sink(128) | local(128) | quest(0.05, page_size=16, group_reduction=sum)",
)


def fill(model: LlamaForCausalLM, batch: int, context: int, room: int) -> object:
    """A cache of ``context`` random keys with room for more."""
    config = model.config
    kv_cache = compat.make_cache(model, context + room)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in kv_cache.layers:
        key = torch.randn(shape, dtype=model.dtype, device=model.device)
        layer.update(key, key.roll(1, 2))
    return kv_cache


def states(session: Session, model: LlamaForCausalLM, kv_cache: object) -> None:
    """Show the pipeline's maskers the cached keys."""
    config = model.config
    calls = {}
    for layer, key, value in compat.cached_tensors(kv_cache):
        query = key.new_empty(key.shape[0], config.num_attention_heads, 0, key.shape[3])
        calls[layer] = Inputs(
            query=query,
            key=key,
            value=value,
            allowed=Allowed.causal(0, key.shape[2], device=key.device),
            scaling=key.shape[3] ** -0.5,
            key_len=key.shape[2],
            layer=layer,
            layer_count=config.num_hidden_layers,
        )
    session.end_prefill(calls)


@torch.no_grad()
def eager(
    model: LlamaForCausalLM, session: Session, kv_cache: object, token: torch.Tensor, steps: int
) -> float:
    """Seconds per step of the plain loop, the model's own attention where the pipeline is dense."""
    session.phase = "decode"
    snapshot, base = session.snapshot(), compat.snapshot_cache(kv_cache)
    begin = 0.0
    name = compat.cache_argument(type(model).forward)
    with use(model, session):
        for step in range(steps + 3):
            if step == 3:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            output = model(
                input_ids=token,
                **{name: kv_cache},
                use_cache=True,
                logits_to_keep=1,
            )
            token = output.logits[:, -1].argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    session.restore(snapshot)
    compat.restore_cache(kv_cache, base)
    return seconds


def captured(
    model: LlamaForCausalLM, session: Session, kv_cache: object, token: torch.Tensor, steps: int
) -> float:
    """Seconds per replayed step."""
    loop = CapturedDecode(model, session, kv_cache, token, room=steps + 8)
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    kv_cache = fill(model, options.batch, options.context, 256)
    token = torch.ones(options.batch, 1, dtype=torch.int64, device="cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers, "
        f"context {options.context}, batch {options.batch}, bfloat16"
    )
    dense: dict[str, float] = {}
    for text in PIPELINES:
        pipeline = Pipeline.parse(text)
        for kind, measure in (("eager", eager), ("captured", captured)):
            session = Session(pipeline, ("full_attention",) * options.layers)
            base = compat.snapshot_cache(kv_cache)
            if pipeline.steps:
                states(session, model, kv_cache)
            seconds = measure(model, session, kv_cache, token, options.steps)
            compat.restore_cache(kv_cache, base)
            dense.setdefault(kind, seconds)
            print(
                f"{text:75s} {kind:9s} {1e3 * seconds:8.3f} ms/step "
                f"{options.batch / seconds:8.1f} tokens/s  {dense[kind] / seconds:5.2f} x dense",
                flush=True,
            )
            del session
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
