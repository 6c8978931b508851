"""A cache in the host's memory: the same answers, and less of the card's."""

from __future__ import annotations

import pytest
import torch

from sah_core import Request
from sah_core.compat.offloaded import OffloadedCache, OffloadedLayer
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = "the hen and the rat are on the hearth. an ant is in the red tin. " * 6
REQUEST = Request(context=TEXT, questions=("who is in the tin?", "where is the hen?"))
OTHER = Request(context=TEXT[40:], questions=("where is the hen?",))
NEW = {"max_new_tokens": 12}
OFFLOADED = {"cache_implementation": "offloaded"}
PIPELINES = (
    "dense",
    "sink(4) | local(8)",
    "sink(4) | local(8) | quest(16, page_size=4)",
    "sink(4) | local(8) | quest(16, page_size=4) @ prefill=sparse",
    "pq-cache(16)",
)


def wrap(models, model, pipeline="dense") -> HuggingFaceAdapter:
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    return HuggingFaceAdapter.of(loaded, pipeline)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_answers_are_those_from_the_card(models, family, pipeline) -> None:
    adapter = wrap(models, models.build(family).to("cuda"), pipeline)
    kept = adapter.prefill(REQUEST, generation_kwargs=OFFLOADED, pipeline=pipeline)
    assert isinstance(kept.cache, OffloadedCache)
    for layer in kept.cache.layers:
        if isinstance(layer, OffloadedLayer) and layer.length:
            assert layer.key_buffer.device.type == "cpu"
            assert layer.key_buffer.is_pinned()
    for requests in ([REQUEST], [REQUEST, OTHER]):
        for options in ({}, {"prefill_chunk_size": 64}):
            made = adapter.process_requests(requests, {**NEW, **options, **OFFLOADED})
            expected = adapter.process_requests(requests, {**NEW, **options})
            assert [r.responses for r in made] == [r.responses for r in expected]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_ways_to_generate_follow(models, options) -> None:
    adapter = wrap(models, models.build("llama").to("cuda"), "sink(4) | local(8)")
    made = adapter.process_request(REQUEST, {**NEW, **options, **OFFLOADED})
    assert made.responses == adapter.process_request(REQUEST, {**NEW, **options}).responses


def test_the_card_holds_the_keys_of_few_layers_at_once(models) -> None:
    layers, tokens = 12, 8192
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": tokens + 100}
    model = models.build("llama", hidden_size=256, num_key_value_heads=4, head_dim=64, **sizes)
    adapter = wrap(models, model.to("cuda"))
    context = ("the hen and the rat are on the hearth. " * tokens)[: 4 * tokens]
    request = Request(context=context, questions=["where is the hen?"])
    limit = {"max_context_length": tokens - 100}
    held = {}
    for name in ("dynamic", "offloaded"):
        options = {**NEW, "cache_implementation": name}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        prefilled = adapter.prefill(request, limit, generation_kwargs=options)
        torch.cuda.synchronize()
        after_prefill = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        answer = adapter.answer(prefilled, generation_kwargs=options)
        peak = torch.cuda.max_memory_allocated() - before
        held[name] = after_prefill, peak, answer.responses
        del prefilled, answer
    layer = 2 * (tokens - 100) * 4 * 64 * 4
    assert held["dynamic"][0] >= layers * layer
    assert held["offloaded"][0] <= 2 * layer
    # two layers, each with the copy that holds the new token as well, and what attention makes
    assert held["offloaded"][1] <= 6 * layer < held["dynamic"][1]
    assert held["offloaded"][2] == held["dynamic"][2]
