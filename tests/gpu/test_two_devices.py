"""A model spread over two devices gives the answers of the model on one."""

from __future__ import annotations

import pytest
import torch

from sah_core import Request, UnsupportedError, hookimpl
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

TEXT = "the hen and the rat are on the hearth. an ant is in the red tin. " * 4
REQUEST = Request(context=TEXT, questions=("who is in the tin?", "where is the hen?"))
NEW = {"max_new_tokens": 8}
PIPELINES = (
    "dense",
    "sink(4) | local(8)",
    "sink(0.05) | local(0.1) | oracle-top-k(0.1)",
    "sink(4) | local(8) | quest(16, page_size=4)",
    "sink(4) | local(8) | quest(16, page_size=4) @ prefill=sparse",
)


class Devices:
    """Where the tensors of each layer are."""

    def __init__(self) -> None:
        self.seen: dict[int, set[torch.device]] = {}

    @hookimpl
    def sah_mask_built(self, inputs, mask) -> None:
        limits = inputs.allowed
        tensors = [inputs.query, inputs.key, inputs.value, limits.start, limits.stop, limits.first]
        tensors += [t for part in mask.ranges for t in (part.start, part.stop)]
        if mask.selected is not None:
            tensors.append(mask.selected.indices)
        self.seen.setdefault(inputs.layer, set()).update(t.device for t in tensors)


def wrap(models, model) -> HuggingFaceAdapter:
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    return HuggingFaceAdapter.of(loaded)


def spread(models, family):
    from accelerate import dispatch_model

    model = models.build(family, num_hidden_layers=4, **layers(family))
    inner = [name for name, _ in model.model.named_children() if name != "layers"]
    places = {name: 0 for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": 0 for name in inner}
    places |= {f"model.layers.{i}": 0 if i < 2 else 1 for i in range(4)}
    places["model.norm"] = places["lm_head"] = 1
    return dispatch_model(model, places)


def layers(family):
    if family == "gemma3":
        return {"layer_types": ["sliding_attention", "full_attention"] * 2}
    if family == "qwen3-next":
        return {"layer_types": ["linear_attention", "full_attention"] * 2}
    return {}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_two_devices(models, family, pipeline) -> None:
    one = wrap(models, models.build(family, num_hidden_layers=4, **layers(family)).to("cuda:0"))
    two = wrap(models, spread(models, family))
    assert {d.index for d in two.devices} == {0, 1}
    answers = []
    for adapter in (one, two):
        seen = Devices()
        prefilled = adapter.prefill(REQUEST, None, pipeline)
        response = adapter.answer(prefilled, pipeline, NEW, observers=[seen])
        answers.append([d.token_ids for d in response.details])
    assert answers[0] == answers[1]
    assert all(len(devices) == 1 for devices in seen.seen.values())
    assert {d.index for devices in seen.seen.values() for d in devices} >= (
        {0, 1} if pipeline != "dense" else set()
    )
    batch = [REQUEST, Request(context="an ant. ", questions="who is it?")]
    expected = [d.token_ids for r in [one.process_requests(batch, NEW)][0] for d in r.details]
    assert [d.token_ids for r in two.process_requests(batch, NEW) for d in r.details] == expected


def test_two_devices_cannot_be_captured(models) -> None:
    adapter = wrap(models, spread(models, "llama"))
    with pytest.raises(UnsupportedError, match="several devices"):
        adapter.capture_decode(adapter.prefill(REQUEST), "sink(4) | local(8)")
