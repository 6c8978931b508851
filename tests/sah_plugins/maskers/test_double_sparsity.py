"""Double sparsity against its definition, its channel files, and its calibration."""

import json

import attrs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sah_core import Allowed, Pipeline, Size, attach
from sah_core.artifacts import Material, watch_attention
from sah_core.attention import layer_info
from sah_core.errors import (
    ArtifactError,
    MissingParameterError,
    ParameterError,
    RequestError,
    UnsupportedError,
)
from sah_core.parameters import from_plain
from sah_core.testing import CHECKS
from sah_plugins.artifacts.texts import token_windows
from sah_plugins.maskers.double_sparsity import DoubleSparsity
from sah_plugins.maskers.double_sparsity.calibration import ChannelCalibration

pytestmark = pytest.mark.unit

NAME = "model.layers.{}.self_attn.{}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, tmp_path):
    check(DoubleSparsity.example(tmp_path))


def orders(heads, head_dim=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(heads, head_dim, generator=draw).argsort(dim=1)


def channel_file(folder, *, layers=2, heads=4, head_dim=8, selection="qk_proj"):
    names = {
        NAME.format(layer, selection): orders(heads, head_dim, seed=layer).tolist()
        for layer in range(layers)
    }
    path = folder / "channels.json"
    path.write_text(json.dumps(names))
    return path


def rounded(vector, bits):
    if bits == 16:
        return vector
    step = (vector.max() - vector.min()) / (2**bits - 1)
    return torch.round((vector - vector.min()) / step) * step + vector.min()


def expected(masker, inputs, order):
    """Row by row: scores of the rounded channels, the best keys that may be attended."""
    batch, heads, query_len, key_len = inputs.shape
    count, bits = 8 // masker.group_factor, masker.label_bits
    keep = inputs.allowed.to_dense(key_len).expand(batch, 1, query_len, key_len)
    result = torch.zeros(inputs.shape, dtype=torch.bool)
    query, key = inputs.query.double(), inputs.key.double()
    for b in range(batch):
        first = int(inputs.allowed.first.expand(batch)[b])
        size = masker.heavy_size.resolve(key_len - first)
        for head in range(heads):
            members = [head]
            if masker.group_reduction != "none":
                members = [head // inputs.group * inputs.group + i for i in range(inputs.group)]
            for row in range(query_len):
                scores = {}
                for k in keep[b, 0, row].nonzero().flatten().tolist():
                    each = []
                    for member in members:
                        at = order[member * order.shape[0] // heads, :count]
                        label = rounded(key[b, head // inputs.group, k, at], bits)
                        each.append(float(rounded(query[b, member, row, at], bits) @ label))
                    scores[k] = max(each) if masker.group_reduction == "max" else sum(each)
                best = sorted(scores, key=lambda k: (-scores[k], k))[:size]
                result[b, head, row, best] = True
    return result


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [16, 4, 3])
@pytest.mark.parametrize("lists", [4, 2])
def test_the_selection_is_that_of_the_definition(calls, tmp_path, lists, bits, reduction):
    masker = DoubleSparsity(
        heavy_size=0.2,
        sorted_channel_file=str(channel_file(tmp_path, heads=lists)),
        group_factor=2,
        label_bits=bits,
        group_reduction=reduction,
    )
    for inputs in (calls.tiny(), calls.tiny(7), calls.tiny(2, first=[0, 40])):
        got = calls.chosen(masker, calls.with_state(masker, inputs))
        assert torch.equal(got, expected(masker, inputs, orders(lists, seed=1)))


def test_every_layer_has_its_own_channels(calls, tmp_path):
    path = channel_file(tmp_path)
    masker = DoubleSparsity(heavy_size=9, sorted_channel_file=str(path), group_factor=4)
    selections = []
    for layer in (0, 1):
        inputs = calls.with_state(masker, attrs.evolve(calls.tiny(), layer=layer))
        selections.append(calls.chosen(masker, inputs))
        assert torch.equal(selections[-1], expected(masker, inputs, orders(4, seed=layer)))
    assert not torch.equal(*selections)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_length_on_the_device_selects_what_a_host_length_does(calls, tmp_path, bits):
    masker = DoubleSparsity(
        heavy_size=0.2, sorted_channel_file=str(channel_file(tmp_path)), label_bits=bits
    )
    inputs = calls.tiny()
    buffer = torch.zeros(1, 2, 96, 8)
    buffer[:, :, :61] = inputs.key
    captured = attrs.evolve(
        inputs,
        key=buffer,
        value=buffer,
        key_len=None,
        length=torch.tensor([61], dtype=torch.int32),
        allowed=Allowed.causal(1, 61),
    )
    state = masker.init_state(layer_info(captured))
    masker.append(state, inputs.key[:, :, :60], inputs.key[:, :, :60], 0)
    start = torch.tensor([60], dtype=torch.int32)
    masker.append(state, inputs.key[:, :, 60:], inputs.key[:, :, :0], start)
    got = calls.chosen(masker, attrs.evolve(captured, state=state))
    assert torch.equal(got[..., :61], calls.chosen(masker, calls.with_state(masker, inputs)))
    assert not got[..., 61:].any()


def test_labels_take_the_bits_that_are_said(calls, tmp_path):
    path = str(channel_file(tmp_path))
    inputs = calls.tiny()
    labels = {}
    for bits in (2, 4, 16):
        masker = DoubleSparsity(sorted_channel_file=path, group_factor=2, label_bits=bits)
        labels[bits] = masker.bytes_read(calls.with_state(masker, inputs))
    # four channels in a word or in four floats, and step and minimum beside codes
    assert labels == {2: 4 * 61 * (4 + 8), 4: 4 * 61 * (4 + 8), 16: 4 * 61 * 16}


def test_buffers_grow_when_the_context_outgrows_the_capacity(calls, tmp_path):
    masker = DoubleSparsity(heavy_size=9, sorted_channel_file=str(channel_file(tmp_path)))
    inputs = calls.tiny()
    short = attrs.evolve(inputs, key=inputs.key[:, :, :5], value=inputs.key[:, :, :5], key_len=5)
    state = masker.init_state(layer_info(short))
    for start, stop in ((0, 5), (5, 6), (6, 40), (40, 61)):
        part = inputs.key[:, :, start:stop]
        masker.append(state, part, part, start)
    got = calls.chosen(masker, attrs.evolve(inputs, state=state))
    assert torch.equal(got, calls.chosen(masker, calls.with_state(masker, inputs)))


def test_the_channel_file_is_required():
    with pytest.raises(MissingParameterError, match="sorted_channel_file"):
        from_plain(DoubleSparsity, {})
    with pytest.raises(ParameterError, match="qk_proj"):
        DoubleSparsity(sorted_channel_file="x", channel_selection="v_proj")


# Bad files


def write(folder, content):
    path = folder / "channels.json"
    if isinstance(content, dict):
        content = json.dumps({NAME.format(*key): value for key, value in content.items()})
    path.write_text(content)
    return str(path)


GOOD = orders(4).tolist()
DAMAGED = {
    "truncated": ('{"model.layers.0.self_attn.qk_proj": [[1, 2', "no whole JSON file"),
    "no object": ("[1, 2]", "no object of named lists"),
    "foreign names": ('{"layer0": [[0, 1]]}', "nothing in it is named like"),
    "other selection": ({(0, "k_proj"): GOOD}, "it holds no qk_proj channels; set"),
    "channel out of range": (
        {(0, "qk_proj"): [[0, 1, 2], [0, 1, 3]]},
        "qk_proj, head 1: expected each of the channels 0 to 2 once",
    ),
    "channel twice": ({(0, "qk_proj"): [[0, 1, 1]]}, "head 0: expected each of the channels"),
    "ragged": ({(0, "qk_proj"): [[0, 1], [0]]}, "no table of integers"),
    "floats": ({(0, "qk_proj"): [[0.5, 1.0]]}, "no table of integers"),
    "words": ({(0, "qk_proj"): [["a"]]}, "no table of integers"),
    "empty": ({(0, "qk_proj"): []}, "no table of integers"),
    "no names": ("{}", "nothing in it is named like"),
    "nothing": ("", "no whole JSON file"),
    "nested without end": ("[" * 100_000, "no whole JSON file"),
    "not a number": ({(0, "qk_proj"): [[float("nan"), 1]]}, "no table of integers"),
    "too great": ({(0, "qk_proj"): [[10**30, 1]]}, "no table of integers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_channel_file_is_refused_before_a_model_is_there(tmp_path, case):
    content, message = DAMAGED[case]
    masker = DoubleSparsity(sorted_channel_file=write(tmp_path, content))
    with pytest.raises(ArtifactError, match=message) as caught:
        masker.check_artifacts()
    assert "\n" not in str(caught.value)
    assert "channels.json" in str(caught.value)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "channels.safetensors"
    save_file({NAME.format(0, "qk_proj"): orders(4).to(torch.int16)}, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="no whole safetensors file"):
        DoubleSparsity(sorted_channel_file=str(path)).check_artifacts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_channels_of_another_type_are_refused(tmp_path, dtype):
    path = tmp_path / "channels.safetensors"
    save_file({NAME.format(0, "qk_proj"): orders(4).to(dtype)}, path)
    with pytest.raises(ArtifactError, match="no table of integers"):
        DoubleSparsity(sorted_channel_file=str(path)).check_artifacts()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="there is no such file"):
        DoubleSparsity(sorted_channel_file=str(tmp_path / "none.json")).check_artifacts()


OTHER_MODELS = {
    "heads": ({(0, "qk_proj"): GOOD, (1, "qk_proj"): orders(3).tolist()}, "layer 1 has 3 heads"),
    "channels": ({(1, "qk_proj"): orders(4, 16).tolist()}, "heads of 16 channels"),
    "layers": ({(1, "qk_proj"): GOOD, (2, "qk_proj"): GOOD}, "it has a layer 2, but the model"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_channel_file_of_another_model_is_refused(calls, tmp_path, case):
    content, message = OTHER_MODELS[case]
    masker = DoubleSparsity(sorted_channel_file=write(tmp_path, content))
    masker.check_artifacts()
    with pytest.raises(UnsupportedError, match=message) as caught:
        masker.init_state(layer_info(calls.tiny()))
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_in_the_file_is_refused(calls, tmp_path):
    masker = DoubleSparsity(sorted_channel_file=write(tmp_path, {(0, "qk_proj"): GOOD}))
    with pytest.raises(ArtifactError, match="holds no qk_proj channels of layer 1"):
        masker.init_state(layer_info(calls.tiny()))


# Calibration


@pytest.fixture(scope="module")
def tiny(models):
    return models.build("llama"), models.tokenizer()


TEXT = "the cat sat on the mat and the dog ran in the sun. " * 40


def material(tiny):
    return Material(model=tiny[0], tokenizer=tiny[1], name="tiny", texts=[TEXT])


def test_windows_longer_than_the_models_context_are_refused(tmp_path, tiny):
    tool = ChannelCalibration(length=513)
    with pytest.raises(RequestError, match="length = 513 is more than the 512 tokens"):
        tool.make(material(tiny), tmp_path / "channels.json", lambda *step: None)


def expected_sums(model, windows):
    """All causal pairs, one by one, from the keys and queries of a plain forward pass."""
    found = {}
    for window in windows:

        def watch(inputs):
            q, k = inputs.query[0].abs().double(), inputs.key[0].abs().double()
            group = q.shape[0] // k.shape[0]
            for head in range(q.shape[0]):
                pairs = sum(
                    q[head, i] * k[head // group, j]
                    for i in range(q.shape[1])
                    for j in range(i + 1)
                )
                total = found.setdefault((inputs.layer, head), torch.zeros_like(pairs))
                total += pairs

        watch_attention(model, window, watch)
    return found


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_channels_are_ranked_by_the_mean_product_over_causal_pairs(tmp_path, tiny, suffix):
    model, tokenizer = tiny
    path = tmp_path / f"channels.{suffix}"
    steps = []
    tool = ChannelCalibration(samples=3, length=7)
    facts = tool.make(material(tiny), path, lambda *step: steps.append(step[:2]))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert facts["layers"] == model.config.num_hidden_layers
    sums = expected_sums(model, token_windows(tokenizer, [TEXT], 7, 3))
    if suffix == "json":
        content = {name: torch.tensor(v) for name, v in json.loads(path.read_text()).items()}
    else:
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "double-sparsity-channels"
            assert file.metadata()["model"] == "tiny"
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for (layer, head), total in sums.items():
        order = content[NAME.format(layer, "qk_proj")][head].long()
        assert torch.equal(order, total.argsort(descending=True))


def test_the_file_fits_the_model_it_was_made_for(tmp_path, tiny):
    model, tokenizer = tiny
    for per_kv_head, selection in ((False, "q_proj"), (True, "qk_proj"), (False, "k_proj")):
        path = tmp_path / f"{per_kv_head}-{selection}.safetensors"
        tool = ChannelCalibration(samples=2, length=16, per_kv_head=per_kv_head)
        tool.make(material(tiny), path, lambda *step: None)
        masker = DoubleSparsity(
            heavy_size=3,
            sorted_channel_file=str(path),
            group_factor=2,
            channel_selection=selection,
        )
        ids = tokenizer(TEXT[:60], return_tensors="pt").input_ids
        with torch.no_grad(), attach(model, Pipeline.of(masker, prefill="sparse")) as session:
            assert model(ids).logits.isfinite().all()
        [state] = session.layers[0].states.values()
        heads = model.config.num_attention_heads
        kv_heads = model.config.num_key_value_heads
        shared = per_kv_head or selection == "k_proj"
        assert state.channels.shape[0] == (kv_heads if shared else heads)


def test_sizes_are_declared():
    assert DoubleSparsity(sorted_channel_file="x").heavy_size == Size(fraction=0.05)
