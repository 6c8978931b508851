"""Artefacts are refused with other weights than those that they were made from."""

import pytest
import torch

from sah_core import Pipeline, Request
from sah_core.artifacts import Material
from sah_core.errors import ArtifactError
from sah_core.models import ModelSource
from sah_core.origin import SIGNS, check_origin, weight_signature
from sah_core.patching import attach
from sah_plugins.adapters.hf.adapter import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.artifacts.files import read_safetensors, write_safetensors
from sah_plugins.maskers.double_sparsity.calibration import ChannelCalibration
from sah_plugins.maskers.hash_attention.training import HashTraining

pytestmark = pytest.mark.unit

TEXT = "the cat sat on the mat and the dog ran in the sun. " * 40
TOOLS = {
    "double-sparsity": (ChannelCalibration(samples=2, length=24), "sorted_channel_file={}"),
    "hash-attention": (
        HashTraining(steps=1, length=24, chunk=24, hidden=4, bits=8),
        "hat_weight_file={}, hat_bits=8",
    ),
}


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """A function: the step of a masker with an artefact made from the model of seed 0."""
    folder, model = tmp_path_factory.mktemp("made"), models.build("llama")
    material = Material(model=model, tokenizer=models.tokenizer(), name="tiny", texts=[TEXT])
    for name, (tool, _) in TOOLS.items():
        tool.make(material, folder / f"{name}.safetensors", lambda *step: None)

    def step(name):
        return f"{name}(4, {TOOLS[name][1].format(folder / f'{name}.safetensors')})"

    return step


def agreement(one, other):
    (layout, signs), (here, others) = one.split("-"), other.split("-")
    assert layout == here
    return 1 - (int(signs, 16) ^ int(others, 16)).bit_count() / SIGNS


def changed(model, function):
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(function(weight))
    return model


def in_steps(weight):
    """Rounded to 15 levels, as in 4 bits."""
    step = weight.abs().amax(-1, keepdim=True) / 7
    return (weight / step).round() * step


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3", "qwen3-moe"])
def test_signatures_tell_weights_apart_and_not_forms_of_the_same(models, family):
    own = weight_signature(models.build(family))
    assert weight_signature(models.build(family)) == own
    assert agreement(own, weight_signature(models.build(family, seed=1))) < 0.65
    assert weight_signature(models.build(family).to(torch.bfloat16)) == own
    assert agreement(own, weight_signature(changed(models.build(family), in_steps))) > 0.85
    torch.manual_seed(2)
    tuned = changed(
        models.build(family), lambda w: w + 0.1 * w.std(correction=0) * torch.randn_like(w)
    )
    assert agreement(own, weight_signature(tuned)) > 0.9


def test_weights_that_are_not_there_have_no_signature(models):
    model = models.build("llama")
    assert weight_signature(model.to("meta")) is None


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("control", [False, True])
def test_an_artefact_of_other_weights_of_equal_shape_is_refused(models, made, name, control):
    text = f'random-at-budget("{made(name)}")' if control else made(name)
    message = r"made from other weights than this model's \(tiny, whose weights agree with these in"
    with (
        pytest.raises(ArtifactError, match=message),
        attach(models.build("llama", seed=1), f"sink(1) | {text}"),
    ):
        pass
    with attach(models.build("llama").to(torch.bfloat16), f"sink(1) | {text}"):
        pass


@pytest.mark.parametrize("phases", ["", " @ prefill=sparse"])
def test_an_adapter_refuses_it_before_it_reads_the_context(models, made, phases, monkeypatch):
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    model = models.build("llama", seed=1)
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    adapter = HuggingFaceAdapter.of(loaded, made("double-sparsity") + phases)
    monkeypatch.setattr(adapter, "prefill", None)
    with pytest.raises(ArtifactError, match="made from other weights"):
        adapter.process_request(Request(context="the hen and the rat", questions="an ant?"))
    with pytest.raises(ArtifactError, match="made from other weights"):
        adapter.check_pipeline(made("hash-attention"))


def test_a_file_that_does_not_say_where_it_is_from_is_taken(models, made, tmp_path):
    other = models.build("llama", seed=1)
    path = Pipeline.parse(made("double-sparsity")).steps[0].sorted_channel_file
    tensors, metadata = read_safetensors(path)
    for number, origin in enumerate([None, "", "12345678-abc", "no-thing", metadata["origin"][9:]]):
        facts = {key: value for key, value in metadata.items() if key != "origin"}
        file = tmp_path / f"{number}.safetensors"
        write_safetensors(file, tensors, facts if origin is None else {**facts, "origin": origin})
        check_origin(Pipeline.parse(f"double-sparsity(4, sorted_channel_file={file})"), other)


def test_the_layout_must_be_the_same_for_signs_to_count(models, made):
    wider = models.build("llama", seed=1, hidden_size=48)
    check_origin(Pipeline.parse(made("double-sparsity")), wider)
