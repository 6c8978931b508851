"""Captured decoding equals eager decoding token for token (without a graph on the CPU)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import (
    Capabilities,
    Inputs,
    Mask,
    Masker,
    Pipeline,
    Request,
    UnsupportedError,
    registry,
)
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from tests import models

pytestmark = pytest.mark.unit

PIPELINES = (
    "dense",
    "sink(4) | local(8)",
    "sink(0.05) | local(0.1)",
    "sink(4) | local(0.1) | quest(heavy_size=0.3, page_size=4)",
    "sink(4) | quest(heavy_size=16, page_size=4, group_reduction=sum) | oracle-top-k(0.1)",
    "oracle-top-k(0.2) @ dense_layers=[0]",
    "sink(4) | magicpig(lsh_l=20, lsh_k=3, max_size=0.2)",
    "local(8) | socket(0.2, lsh_l=10, lsh_k=4, group_reduction=sum)",
    "sink(2) | pq-cache(0.2, pq_bits=3)",
    "pq-cache(0.2, pq_bits=8, metric=ip)",
    "sink(2) | oracle-top-p(0.7, max_size=24)",
    "sink(2) | value-aware-top-k(0.2)",
    "local(4) | random-sampling(0.2)",
    "sink(2) | adaptive-sampling(4, epsilon=0.5, max_size=16)",
    "local(4) | quest(64, page_size=4) | twilight(0.8)",
    'random-at-budget("sink(2) | value-aware-top-k(0.2)")',
)


@pytest.fixture(scope="module")
def adapter() -> HuggingFaceAdapter:
    loaded = Loaded(
        model=models.build("llama"),
        tokenizer=models.tokenizer(),
        source=ModelSource(kind="folder", location="nowhere", label="tiny"),
        weights_hash="none",
    )
    return HuggingFaceAdapter.of(loaded)


def request() -> Request:
    return Request(context="the quick brown fox " * 8, questions=["where is it?", "and why so?"])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_captured_tokens_equal_eager_ones(adapter: HuggingFaceAdapter, pipeline: str) -> None:
    new = 24
    options = {"max_new_tokens": new, "eos_token_id": [10**6]}
    for index in (0, 1):
        prefilled = adapter.prefill(request())
        eager = adapter.answer(prefilled, pipeline, options, indices=[index]).details[0].token_ids
        loop = adapter.capture_decode(prefilled, pipeline, index=index, room=new)
        first = int(loop.token)
        assert (first, *loop.generate(new - 1)[0]) == eager


def test_windows_and_fractions_follow_the_growing_length(adapter: HuggingFaceAdapter) -> None:
    loop = adapter.capture_decode(adapter.prefill(request()), "local(0.1)", room=40)
    before = int(loop.capture.length)
    loop.generate(40)
    assert int(loop.capture.length) == before + 40
    assert int(loop.capture.position) == before + 39


def test_more_tokens_than_room_are_refused(adapter: HuggingFaceAdapter) -> None:
    loop = adapter.capture_decode(adapter.prefill(request()), "local(8)", room=2)
    loop.generate(2)
    with pytest.raises(UnsupportedError, match="more than 2 tokens"):
        loop.step()


def test_a_selection_without_a_bound_is_refused(adapter: HuggingFaceAdapter) -> None:
    with pytest.raises(UnsupportedError, match="give it a max_size"):
        adapter.capture_decode(adapter.prefill(request()), "oracle-top-p(0.7)")


def test_a_masker_that_looks_at_the_last_queries_is_refused(adapter: HuggingFaceAdapter) -> None:
    @attrs.frozen(kw_only=True)
    class Looks(Masker):
        name: ClassVar[str] = "looks"
        capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"window_queries"}))

        def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
            assert inputs.window_queries is not None
            return Mask.full(inputs.shape)

    with pytest.raises(UnsupportedError, match=r"'looks' in captured decoding.*window_queries"):
        adapter.capture_decode(adapter.prefill(request()), Pipeline.of(Looks()))


@pytest.mark.parametrize("pipeline", ["value-aware-top-k(8)", "quest(16, page_size=4)"])
def test_states_make_room_for_the_tokens_to_come(
    adapter: HuggingFaceAdapter, pipeline: str
) -> None:
    new = 6
    options = {"max_new_tokens": new, "eos_token_id": [10**6]}
    prefilled = adapter.prefill(request())
    eager = adapter.answer(prefilled, pipeline, options, indices=[0]).details[0].token_ids
    loop = adapter.capture_decode(adapter.prefill(request()), pipeline, room=2000)
    first = int(loop.token)
    assert (first, *loop.generate(new - 1)[0]) == eager


def test_eos_ends_a_sequence(adapter: HuggingFaceAdapter) -> None:
    loop = adapter.capture_decode(adapter.prefill(request()), "local(8)", room=20)
    tokens = loop.generate(20)[0]
    again = adapter.capture_decode(adapter.prefill(request()), "local(8)", room=20)
    assert again.generate(20, eos=[tokens[3]])[0] == tokens[: tokens.index(tokens[3]) + 1]


def test_layers_whose_length_cannot_live_on_the_device_are_refused() -> None:
    loaded = Loaded(
        model=models.build("gemma3"),
        tokenizer=models.tokenizer(),
        source=ModelSource(kind="folder", location="nowhere", label="tiny"),
        weights_hash="none",
    )
    sliding = HuggingFaceAdapter.of(loaded)
    with pytest.raises(UnsupportedError, match="cannot live on the device"):
        sliding.capture_decode(sliding.prefill(request()), "local(8)")


def test_the_backend_that_decodes_is_one_that_reads_no_host_length(
    adapter: HuggingFaceAdapter,
) -> None:
    loop = adapter.capture_decode(adapter.prefill(request()), "sink(4) | local(8)", room=2)
    loop.step()
    assert loop.session.backends_used <= set(registry.backends.names()) - {"sdpa"}
    assert torch.isfinite(loop.capture.length.float()).all()
