"""Every family of models: a pipeline that selects everything changes nothing, later tokens change
nothing before them, and questions roll back exactly.
"""

import pytest
import torch

from sah_core import Request, attach, compat, hookimpl
from sah_core.errors import SahError, UnsupportedError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet", "no_grad")]

NEW_FAMILIES = (
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "qwen3-next",
    "phi3",
    "cohere2",
    "glm4",
    "smollm3",
    "deepseek-v3",
)
FAMILIES = ("llama", "gemma2", "gemma3", "gpt-oss", *NEW_FAMILIES)
CONTEXT, QUESTION = 24, 5
TEXT = "the hen and the rat are on the hearth. an ant is in the red tin. "
QUESTIONS = ("who is in the tin?", "where is the hen?")
NEW = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def built(models):
    made = {}

    def get(family):
        if family not in made:
            made[family] = models.build(family)
            compat.keep_softcap(made[family])
        return made[family]

    return get


def everywhere(model):
    """The option that makes a pipeline apply to every layer that attends."""
    kinds = dict.fromkeys(compat.layer_types(model))
    return f"layer_types=[{', '.join(kind for kind in kinds if 'linear' not in kind)}]"


def forward(model, ids, kv_cache=None):
    options = {}
    if kv_cache is not None:
        options[compat.cache_argument(type(model).forward)] = kv_cache
    return model(ids, use_cache=kv_cache is not None, **options).logits


def through(model, ids):
    """Logits of prefill, question and three decoded tokens, on a cache of ours."""
    kv_cache = compat.make_cache(model, ids.shape[1])
    cuts = [0, CONTEXT, CONTEXT + QUESTION, *range(CONTEXT + QUESTION + 1, ids.shape[1] + 1)]
    parts = [
        forward(model, ids[:, begin:end], kv_cache)
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    return torch.cat(parts, 1)


def close(one, other, atol=2e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "gather"])
@pytest.mark.parametrize("steps", ["local(1.0)", "oracle-top-k(1.0)"])
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_selecting_everything_equals_dense_in_every_phase(models, built, family, steps, backend):
    model, ids = built(family), models.tokens(1, CONTEXT + QUESTION + 3)
    dense = forward(model, ids)
    pipeline = f"{steps} @ prefill=sparse, backend={backend}, {everywhere(model)}"
    with attach(model, pipeline) as session:
        close(forward(model, ids), dense)
        close(through(model, ids), dense)
    assert session.backends_used == {backend}
    assert session.fallbacks == []


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_a_selection_changes_something_and_backends_agree_on_it(models, built, family):
    # the test above would pass if nothing were patched
    model, ids = built(family), models.tokens(1, CONTEXT + QUESTION + 3)
    dense, sparse = forward(model, ids), {}
    for backend in ("eager", "gather"):
        steps = "sink(1) | local(2) | oracle-top-k(3)"
        with attach(model, f"{steps} @ prefill=sparse, backend={backend}, {everywhere(model)}"):
            sparse[backend] = through(model, ids)
    close(sparse["eager"], sparse["gather"])
    assert (sparse["eager"] - dense)[:, CONTEXT:].abs().max() > 5e-3


@pytest.mark.parametrize("steps", ["sink(1) | local(3)", "sink(1) | local(2) | oracle-top-k(3)"])
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_a_later_token_never_changes_earlier_logits(models, built, family, steps):
    model, ids = built(family), models.tokens(1, CONTEXT)
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1 - 5) % 100 + 5
    with attach(model, f"{steps} @ prefill=sparse, {everywhere(model)}"):
        one, other = forward(model, ids), forward(model, changed)
    # experts see other batches of tokens, linear layers other chunks
    close(one[:, :17], other[:, :17], atol=1e-5)
    assert (one[:, 17:] - other[:, 17:]).abs().max() > 1e-2


# Through the adapter


def wrap(model, models):
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    return HuggingFaceAdapter.of(loaded)


def plain_answer(adapter, prompt):
    ids = torch.tensor([adapter.tokenizer(prompt).input_ids])
    out = adapter.model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[2]
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_questions_on_one_prefill_are_answered_as_by_transformers_alone(models, built, family):
    adapter = wrap(built(family), models)
    expected = [plain_answer(adapter, f"{TEXT}\n{question}") for question in QUESTIONS]
    prefilled = adapter.prefill(Request(context=TEXT, questions=QUESTIONS))
    stateful = "quest(1000, page_size=4)"
    where = everywhere(adapter.model)
    pipelines = ["dense", f"local(1.0) @ {where}", f"sink(1.0) @ {where}"]
    if "full_attention" in where:
        pipelines += [stateful, "dense", stateful]
    for pipeline in pipelines:
        details = adapter.answer(prefilled, pipeline, NEW).details
        assert [d.token_ids for d in details] == expected


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral"])
def test_states_are_rolled_back_between_questions(models, built, family):
    adapter, pipeline = wrap(built(family), models), "sink(1) | quest(8, page_size=4)"
    request = Request(context=TEXT, questions=QUESTIONS)
    prefilled = adapter.prefill(request)
    forwards = adapter.answer(prefilled, pipeline, NEW).responses
    backwards = adapter.answer(prefilled, pipeline, NEW, indices=[1, 0, 1]).responses
    assert backwards == [forwards[1], forwards[0], forwards[1]]
    alone = [
        adapter.answer(adapter.prefill(Request(context=TEXT, questions=q)), pipeline, NEW).responses
        for q in QUESTIONS
    ]
    assert alone == forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_after_a_snapshot_does_not_change_it(models, built, family):
    model, ids = built(family), models.tokens(1, CONTEXT + QUESTION)
    kv_cache = compat.make_cache(model, 64)
    forward(model, ids[:, :CONTEXT], kv_cache)
    snapshot = compat.snapshot_cache(kv_cache)
    expected = forward(model, ids[:, CONTEXT:], kv_cache)
    forward(model, models.tokens(1, 12, seed=9), kv_cache)
    compat.restore_cache(kv_cache, snapshot)
    close(forward(model, ids[:, CONTEXT:], kv_cache), expected)


class Layers:
    """Records the layers in which keys were selected."""

    def __init__(self):
        self.sparse = set()

    @hookimpl
    def sah_mask_built(self, inputs, mask):
        if not mask.is_full:
            self.sparse.add(inputs.layer)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2", {0}),
        ("qwen3-next", {1}),
        ("cohere2", {1}),
        ("smollm3", {0, 1}),
        ("deepseek-v3", {0, 1}),
    ],
)
def test_sliding_and_linear_layers_are_left_alone(models, built, family, expected):
    seen, adapter = Layers(), wrap(built(family), models)
    prefilled = adapter.prefill(Request(context=TEXT, questions=QUESTIONS))
    adapter.answer(prefilled, "sink(1) | local(2)", NEW, observers=[seen])
    assert seen.sparse == expected


def test_keys_that_are_cached_as_latents_never_reach_a_state(models, built):
    model = built("deepseek-v3")
    assert compat.caches_latents(model)
    adapter, pipeline = wrap(model, models), "sink(1) | quest(8, page_size=4)"
    prefilled = adapter.prefill(Request(context=TEXT, questions=QUESTIONS[0]))
    through_adapter = adapter.answer(prefilled, pipeline, NEW).details[0].token_ids
    prompt = torch.tensor([prefilled.prompts[0].ids])
    kv_cache = compat.make_cache(model, 128)
    argument = compat.cache_argument(type(model).forward)
    forward(model, prompt[:, : prefilled.shared], kv_cache)
    with attach(model, pipeline):
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[2],
            **{argument: kv_cache},
        )
    assert tuple(output[0, prompt.shape[1] :].tolist()) == through_adapter


# Models over several places


class Carried:
    """Makes a layer take everything it gets from elsewhere, as accelerate's hooks do."""

    def __init__(self, layer):
        from accelerate.utils import send_to_device

        self.moved = []

        def carry(module, args, kwargs):
            kwargs = {name: self.copy(value) for name, value in kwargs.items()}
            self.moved += [type(value).__name__ for value in kwargs.values()]
            return send_to_device(args, "cpu"), send_to_device(kwargs, "cpu")

        self.handle = layer.register_forward_pre_hook(carry, with_kwargs=True)

    def copy(self, value):
        if isinstance(value, torch.Tensor):
            return value.clone()
        if type(value).__name__ == "Allowed":
            return type(value)(
                start=value.start.clone(), stop=value.stop.clone(), first=value.first.clone()
            )
        return value


@pytest.mark.parametrize("pipeline", ["sink(2) | local(4)", "sink(1) | quest(8, page_size=4)"])
def test_what_a_layer_gets_may_be_a_copy(models, pipeline):
    model, ids = models.build("llama"), models.tokens(1, CONTEXT + QUESTION + 3)
    with attach(model, f"{pipeline} @ prefill=sparse"):
        expected = through(model, ids)
        carried = Carried(model.model.layers[1])
        assert torch.equal(through(model, ids), expected)
    assert "Allowed" in carried.moved


# older transformers look for the model where its offloaded embeddings are
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_parts_of_a_model_may_wait_on_the_disk(models, family, tmp_path):
    from accelerate import dispatch_model

    expected = {}
    pipelines = ("dense", "sink(2) | local(4)", "sink(1) | quest(8, page_size=4)")
    request = Request(context=TEXT, questions=QUESTIONS)
    for pipeline in pipelines:
        adapter = wrap(models.build(family), models)
        adapter_prefilled = adapter.prefill(request)
        expected[pipeline] = adapter.answer(adapter_prefilled, pipeline, NEW).responses
    model = models.build(family)
    names = [name for name, _ in model.named_children() if name != "model"]
    names += [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    places = dict.fromkeys(names, "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.embed_tokens": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.get_input_embeddings().weight.device.type == "meta"
    adapter = wrap(model, models)
    assert adapter.device == torch.device("cpu")
    assert all(device.type == "cpu" for device in adapter.devices)
    prefilled = adapter.prefill(request)
    for pipeline in pipelines:
        assert adapter.answer(prefilled, pipeline, NEW).responses == expected[pipeline]
    batch = adapter.process_requests([request, Request(context="a hen.", questions="b?")], NEW)
    assert batch[0].responses == expected["dense"]


def test_limits_are_moved_once_per_device():
    from sah_core import Allowed

    limits = Allowed.causal(3, 8)
    assert limits.to("cpu") is limits
    moved = limits.to("meta")
    assert moved.stop.device.type == "meta"
    assert limits.to("meta") is moved


def test_decoding_over_several_devices_cannot_be_captured(models, built):
    model = built("llama")
    kv_cache = compat.make_cache(model, 64)
    forward(model, models.tokens(1, 8), kv_cache)
    layer = kv_cache.layers[1]
    layer.key_buffer = layer.key_buffer.to("meta")
    with pytest.raises(UnsupportedError, match="several devices"):
        compat.Capture(kv_cache, 1, 8)
    assert issubclass(UnsupportedError, SahError)
