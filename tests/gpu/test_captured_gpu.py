"""Decode steps replayed from a CUDA graph equal eager decoding token for token."""

from __future__ import annotations

import pytest
import torch

from sah_core import Allowed, Inputs, Pipeline, compat
from sah_core.attention import Session
from sah_core.patching import use

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PIPELINES = (
    "dense",
    "sink(4) | local(16)",
    "sink(0.05) | local(0.1)",
    "sink(4) | local(16) | quest(heavy_size=0.2, page_size=16)",
    "sink(4) | local(0.1) | quest(heavy_size=64, page_size=32, group_reduction=sum)",
    "sink(4) | local(16) | oracle-top-k(0.1)",
)


def tiny_llama(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def started(
    model: torch.nn.Module, pipeline: Pipeline, ids: torch.Tensor
) -> tuple[Session, object]:
    """A cache that holds the context, and a session whose states know it."""
    kv_cache = compat.make_cache(model, ids.shape[1] + 64)
    name = compat.cache_argument(type(model).forward)
    model(input_ids=ids, use_cache=True, **{name: kv_cache})
    session = Session(pipeline, compat.layer_types(model))
    calls = {
        layer: Inputs(
            query=key.new_empty(key.shape[0], 8, 0, key.shape[3]),
            key=key,
            value=value,
            allowed=Allowed.causal(0, key.shape[2], device=key.device),
            scaling=key.shape[3] ** -0.5,
            key_len=key.shape[2],
            layer=layer,
            layer_count=2,
        )
        for layer, key, value in compat.cached_tensors(kv_cache)
    }
    if pipeline.steps:
        session.end_prefill(calls)
    session.phase = "decode"
    return session, kv_cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text", PIPELINES)
@torch.no_grad()
def test_replayed_tokens_equal_eager_ones(text: str, batch: int) -> None:
    from sah_plugins.adapters.hf.captured import CapturedDecode

    model, pipeline, new = tiny_llama(torch.float32), Pipeline.parse(text), 40
    ids = torch.randint(0, 128, (batch, 500), device="cuda")
    token = torch.full((batch, 1), 7, device="cuda")
    session, kv_cache = started(model, pipeline, ids)
    name = compat.cache_argument(type(model).forward)
    expected, fed = [], token
    with use(model, session):
        for _ in range(new):
            output = model(input_ids=fed, use_cache=True, **{name: kv_cache})
            fed = output.logits[:, -1].argmax(-1, keepdim=True)
            expected.append(fed)
    session, kv_cache = started(model, pipeline, ids)
    loop = CapturedDecode(model, session, kv_cache, token, room=new)
    assert loop.graph is not None
    assert torch.equal(torch.tensor(loop.generate(new)), torch.cat(expected, dim=1).cpu())
    if pipeline.steps:
        assert session.backends_used == {"triton"}
