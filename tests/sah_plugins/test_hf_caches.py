"""How contexts are kept: static, offloaded and quantised caches, and reading in pieces."""

import copy
import logging

import pytest
import torch
from transformers import QuantizedCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import CompileConfig

from sah_core import Request, compat
from sah_core.compat.offloaded import OffloadedCache, OffloadedLayer
from sah_core.compat.preallocated import PreallocatedLayer
from sah_core.compat.quantised import reorders
from sah_core.errors import ParameterError, RequestError, UnsupportedError
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.kv_cache import IMPLEMENTATIONS

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?", "is the rat on it?")
REQUEST = Request(context=CONTEXT, questions=QUESTIONS)
OTHER = Request(context="the rat is in the tin. ", questions=["who?", "where is it?"])
NEW = {"max_new_tokens": 8}
CONFIG = {"backend": "quanto", "nbits": 2, "q_group_size": 16, "residual_length": 6}
QUANTISED = {"cache_implementation": "quantized", "cache_config": CONFIG}
QUEST = "sink(2) | quest(8, page_size=4)"


@pytest.fixture
def quanto():
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")


def tokens(adapter, options, request=REQUEST, request_kwargs=None):
    response = adapter.process_request(request, {**NEW, **options}, request_kwargs)
    return [detail.token_ids for detail in response.details]


# Memory taken ahead


@pytest.mark.parametrize("name", [n for n, kind in IMPLEMENTATIONS.items() if kind != "quantised"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
def test_caches_that_keep_the_same_keys_give_the_same_tokens(make, name, family):
    plain = make(QUEST, family)
    assert tokens(plain, {"cache_implementation": name}) == tokens(plain, {})


def test_room_is_taken_for_as_many_tokens_as_are_asked_for(make):
    options = {"cache_implementation": "static", "max_cache_len": 700}
    adapter = make()
    for given, least in (({}, 256), (options, 700)):
        prefilled = adapter.prefill(REQUEST, generation_kwargs=given)
        room = prefilled.cache.layers[0].key_buffer.shape[2]
        assert least <= room < 2 * least
    assert tokens(adapter, options) == tokens(adapter, {})
    assert tokens(adapter, {**options, "max_cache_len": 1}) == tokens(adapter, {})


# Offloaded


@pytest.fixture
def elsewhere(monkeypatch):
    """The model's memory counts as another one than the host's."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("sah_core.compat.cache.devices_of", lambda model: (cuda,))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("pipeline", ["dense", "sink(2) | local(6)"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_offloaded_cache_gives_the_same_tokens(make, family, pipeline, options):
    adapter, offloaded = make(pipeline, family), {"cache_implementation": "offloaded"}
    assert tokens(adapter, {**options, **offloaded}) == tokens(adapter, options)
    kept = adapter.prefill(REQUEST, generation_kwargs=offloaded).cache
    assert isinstance(kept, OffloadedCache)
    kinds = {type(layer) for layer in kept.layers}
    sliding = {DynamicSlidingWindowLayer} if family == "gemma3" else set()
    assert kinds == {OffloadedLayer} | sliding


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("pipeline", ["dense", QUEST, "pq-cache(8)"])
def test_batches_from_an_offloaded_cache_equal_each_alone(make, pipeline):
    adapter, options = make(pipeline), {**NEW, "cache_implementation": "offloaded"}
    together = adapter.process_requests([REQUEST, OTHER], options)
    alone = [adapter.process_request(request, NEW) for request in (REQUEST, OTHER)]
    assert [r.responses for r in together] == [r.responses for r in alone]


def test_a_model_in_the_hosts_memory_has_nothing_to_offload(make):
    prefilled = make().prefill(REQUEST, generation_kwargs={"cache_implementation": "offloaded"})
    assert {type(layer) for layer in prefilled.cache.layers} == {PreallocatedLayer}


@pytest.mark.usefixtures("elsewhere")
def test_captured_decoding_refuses_keys_that_are_elsewhere(make):
    adapter = make("sink(2)")
    prefilled = adapter.prefill(REQUEST, generation_kwargs={"cache_implementation": "offloaded"})
    with pytest.raises(UnsupportedError, match="OffloadedLayer"):
        adapter.capture_decode(prefilled)


def test_an_offloaded_layer_holds_what_a_preallocated_one_holds():
    random = torch.Generator().manual_seed(3)

    def new(tokens, batch):
        shape = (batch, 2, tokens, 4)
        return torch.randn(shape, generator=random), torch.randn(shape, generator=random)

    one, other = OffloadedLayer(4), PreallocatedLayer(4)
    steps = [5, 1, lambda x: x.crop(-2), 1, 7, lambda x: x.set_length(3), 2]
    steps += [lambda x: x.reorder_cache(torch.tensor([1, 1, 0])), 1, lambda x: x.crop(1), 2]
    steps += [lambda x: x.batch_repeat_interleave(2), 1]
    steps += [lambda x: x.batch_select_indices(torch.tensor([0, 4])), 3]
    batch = 2
    for step in steps:
        if callable(step):
            branch = copy.copy(one), one.length, [t.clone() for t in one.on_device()]
            step(one), step(other)
            batch = other.keys.shape[0]
            if branch[0].length == one.length:
                # another order is no change of what a copy of the layer holds
                assert all(map(torch.equal, branch[0].on_device(), branch[2]))
        else:
            states = new(step, batch)
            one.prefetch()
            for made, expected in zip(one.update(*states), other.update(*states), strict=True):
                assert torch.equal(made, expected)
        assert all(map(torch.equal, one.on_device(), (other.keys, other.values)))
        assert one.get_seq_length() == other.get_seq_length()
        assert one.get_mask_sizes(3) == other.get_mask_sizes(3)


# Quantised


def continued(adapter, config, question, beams=1):
    """What transformers makes of a quantised cache that holds the context."""
    encode = adapter.tokenizer
    context_tokens = len(encode(CONTEXT).input_ids)
    ids = torch.tensor([encode(f"{CONTEXT}\n{question}").input_ids])
    model = adapter.model
    with torch.no_grad():
        kept = QuantizedCache(config=model.config, **config)
        argument = {compat.cache_argument(type(model).forward): kept}
        model(ids[:, :context_tokens].expand(beams, -1), use_cache=True, **argument)
        options = {"pad_token_id": 0, "eos_token_id": [2], "num_beams": beams, **NEW}
        made = model.generate(ids, **argument, **options)
    return tuple(made[0, ids.shape[1] :].tolist())


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize("pipeline", ["dense", "local(1.0)", "oracle-top-k(1.0)"])
@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "nbits": 4, "residual_length": 3}])
def test_a_context_in_a_quantised_cache_is_continued_as_by_transformers(make, pipeline, config):
    adapter = make(pipeline)
    options = {"cache_implementation": "quantized", "cache_config": config}
    before = copy.deepcopy(options)
    expected = [continued(adapter, config, question) for question in QUESTIONS]
    assert tokens(adapter, options) == expected
    assert options == before
    if config["nbits"] == 2:
        assert expected != tokens(adapter, {})


def test_the_eight_bit_backend_is_continued_as_by_transformers(make):
    config = {"backend": "fp8"}
    adapter = make(QUEST)
    try:
        QuantizedCache(config=adapter.model.config, **config)
    except ValueError:
        pytest.skip("the installed transformers has no such backend")
    options = {"cache_implementation": "quantized", "cache_config": config}
    assert tokens(make(), options) == [continued(make(), config, q) for q in QUESTIONS]
    assert len(tokens(adapter, options)) == 3


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize("pipeline", ["dense", QUEST, "pq-cache(8)", "sink(2) | local(6)"])
def test_the_questions_of_a_quantised_context_do_not_depend_on_each_other(make, pipeline):
    adapter = make(pipeline)
    alone = [
        tokens(adapter, QUANTISED, Request(context=CONTEXT, questions=[question]))[0]
        for question in QUESTIONS
    ]
    assert tokens(adapter, QUANTISED) == alone
    assert tokens(adapter, {**QUANTISED, "do_sample": True, "seed": 1}) == tokens(
        adapter, {**QUANTISED, "do_sample": True, "seed": 1}
    )


@pytest.mark.usefixtures("quanto")
def test_quantised_contexts_are_read_one_by_one(make):
    adapter, options = make(QUEST), {**NEW, **QUANTISED}
    together = adapter.process_requests([REQUEST, OTHER], options)
    alone = [adapter.process_request(request, options) for request in (REQUEST, OTHER)]
    assert [r.responses for r in together] == [r.responses for r in alone]
    with pytest.raises(RequestError, match="one context at a time"):
        adapter.prefill_batch([REQUEST, OTHER], generation_kwargs=options)


@pytest.mark.usefixtures("quanto")
@pytest.mark.skipif(not reorders(), reason="transformers reorders a part only")
def test_beams_follow_a_quantised_cache(make):
    adapter = make()
    expected = [continued(adapter, CONFIG, question, beams=3) for question in QUESTIONS]
    assert tokens(adapter, {**QUANTISED, "num_beams": 3}) == expected


def test_layers_that_cannot_be_quantised_are_found_before_a_context_is_read(make, quanto):
    adapter, passes = make(family="gemma3"), []
    hook = adapter.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(UnsupportedError, match="quantised cache with Gemma3"):
        tokens(adapter, QUANTISED)
    hook.remove()
    assert not passes


def test_a_context_that_does_not_fall_into_groups_is_one_line(make, quanto):
    uneven = {**CONFIG, "axis_key": -1, "q_group_size": 64}
    with pytest.raises(UnsupportedError, match=r"this cache_config.*Group size \(64\)"):
        tokens(make(), {"cache_implementation": "quantized", "cache_config": uneven})


def test_a_missing_backend_is_one_line(make, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("You need to install optimum-quanto.\nPlease do.")

    monkeypatch.setattr("transformers.cache_utils.QuantoQuantizedLayer.__init__", missing)
    with pytest.raises(RequestError, match="install optimum-quanto. Please do."):
        HuggingFaceAdapter.check_generation({"cache_implementation": "quantized"})


# What is asked for, and what cannot be


@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"cache_implementation": "paged"}, ParameterError, "one of dynamic, static"),
        ({"cache_implementation": 3}, ParameterError, "one of dynamic, static"),
        ({"cache_config": CONFIG}, RequestError, "needs cache_implementation='quantized'"),
        ({**QUANTISED, "cache_config": [1]}, ParameterError, "a mapping"),
        ({**QUANTISED, "cache_config": {"nbits": 3}}, RequestError, "nbits"),
        ({**QUANTISED, "cache_config": {"bits": 4}}, RequestError, "bits"),
        ({**QUANTISED, "cache_config": {"backend": "x"}}, RequestError, "backend `x`"),
        ({**QUANTISED, "prompt_lookup_num_tokens": 2}, RequestError, "take rejected tokens back"),
        ({"max_cache_len": 0}, ParameterError, ">= 1"),
        ({"prefill_chunk_size": True}, ParameterError, ">= 1"),
    ],
)
def test_what_makes_no_sense_is_found_without_a_model(given, error, said):
    with pytest.raises(error, match=said) as caught:
        HuggingFaceAdapter.check_generation(given)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quanto")
def test_an_answer_cannot_ask_for_another_cache_than_the_context_is_in(make):
    adapter = make()
    plain = adapter.prefill(REQUEST)
    quantised = adapter.prefill(REQUEST, generation_kwargs=QUANTISED)
    other = {**QUANTISED, "cache_config": {**CONFIG, "nbits": 4}}
    for prefilled, options in ((plain, QUANTISED), (quantised, other)):
        with pytest.raises(RequestError, match="same generation_kwargs to prefill"):
            adapter.answer(prefilled, generation_kwargs=options)
    with pytest.raises(RequestError, match="into a quantised cache"):
        adapter.answer(quantised, generation_kwargs={"cache_implementation": "static"})
    # what says nothing of it takes the context as it is
    made = [d.token_ids for d in adapter.answer(quantised, generation_kwargs=NEW).details]
    assert made == tokens(adapter, QUANTISED)


def passes_of(adapter, call):
    lengths = []

    def look(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = adapter.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return lengths


@pytest.mark.parametrize("pipeline", ["dense", "local(12) @ prefill=sparse"])
def test_a_context_is_read_in_pieces_as_by_the_request_option(make, pipeline):
    adapter, chunk = make(pipeline), {"prefill_chunk_size": 16}
    lengths = passes_of(adapter, lambda: tokens(adapter, chunk))
    context = len(adapter.tokenizer(CONTEXT).input_ids)
    assert lengths[: -(-context // 16)] == [16] * (context // 16) + [context % 16]
    assert tokens(adapter, chunk) == tokens(adapter, {}, request_kwargs=chunk)
    # an option of the request comes first, being the nearer one
    both = passes_of(adapter, lambda: tokens(adapter, {"prefill_chunk_size": 9}, REQUEST, chunk))
    assert both[0] == 16


def test_the_chunks_of_a_sparse_prefill_are_read_alone_in_batches(make):
    adapter = make("local(12) @ prefill=sparse")
    options = {**NEW, "prefill_chunk_size": 10}
    together = adapter.process_requests([REQUEST, OTHER], options)
    alone = [adapter.process_request(request, options) for request in (REQUEST, OTHER)]
    assert [r.responses for r in together] == [r.responses for r in alone]


@pytest.mark.parametrize(
    ("option", "idle"),
    [({"use_cache": False}, {"use_cache": True}), ({"compile_config": CompileConfig()}, {})],
)
def test_what_only_chooses_time_is_not_followed_and_said_once(make, caplog, option, idle):
    from sah_plugins.adapters.hf import options

    options._say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger=options.__name__)
    adapter = make()
    assert tokens(adapter, idle) == tokens(adapter, {})
    assert not caplog.records
    assert tokens(adapter, option) == tokens(adapter, {})
    [record] = [r for r in caplog.records if r.name == options.__name__]
    assert f"{next(iter(option))!r} has no effect" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", False),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "static"),
        ("cache_implementation", "hybrid"),
        ("max_cache_len", 99),
        ("prefill_chunk_size", 3),
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_a_checkpoint_says_of_caches_does_not_count(make, monkeypatch, name, value, options):
    adapter = make()
    expected = tokens(adapter, options)
    monkeypatch.setattr(adapter.model.generation_config, name, value)
    assert tokens(adapter, options) == expected
