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
    "sink(4) | local(16) | magicpig(lsh_l=40, lsh_k=6, max_size=0.2)",
    "sink(4) | local(16) | magicpig(lsh_l=20, lsh_k=2, max_size=48)",
    "sink(4) | local(16) | socket(0.1, lsh_l=20, lsh_k=8)",
    "sink(4) | local(16) | pq-cache(0.1, pq_bits=6)",
    "sink(4) | local(16) | value-aware-top-k(0.1)",
    "sink(4) | local(16) | oracle-top-p(0.7, max_size=0.3)",
    "sink(4) | local(16) | random-sampling(0.1)",
    "sink(4) | oracle-top-k(0.05) | adaptive-sampling(0.05, epsilon=0.2, max_size=0.4)",
    "sink(4) | adaptive-sampling(8, bound=attention, mode=gumbel, max_size=64)",
    "sink(4) | adaptive-sampling(8, mode=multinomial, max_size=64)",
    "sink(4) | local(16) | quest(0.3) | twilight(0.8)",
    'random-at-budget("sink(4) | local(16) | quest(0.1)")',
)


def llama(heads: int = 8, kv_heads: int = 2, head_dim: int = 64, layers: int = 2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2**18,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.float32).eval()


def started(
    model: torch.nn.Module, pipeline: Pipeline, ids: torch.Tensor
) -> tuple[Session, object]:
    """A cache that holds the context, and a session whose states know it."""
    kv_cache = compat.make_cache(model, ids.shape[1] + 64)
    name = compat.cache_argument(type(model).forward)
    for piece in ids.split(256, dim=1):  # float32 prefill of a whole long context has no kernel
        model(input_ids=piece, use_cache=True, **{name: kv_cache})
    session = Session(pipeline, compat.layer_types(model))
    calls = {
        layer: Inputs(
            query=key.new_empty(key.shape[0], model.config.num_attention_heads, 0, key.shape[3]),
            key=key,
            value=value,
            allowed=Allowed.causal(0, key.shape[2], device=key.device),
            scaling=key.shape[3] ** -0.5,
            key_len=key.shape[2],
            layer=layer,
            layer_count=model.config.num_hidden_layers,
        )
        for layer, key, value in compat.cached_tensors(kv_cache)
    }
    if pipeline.steps:
        session.end_prefill(calls)
    session.phase = "decode"
    return session, kv_cache


def eager_and_replayed(model, pipeline: Pipeline, ids: torch.Tensor, new: int):
    """Tokens of both ways of decoding, and the session of the second."""
    from sah_plugins.adapters.hf.captured import CapturedDecode

    token = torch.full((ids.shape[0], 1), 7, device="cuda")
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
    return torch.cat(expected, dim=1).cpu(), torch.tensor(loop.generate(new)), session


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("text", PIPELINES)
@torch.no_grad()
def test_replayed_tokens_equal_eager_ones(text: str, batch: int) -> None:
    pipeline = Pipeline.parse(text)
    ids = torch.randint(0, 128, (batch, 500), device="cuda")
    expected, replayed, session = eager_and_replayed(llama(), pipeline, ids, 40)
    assert torch.equal(replayed, expected)
    if pipeline.steps:
        assert session.backends_used == {"triton"}


@pytest.mark.parametrize("text", PIPELINES[1:])
@torch.no_grad()
def test_they_are_equal_on_a_large_shape_too(text: str) -> None:
    """32 query heads on 8 KV heads of 128 channels over 65,536 keys, two sequences."""
    model = llama(heads=32, kv_heads=8, head_dim=128, layers=2)
    ids = torch.randint(0, 128, (2, 65536), device="cuda")
    expected, replayed, session = eager_and_replayed(model, Pipeline.parse(text), ids, 24)
    assert torch.equal(replayed, expected)
    assert session.backends_used == {"triton"}
