"""Hash attention against its definition, its weight files, their conversion and training."""

import pickle
import subprocess
from collections import OrderedDict

import attrs
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sah_core import Allowed, Pipeline, Size, attach
from sah_core.artifacts import Material
from sah_core.attention import layer_info
from sah_core.errors import ArtifactError, MissingParameterError, RequestError, UnsupportedError
from sah_core.parameters import from_plain
from sah_core.testing import CHECKS
from sah_plugins.maskers import hash_attention
from sah_plugins.maskers.hash_attention import HashAttention
from sah_plugins.maskers.hash_attention.pickled import PickleConversion
from sah_plugins.maskers.hash_attention.training import (
    HashTraining,
    LayerTraining,
    best_keys,
    random_functions,
    recall,
)
from sah_plugins.maskers.hash_attention.weights import read_weights, write_weights

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, tmp_path):
    check(HashAttention.example(tmp_path))


def functions(heads=4, key_heads=4, widths=(8, 6, 5, 32), seed=0):
    return random_functions(heads, key_heads, widths, torch.Generator().manual_seed(seed))


def weight_file(folder, *, layers=2, **options):
    path = folder / "weights.safetensors"
    made = {layer: functions(seed=layer, **options) for layer in range(layers)}
    write_weights(path, made, {"model": "tiny"})
    return str(path)


def outputs(mlp, head, vector):
    """The MLP of one head, one vector at a time."""
    for index, (weight, bias) in enumerate(mlp):
        if index:
            vector = vector * torch.sigmoid(vector)
        vector = vector @ weight[head] + bias[head, 0]
    return vector


def signs(mlp, head, vector):
    return outputs(mlp, head, vector) > 0


def expected(masker, inputs, hashed):
    batch, heads, query_len, key_len = inputs.shape
    keep = inputs.allowed.to_dense(key_len).expand(batch, 1, query_len, key_len)
    result = torch.zeros(inputs.shape, dtype=torch.bool)
    for b in range(batch):
        size = masker.heavy_size.resolve(key_len - int(inputs.allowed.first.expand(batch)[b]))
        for head in range(heads):
            group = head // inputs.group
            members = [head]
            if masker.group_reduction != "none":
                members = [group * inputs.group + i for i in range(inputs.group)]
            own = {m: m * hashed.key_heads // heads for m in members}
            for row in range(query_len):
                scores = {}
                for k in keep[b, 0, row].nonzero().flatten().tolist():
                    each = [
                        int(
                            (
                                signs(hashed.query, m, inputs.query[b, m, row])
                                == signs(hashed.key, own[m], inputs.key[b, group, k])
                            ).sum()
                        )
                        for m in members
                    ]
                    scores[k] = max(each) if masker.group_reduction == "max" else sum(each)
                best = sorted(scores, key=lambda k: (-scores[k], k))[:size]
                result[b, head, row, best] = True
    return result


@pytest.mark.parametrize("reduction", ["none", "sum", "max"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_selection_is_that_of_the_definition(calls, tmp_path, key_heads, reduction):
    path = weight_file(tmp_path, key_heads=key_heads)
    masker = HashAttention(heavy_size=0.2, hat_weight_file=path, group_reduction=reduction)
    for inputs in (
        calls.tiny(key_len=40),
        calls.tiny(3, key_len=31),
        calls.tiny(1, key_len=31, first=[0, 20]),
    ):
        got = calls.chosen(masker, calls.with_state(masker, inputs))
        hashed = functions(seed=1, key_heads=key_heads)
        assert torch.equal(got, expected(masker, inputs, hashed))


def test_signatures_longer_than_a_word_are_compared_whole(calls, tmp_path):
    path = weight_file(tmp_path, widths=(8, 6, 40))
    masker = HashAttention(heavy_size=7, hat_weight_file=path, hat_bits=40)
    inputs = calls.with_state(masker, calls.tiny(key_len=40))
    assert inputs.state.words.shape[3] == 2
    assert torch.equal(
        calls.chosen(masker, inputs), expected(masker, inputs, functions(widths=(8, 6, 40), seed=1))
    )


def test_of_keys_that_agree_equally_the_earlier_win(calls, tmp_path):
    masker = HashAttention(heavy_size=5, hat_weight_file=weight_file(tmp_path))
    inputs = calls.tiny()
    inputs = attrs.evolve(inputs, key=inputs.key[:, :, :1].expand(-1, -1, 61, -1).clone())
    got = calls.chosen(masker, calls.with_state(masker, inputs))
    assert torch.equal(got[..., :5], torch.ones_like(got[..., :5]))


def test_every_layer_has_its_own_functions(calls, tmp_path):
    masker = HashAttention(heavy_size=9, hat_weight_file=weight_file(tmp_path))
    inputs = [calls.with_state(masker, attrs.evolve(calls.tiny(), layer=layer)) for layer in (0, 1)]
    first, second = (calls.chosen(masker, one) for one in inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, expected(masker, inputs[0], functions(seed=0)))


def test_the_context_is_hashed_in_pieces_that_bound_the_memory(calls, tmp_path, monkeypatch):
    masker = HashAttention(heavy_size=9, hat_weight_file=weight_file(tmp_path))
    whole = calls.with_state(masker, calls.tiny()).state.words
    monkeypatch.setattr(hash_attention, "HIDDEN_BYTES", 4 * 32 * 4 * 7)
    assert torch.equal(calls.with_state(masker, calls.tiny()).state.words, whole)
    assert torch.equal(
        calls.with_state(masker, calls.tiny(), chunks=[30, 1, 30]).state.words, whole
    )


def test_a_length_on_the_device_selects_what_a_host_length_does(calls, tmp_path):
    masker = HashAttention(heavy_size=0.2, hat_weight_file=weight_file(tmp_path))
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


def test_key_functions_per_kv_head_halve_what_is_read(calls, tmp_path):
    sizes = {}
    for key_heads in (4, 2):
        path = weight_file(tmp_path, key_heads=key_heads)
        masker = HashAttention(hat_weight_file=path)
        sizes[key_heads] = masker.bytes_read(calls.with_state(masker, calls.tiny()))
    weights = 4 * (8 * 6 + 6 + 6 * 5 + 5 + 5 * 32 + 32) * 4
    assert sizes == {4: 4 * 61 * 4 + weights, 2: 2 * 61 * 4 + weights}


def test_the_weights_are_required():
    with pytest.raises(MissingParameterError, match="hat_weight_file"):
        from_plain(HashAttention, {})


# Bad files


def edited(folder, edit, **metadata):
    path = weight_file(folder)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        facts = {**file.metadata(), **metadata}
    edit(tensors)
    save_file(tensors, path, facts)
    return path


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


DAMAGED = {
    "missing bias": (drop("layers.1.key.2.bias"), "layer 1: key matrix 2 lacks its bias"),
    "missing matrix": (drop("layers.0.query.1.weight"), "query matrix 1 lacks its matrix"),
    "gap": (
        lambda t: (t.pop("layers.0.query.1.weight"), t.pop("layers.0.query.1.bias")),
        "query matrix 1 of shape",
    ),
    "foreign tensor": (put("lm_head.weight", torch.ones(2)), "nothing is known of its tensor"),
    "shape": (put("layers.0.key.1.weight", torch.ones(4, 7, 5)), "key matrix 1 of shape"),
    "heads": (put("layers.0.key.1.weight", torch.ones(3, 6, 5)), "key matrix 1 of shape"),
    "integers": (put("layers.0.key.1.weight", torch.ones(4, 6, 5).int()), "no float tensor"),
    "no heads": (put("layers.0.query.0.weight", torch.ones(0, 8, 6)), r"\(0, 8, 6\) is empty"),
    "not finite": (put("layers.0.key.1.bias", torch.full((4, 5), torch.inf)), "not finite"),
    "bits differ": (
        lambda t: t.update(
            {
                f"layers.1.{side}.2.{what}": torch.ones(4, *n)
                for side in ("query", "key")
                for what, n in (("weight", (5, 16)), ("bias", (16,)))
            }
        ),
        r"its layers have signatures of \[16, 32\] bits",
    ),
    "sides differ": (
        lambda t: t.update(
            {"layers.1.key.2.weight": torch.ones(4, 5, 9), "layers.1.key.2.bias": torch.ones(4, 9)}
        ),
        "queries go from 8 channels to 32 bits, keys from 8 to 9",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_weight_file_is_refused_before_a_model_is_there(tmp_path, case):
    edit, message = DAMAGED[case]
    masker = HashAttention(hat_weight_file=edited(tmp_path, edit))
    with pytest.raises(ArtifactError, match=message) as caught:
        masker.check_artifacts()
    assert "\n" not in str(caught.value)
    assert "weights.safetensors" in str(caught.value)


def test_a_file_of_another_format_or_version_is_refused(tmp_path):
    path = edited(tmp_path, lambda t: None, version="9")
    with pytest.raises(ArtifactError, match="says hash-attention-weights 9, expected"):
        HashAttention(hat_weight_file=path).check_artifacts()
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match="says no format, expected"):
        HashAttention(hat_weight_file=path).check_artifacts()


def test_a_truncated_file_and_other_bits_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    masker = HashAttention(hat_weight_file=weight_file(tmp_path), hat_bits=16)
    with pytest.raises(ArtifactError, match="have 32 bits; set hat_bits=32"):
        masker.check_artifacts()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="no whole safetensors file"):
        masker.check_artifacts()


OTHER_MODELS = {
    "query heads": ({"heads": 3, "key_heads": 3}, "layer 1 has 3 query heads"),
    "key heads": ({"key_heads": 1}, "layer 1 has 1 key heads"),
    "channels": ({"widths": (16, 6, 32)}, "takes heads of 16 channels"),
    "layers": ({"layers": 3}, "it has a layer 2, but the model has 2 layers"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_weights_of_another_model_are_refused(calls, tmp_path, case):
    options, message = OTHER_MODELS[case]
    masker = HashAttention(hat_weight_file=weight_file(tmp_path, **options))
    masker.check_artifacts()
    with pytest.raises(UnsupportedError, match=message) as caught:
        masker.init_state(layer_info(calls.tiny()))
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_in_the_file_is_refused(calls, tmp_path):
    masker = HashAttention(hat_weight_file=weight_file(tmp_path, layers=1))
    with pytest.raises(ArtifactError, match="it has no layer 1"):
        masker.init_state(layer_info(calls.tiny()))


# Conversion


def authors_form(kind):
    """The authors' pickle of two layers, with tensors, parameters or arrays in it."""
    made = {}
    for layer in range(2):
        hashed = functions(seed=layer)
        wrap = {
            "tensors": lambda t: t,
            "parameters": torch.nn.Parameter,
            "bfloat16": lambda t: t.to(torch.bfloat16),
            "arrays": lambda t: t.numpy(),
            "big-endian arrays": lambda t: np.asfortranarray(t.numpy().astype(">f4")),
        }[kind]
        made[layer] = {
            "query_matrix": [wrap(w) for w, _ in hashed.query],
            "query_bias": [wrap(b) for _, b in hashed.query],
            "key_matrix": [wrap(w) for w, _ in hashed.key],
            "key_bias": [wrap(b.squeeze(1)) for _, b in hashed.key],
        }
    return made


KINDS = ["tensors", "parameters", "bfloat16", "arrays", "big-endian arrays"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_pickle_becomes_a_weight_file(tmp_path, kind, protocol):
    source, output = tmp_path / "llama_hat_weights.pkl", tmp_path / "weights.safetensors"
    source.write_bytes(pickle.dumps(OrderedDict(authors_form(kind)), protocol=protocol))
    facts = PickleConversion().make(source, output)
    assert facts["bits"] == "32"
    assert facts["model"] == "llama_hat_weights"
    check_converted(output, torch.bfloat16 if kind == "bfloat16" else torch.float32)


def check_converted(output, dtype=torch.float32):
    read = read_weights(output)
    assert sorted(read.layers) == [0, 1]
    for layer, hashed in read.layers.items():
        original = functions(seed=layer)
        for a, b in ((hashed.query, original.query), (hashed.key, original.key)):
            for got, wanted in zip(a, b, strict=True):
                for x, y in zip(got, wanted, strict=True):
                    assert torch.equal(x, y.to(dtype).float())


def test_what_torch_saved_is_read_too(tmp_path):
    source, output = tmp_path / "w.pt", tmp_path / "weights.safetensors"
    torch.save(authors_form("tensors"), source)
    PickleConversion(model="tiny").make(source, output)
    check_converted(output)


def test_views_of_one_storage_are_told_apart(tmp_path):
    content = authors_form("tensors")
    whole = torch.cat([m.reshape(-1) for m in content[0]["query_matrix"]])
    begin = 0
    for index, matrix in enumerate(content[0]["query_matrix"]):
        content[0]["query_matrix"][index] = whole[begin : begin + matrix.numel()].view(matrix.shape)
        begin += matrix.numel()
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    PickleConversion().make(tmp_path / "w.pkl", tmp_path / "w.safetensors")
    check_converted(tmp_path / "w.safetensors")


class Runs:
    """Unpickled, it runs a function of its choice."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def harmful(target):
    touch = f"touch {target}"
    inner = pickle.dumps(Runs(subprocess.getoutput, touch))
    return {
        "a command": Runs(subprocess.getoutput, touch),
        "eval": Runs(eval, f"open({str(target)!r}, 'w').close()"),
        "a builtin": Runs(getattr, {}, "keys"),
        "inside weights": {0: {"query_matrix": [Runs(subprocess.getoutput, touch)]}},
        "inside a storage": Runs(torch.storage._load_from_bytes, inner),
        "torch's loader": Runs(torch.load, str(target)),
        "an array of objects": np.array([Runs(subprocess.getoutput, touch)], dtype=object),
    }


@pytest.mark.parametrize("case", harmful(""))
def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(tmp_path, case):
    target = tmp_path / "written"
    source = tmp_path / "w.pkl"
    source.write_bytes(pickle.dumps(harmful(target)[case]))
    with pytest.raises(ArtifactError) as caught:
        PickleConversion().make(source, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_the_refusal_names_what_the_pickle_would_have_called(tmp_path):
    source = tmp_path / "w.pkl"
    source.write_bytes(pickle.dumps(Runs(subprocess.getoutput, "true")))
    with pytest.raises(ArtifactError, match=r"names subprocess.getoutput, which is no tensor"):
        PickleConversion().make(source, tmp_path / "out.safetensors")


def test_code_in_what_torch_saved_is_refused(tmp_path):
    source, target = tmp_path / "w.pt", tmp_path / "written"
    torch.save({0: Runs(subprocess.getoutput, f"touch {target}")}, source)
    with pytest.raises(ArtifactError, match="nothing in the file was run") as caught:
        PickleConversion().make(source, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_attributes_of_what_a_pickle_may_call_cannot_be_set(tmp_path):
    # GLOBAL collections OrderedDict, then BUILD with a slot state that sets an attribute
    code = b"ccollections\nOrderedDict\n(N}X\x01\x00\x00\x00aX\x01\x00\x00\x00bstb."
    (tmp_path / "w.pkl").write_bytes(code)
    with pytest.raises(ArtifactError, match="the attribute 'a'"):
        PickleConversion().make(tmp_path / "w.pkl", tmp_path / "out.safetensors")
    assert not hasattr(OrderedDict, "a")


WRONG = {
    "a list": ([1, 2], "no weights by layer"),
    "no layers": ({}, "no weights by layer"),
    "names": ({"first": {}}, "'first' is no layer number"),
    "a layer below 0": ({-1: {}}, "-1 is no layer number"),
    "a layer between two": ({1.5: {}}, "1.5 is no layer number"),
    "no names": ({0: [1]}, "layer 0 holds no matrices by name"),
    "missing side": ({0: {"query_matrix": [torch.ones(1, 1, 1)]}}, "layer 0 has no query_bias"),
    "numbers": ({0: {"query_matrix": [1.0], "query_bias": [1.0]}}, "something else than tensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_pickle_of_something_else_is_refused(tmp_path, case):
    content, message = WRONG[case]
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        PickleConversion().make(tmp_path / "w.pkl", tmp_path / "out.safetensors")


def test_a_truncated_pickle_is_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(authors_form("arrays"))[:-40])
    with pytest.raises(ArtifactError, match="no whole pickle|it is damaged"):
        PickleConversion().make(tmp_path / "w.pkl", tmp_path / "out.safetensors")


def test_a_pickle_as_weight_file_leads_to_its_conversion(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(authors_form("tensors")))
    with pytest.raises(ArtifactError, match="convert it with 'sah-bench artifacts convert"):
        HashAttention(hat_weight_file=str(path)).check_artifacts()


# Training


TEXT = "the cat sat on the mat and the dog ran in the sun. " * 200


@pytest.fixture(scope="module")
def tiny(models):
    return models.build("llama"), models.tokenizer()


def train(tiny, path, **options):
    steps = []
    sizes = {"steps": 3, "length": 24, "chunk": 16, "hidden": 10, "bits": 8}
    tool = HashTraining(**{**sizes, **options})
    material = Material(model=tiny[0], tokenizer=tiny[1], name="tiny", texts=[TEXT])
    facts = tool.make(material, path, lambda *step: steps.append(step[:2]))
    return facts, steps


def test_training_is_deterministic_under_a_seed(tmp_path, tiny):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    facts, steps = train(tiny, paths[0])
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert float(facts["recall"]) > 0
    train(tiny, paths[1])
    train(tiny, paths[2], seed=1)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()


def test_windows_longer_than_the_models_context_are_refused(tmp_path, tiny):
    with pytest.raises(RequestError, match="length = 513 is more than the 512 tokens"):
        train(tiny, tmp_path / "w.safetensors", length=513)


def test_training_that_diverges_is_refused_and_writes_nothing(tmp_path, tiny):
    path = tmp_path / "w.safetensors"
    with pytest.raises(RequestError, match=r"no longer finite at step \d; set lr below 1e\+30"):
        train(tiny, path, lr=1e30, steps=6)
    assert not path.exists()


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_trained_weights_fit_the_model(tmp_path, tiny, per_kv_head):
    model, tokenizer = tiny
    path = tmp_path / "w.safetensors"
    train(tiny, path, per_kv_head=per_kv_head)
    masker = HashAttention(heavy_size=3, hat_weight_file=str(path), hat_bits=8)
    ids = tokenizer(TEXT[:60], return_tensors="pt").input_ids
    with torch.no_grad(), attach(model, Pipeline.of(masker, prefill="sparse")) as session:
        assert model(ids).logits.isfinite().all()
    [state] = session.layers[0].states.values()
    config = model.config
    heads = config.num_key_value_heads if per_kv_head else config.num_attention_heads
    assert state.words.shape[1] == heads


@pytest.mark.parametrize("relaxation", ["none", "tanh"])
def test_the_first_step_has_the_loss_of_the_definition(relaxation):
    options = HashTraining(
        hidden=10,
        bits=8,
        top=0.25,
        positive_weight=5.0,
        per_kv_head=True,
        relaxation=relaxation,
    )
    relaxed = torch.tanh if relaxation == "tanh" else torch.clone
    torch.manual_seed(0)
    query, key = torch.randn(4, 3, 16), torch.randn(2, 9, 16)
    layer = LayerTraining(options, 0, query, key)
    before = layer.functions()
    total, pairs = 0.0, 0
    for head in range(4):
        for row in range(3):
            stop = 9 - 3 + row + 1
            logits = key[head // 2, :stop] @ query[head, row]
            best = logits.argsort(descending=True)[: max(1, int(0.25 * stop))].tolist()
            hashed = relaxed(outputs(before.query, head, query[head, row]).double())
            for k in range(stop):
                coded = relaxed(outputs(before.key, head // 2, key[head // 2, k]).double())
                chance = torch.sigmoid(hashed @ coded)
                total -= float(5 * chance.log() if k in best else (1 - chance).log())
                pairs += 1
    assert layer.step(query, key) == pytest.approx(total / pairs, rel=1e-5)


def test_steps_on_the_same_rows_lower_the_loss_and_raise_the_recall():
    options = HashTraining(hidden=32, bits=32, top=0.1)
    torch.manual_seed(0)
    query, key = torch.randn(2, 64, 16), torch.randn(1, 64, 16)
    layer = LayerTraining(options, 0, query, key)
    before = recall(layer.functions(), query, key, options.top)
    losses = [layer.step(query, key) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    assert recall(layer.functions(), query, key, options.top) > before + 0.2


def test_the_best_keys_are_a_share_of_those_before_and_at_the_row():
    scores = torch.tensor([[[0.0, 9.0, 3.0, 3.0], [3.0, 1.0, 3.0, 3.0]]])
    best = best_keys(scores, Size(fraction=0.5))
    assert best.tolist() == [[[False, True, False, False], [True, False, True, False]]]
