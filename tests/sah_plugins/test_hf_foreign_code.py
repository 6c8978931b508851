"""Decoding loops from folders and repositories: run if the caller trusts them, and only then."""

import json
import sys
import textwrap

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import utils
from transformers.generation.configuration_utils import GenerationMode

from sah_core import Request
from sah_core.errors import ParameterError, RequestError
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.foreign_code import code_hash

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?", "is the rat on it?")
TRUST = {"trust_remote_code": True}
STATEFUL, WINDOW = "sink(2) | quest(8, page_size=4)", "sink(2) | local(4)"
LOOP = """
    import torch
    from transformers import GenerationMixin

    from .choices import best

    LOADED.append(1)

    def _loop(
        model, input_ids, logits_processor, stopping_criteria, generation_config, rank, **kwargs
    ):
        beams = generation_config.num_beams or 1
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        name = "past_key_values" if "past_key_values" in kwargs else "cache"
        mask = kwargs.get("attention_mask")
        while True:
            given = {"input_ids": input_ids[:, int(cache.get_seq_length()):], name: cache}
            if mask is not None:
                more = input_ids.shape[1] - mask.shape[1]
                mask = torch.cat([mask, mask.new_ones(len(mask), more)], dim=1)
                places = (mask.cumsum(-1) - 1).clamp(min=0)
                given["position_ids"] = places[:, -given["input_ids"].shape[1]:]
            output = model(attention_mask=mask, use_cache=True, **given)
            scores = logits_processor(input_ids, output.logits[:, -1])
            input_ids = torch.cat([input_ids, best(scores, rank)], dim=1)
            if stopping_criteria(input_ids, scores).all():
                return input_ids[::beams]

    def generate(model, *args, rank=0, **kwargs):
        kwargs["rank"] = rank
        SEEN.append(dict(kwargs))
        return GenerationMixin.generate(model, *args, custom_generate=_loop, **kwargs)
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers copies the code into a folder of this test alone."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def notes(monkeypatch):
    """What the code that the tests write says of itself."""
    import builtins

    monkeypatch.setattr(builtins, "LOADED", [], raising=False)
    monkeypatch.setattr(builtins, "SEEN", [], raising=False)
    return builtins


@pytest.fixture
def folder(tmp_path, notes):
    """Writes folders with a decoding loop."""

    def write(text=LOOP, name="loop", requirements=None):
        place = tmp_path / name / "custom_generate"
        place.mkdir(parents=True, exist_ok=True)
        (place / "generate.py").write_text(textwrap.dedent(text))
        (place / "choices.py").write_text(
            "def best(scores, rank):\n    return scores.topk(rank + 1).indices[:, -1:]\n"
        )
        if requirements:
            (place / "requirements.txt").write_text(requirements)
        return str(tmp_path / name)

    return write


def answers(adapter, options, questions=QUESTIONS):
    options = {"max_new_tokens": 5, **options}
    return adapter.process_request(Request(context=CONTEXT, questions=questions), options).details


def tokens(adapter, options, **request):
    return [detail.token_ids for detail in answers(adapter, options, **request)]


def alone(adapter, options):
    made = []
    for question in QUESTIONS:
        ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
        given = {"pad_token_id": 0, "eos_token_id": [2], "max_new_tokens": 5, **options}
        made.append(tuple(adapter.model.generate(ids, **given)[0, ids.shape[1] :].tolist()))
    return made


# Folders


@pytest.mark.parametrize("own", [{}, {"rank": 0}, {"rank": 1}, {"rank": 2, "max_new_tokens": 3}])
def test_a_folders_loop_gives_what_transformers_alone_gives(make, folder, own):
    options = {"custom_generate": folder(), **TRUST, **own}
    found = tokens(make(), options)
    assert found == alone(make(), options)
    assert (found == tokens(make(), {})) == (own.get("rank", 0) == 0)


def test_a_folders_loop_runs_with_the_pipeline_and_in_batches(make, folder):
    options = {"custom_generate": folder(), **TRUST, "max_new_tokens": 5}
    adapter = make(WINDOW)
    assert tokens(adapter, options) == tokens(adapter, {})
    requests = [
        Request(context=context, questions="who is in the tin?") for context in ("x", CONTEXT[:43])
    ]
    together = adapter.process_requests(requests, options)
    alone = [adapter.process_request(request, {"max_new_tokens": 5}) for request in requests]
    assert [r.responses for r in together] == [r.responses for r in alone]


def test_what_a_folders_loop_does_not_take_is_not_known(make, folder):
    with pytest.raises(RequestError, match="'rnk' is not known; did you mean 'rank'"):
        answers(make(), {"custom_generate": folder(), **TRUST, "rnk": 1})
    with pytest.raises(RequestError, match="'kwargs' is not known"):
        answers(make(), {"custom_generate": folder(), **TRUST, "kwargs": 1})


def test_a_loop_is_refused_where_a_state_cannot_follow_and_none_is_none(make, folder):
    options = {"custom_generate": folder(), **TRUST}
    with pytest.raises(RequestError, match="'custom_generate' is not supported with masker 'ques"):
        answers(make(STATEFUL), options)
    assert tokens(make(STATEFUL), {"custom_generate": None}) == tokens(make(STATEFUL), {})


@pytest.mark.parametrize(
    ("written", "shown"),
    [("return 3", "3"), ("return None", "None"), ("return inputs[:, 1:]", "tensor")],
)
def test_what_is_no_answer_is_said(make, folder, written, shown):
    text = f"def generate(model, inputs, **others):\n    {written}\n"
    message = f"the decoding loop returned {shown}.*; expected the token ids of every prompt"
    with pytest.raises(RequestError, match=message) as caught:
        answers(make(), {"custom_generate": folder(text), **TRUST})
    assert "\n" not in str(caught.value)


# Trust


@pytest.mark.parametrize("given", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
def test_nothing_is_run_that_the_caller_does_not_trust(make, folder, notes, given):
    place = folder()
    message = f"'custom_generate' runs code from '{place}'; it needs trust_remote_code=True beside"
    for check in (HuggingFaceAdapter.check_generation, lambda o: answers(make(), o)):
        with pytest.raises(RequestError, match=message):
            check({"custom_generate": place, **given})
    with pytest.raises(ParameterError, match="trust_remote_code = 'yes' is not allowed"):
        answers(make(), {"custom_generate": place, "trust_remote_code": "yes"})
    assert not notes.LOADED


@pytest.mark.parametrize(
    "form", [str, lambda p: GenerationConfig.from_pretrained(p.parent, p.name)]
)
def test_a_file_can_neither_name_code_nor_trust_it(make, folder, notes, tmp_path, form):
    place = folder()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"custom_generate": place, "trust_remote_code": True, "top_k": 3}))
    options = {"generation_config": form(path)}
    assert HuggingFaceAdapter.plain_generation(options) == {"top_k": 3}
    assert tokens(make(), options) == tokens(make(), {})
    path.write_text(json.dumps({"penalty_alpha": 0.6, "trust_remote_code": True}))
    options = {"generation_config": form(path)}
    with pytest.raises(RequestError, match="'penalty_alpha' runs code from the hub repository"):
        answers(make(), options)
    assert not notes.LOADED


def test_trust_without_code_changes_nothing(make):
    assert tokens(make(), TRUST) == tokens(make(), {})


# What cannot be loaded


@pytest.fixture
def unread(make):
    """An adapter whose model must not be called."""
    adapter = make()
    hook = adapter.model.register_forward_pre_hook(lambda *_: pytest.fail("a context was read"))
    yield adapter
    hook.remove()


@pytest.mark.parametrize(
    ("text", "requirements", "reason"),
    [
        ("def generate(model):\n    (", None, "was never closed"),
        ("def other(model):\n    pass\n", None, "has no attribute 'generate'"),
        ("raise RuntimeError('no\\nsuch')", None, "no such"),
        ("import no_such_package\n", None, "no_such_package"),
        (LOOP, "no-such-package>=3\n", r"no-such-package>=3 \(installed: None\)"),
    ],
)
def test_code_that_cannot_be_loaded_is_one_line(unread, folder, text, requirements, reason):
    place = folder(text, requirements=requirements)
    options = {"custom_generate": place, **TRUST}
    for check in (unread.check_generation, lambda o: answers(unread, o)):
        with pytest.raises(RequestError, match=f"the code of '{place}'.*{reason}") as caught:
            check(options)
        assert "\n" not in str(caught.value)


def test_a_name_that_leads_nowhere_is_one_line(unread, tmp_path):
    for name, message in (
        (str(tmp_path), "the folder '.*' has no custom_generate/generate.py"),
        ("transformers-community/dola", "which is no folder, and the local hub cache lacks it"),
        ("no such place", "which is no folder, and "),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            answers(unread, {"custom_generate": name, **TRUST})
        assert "\n" not in str(caught.value)
    for value in (3, "", ["x"]):
        with pytest.raises(ParameterError, match="expected a function, or the name of a folder"):
            answers(unread, {"custom_generate": value, **TRUST})


# Ways to decode that were moved to the hub

MOVED = {
    GenerationMode.DOLA_GENERATION: {"dola_layers": "low", "repetition_penalty": 1.2},
    GenerationMode.CONTRASTIVE_SEARCH: {"penalty_alpha": 0.6, "top_k": 4, "low_memory": True},
    GenerationMode.GROUP_BEAM_SEARCH: {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
    },
    GenerationMode.CONSTRAINED_BEAM_SEARCH: {"num_beams": 2, "force_words_ids": [[30]]},
}


@pytest.fixture
def moved(monkeypatch):
    """Lets transformers find all of these ways to decode in one place."""

    def to(place):
        for mode in MOVED:
            monkeypatch.setitem(utils.GENERATION_MODES_MAPPING, mode, place)

    return to


@pytest.mark.parametrize("mode", MOVED, ids=lambda mode: mode.value)
def test_a_moved_way_to_decode_runs_its_repository_as_transformers_does(
    make, folder, notes, moved, mode
):
    moved(folder(LOOP.replace("rank=0", "rank=1")))
    options = {**MOVED[mode], **TRUST}
    assert tokens(make(WINDOW), options)
    found = tokens(make(), options)
    assert found != tokens(make(), {})
    ours = notes.SEEN[-1]
    assert found == alone(make(), options)
    theirs = notes.SEEN[-1]
    for name, value in MOVED[mode].items():
        assert ours[name] == theirs[name] == value
    assert len(notes.LOADED) == 1
    with pytest.raises(RequestError, match="'rank' is not known"):
        tokens(make(), {**options, "rank": 1})


@pytest.mark.parametrize("mode", MOVED, ids=lambda mode: mode.value)
def test_a_moved_way_to_decode_needs_trust_its_code_and_no_state(
    make, folder, notes, moved, unread, mode
):
    repository = utils.GENERATION_MODES_MAPPING[mode]
    options = MOVED[mode]
    with pytest.raises(RequestError, match=f"the hub repository '{repository}'; it needs trust"):
        answers(unread, options)
    with pytest.raises(RequestError, match=f"code from '{repository}', which is no folder, and"):
        answers(unread, {**options, **TRUST})
    moved(folder())
    names = "|".join(options)
    with pytest.raises(RequestError, match=f"'({names})' is not supported with masker 'quest'"):
        answers(make(STATEFUL), {**options, **TRUST})


@pytest.mark.parametrize(
    ("options", "name", "mode"),
    [
        ({"low_memory": True}, "low_memory", "greedy_search"),
        ({"penalty_alpha": 0.6, "do_sample": True}, "penalty_alpha", "sample"),
        ({"penalty_alpha": 0.6, "top_k": 1}, "penalty_alpha", "greedy_search"),
        ({"num_beam_groups": 2}, "num_beam_groups", "greedy_search"),
        ({"diversity_penalty": 0.5, "num_beams": 2}, "diversity_penalty", "beam_search"),
        ({"dola_layers": [1], "num_beams": 2}, "dola_layers", "beam_search"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(options, name, mode):
    message = f"{name!r} has no effect: with the other options the way to decode is {mode},"
    with pytest.raises(RequestError, match=message):
        HuggingFaceAdapter.check_generation({**options, **TRUST})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty_alpha", "x"),
        ("penalty_alpha", -1.0),
        ("num_beam_groups", 0),
        ("num_beam_groups", True),
        ("diversity_penalty", "x"),
        ("dola_layers", "middle"),
        ("dola_layers", 3),
        ("constraints", 3),
        ("force_words_ids", "x"),
        ("low_memory", "x"),
    ],
)
def test_a_value_of_another_form_is_found_without_a_model(name, value):
    with pytest.raises(ParameterError, match=f"generation: {name} = ") as caught:
        HuggingFaceAdapter.check_generation({name: value, **TRUST})
    assert "\n" not in str(caught.value)


def test_a_value_that_asks_for_nothing_changes_nothing(make):
    neutral = {"num_beam_groups": 1, "diversity_penalty": 0.0, "penalty_alpha": 0.0}
    others = {"low_memory": False, "dola_layers": None, "constraints": None}
    assert tokens(make(), {**neutral, **others}) == tokens(make(), {})


def test_a_checkpoint_that_asks_for_code_is_not_obeyed_without_the_callers_word(
    make, folder, notes, moved, unread, monkeypatch
):
    moved(folder())
    config = GenerationConfig(**unread.model.generation_config.to_dict())
    config.penalty_alpha = 0.6
    monkeypatch.setattr(unread.model, "generation_config", config)
    message = "the checkpoint's generation config runs code from the hub repository"
    with pytest.raises(RequestError, match=message):
        answers(unread, {})
    assert not notes.LOADED
    unread.model._forward_pre_hooks.clear()
    assert len(tokens(unread, TRUST)) == 3
    assert notes.LOADED
    loops = len(notes.SEEN)
    # the caller's own options come first
    assert tokens(unread, {"penalty_alpha": 0.0}) == tokens(unread, {"top_k": 1})
    assert len(notes.SEEN) == loops


CONTRASTIVE = """
    import torch
    from transformers import GenerationMixin

    # after Su et al., "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417): of
    # the k likeliest tokens the one that is likely and unlike everything before it
    def _loop(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
    ):
        alpha, k = generation_config.penalty_alpha, generation_config.top_k
        name = "past_key_values" if "past_key_values" in kwargs else "cache"
        cache, rows, mask = kwargs[name], len(input_ids), kwargs.get("attention_mask")
        if cache.get_seq_length():
            raise NameError("logits of the first step")
        mask = torch.ones_like(input_ids) if mask is None else mask
        def read(ids, mask):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            return model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True,
                output_hidden_states=True, **{name: cache},
            )
        output = read(input_ids, mask)
        before, logits = output.hidden_states[-1], output.logits[:, -1]
        real = mask
        while True:
            likely, chosen = logits_processor(input_ids, logits).softmax(-1).topk(k)
            cache.batch_repeat_interleave(k)
            wide = torch.cat([mask, mask.new_ones(rows, 1)], 1).repeat_interleave(k, 0)
            output = read(chosen.reshape(-1, 1), wide)
            new = output.hidden_states[-1].reshape(rows, k, -1)
            like = torch.cosine_similarity(new[:, :, None], before[:, None], dim=-1)
            like = like.masked_fill(real[:, None] == 0, -9).amax(-1)
            best = ((1 - alpha) * likely - alpha * like).argmax(-1)
            picked = torch.arange(rows) * k + best
            cache.batch_select_indices(picked)
            logits = output.logits[picked, -1]
            before = torch.cat([before, new[torch.arange(rows), best][:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            real = mask
            input_ids = torch.cat([input_ids, chosen[torch.arange(rows), best][:, None]], 1)
            if stopping_criteria(input_ids, logits).all():
                return input_ids

    def generate(model, *args, **kwargs):
        return GenerationMixin.generate(model, *args, custom_generate=_loop, **kwargs)
"""


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_contrastive_search_compares_with_the_whole_prompt(make, folder, moved, family):
    moved(folder(CONTRASTIVE))
    adapter, options = make(family=family), {"penalty_alpha": 0.6, "top_k": 4, **TRUST}
    found = tokens(adapter, options)
    assert found == alone(adapter, options)
    assert found != tokens(adapter, {})
    prefilled = adapter.prefill(Request(context=CONTEXT, questions=QUESTIONS))
    for given, expected in ((options, found), ({}, tokens(adapter, {})), (options, found)):
        details = adapter.answer(prefilled, None, {"max_new_tokens": 5, **given}).details
        assert [detail.token_ids for detail in details] == expected


def test_contrastive_search_runs_sparse_and_in_batches(make, folder, moved):
    moved(folder(CONTRASTIVE))
    adapter = make(WINDOW)
    options = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 5, **TRUST}
    requests = [
        Request(context=context, questions="who is in the tin?") for context in ("x", CONTEXT[:43])
    ]
    together = adapter.process_requests(requests, options)
    alone = [adapter.process_request(request, options) for request in requests]
    assert [r.responses for r in together] == [r.responses for r in alone]


def test_a_loop_that_fails_is_named_and_leaves_the_context_as_it_was(make, folder):
    place = folder(CONTRASTIVE)
    adapter, options = make(), {"custom_generate": place, **TRUST}
    prefilled = adapter.prefill(Request(context=CONTEXT, questions=QUESTIONS[0]))
    before = adapter.answer(prefilled, None, {"max_new_tokens": 5}).responses
    message = f"the code of '{place}' failed with NameError: logits of the first step"
    with pytest.raises(RequestError, match=message):
        adapter.answer(prefilled, None, options)
    folder(
        """
        def generate(model, inputs, past_key_values=None, cache=None, **others):
            held = cache if past_key_values is None else past_key_values
            held.batch_repeat_interleave(3)
            raise IndexError("after all")
        """
    )
    with pytest.raises(RequestError, match="failed with IndexError: after all"):
        adapter.answer(prefilled, None, options)
    assert adapter.answer(prefilled, None, {"max_new_tokens": 5}).responses == before


# What a result says of the code


def test_results_record_the_content_of_the_code_and_not_where_it_lies(folder, moved):
    def identity(options):
        return HuggingFaceAdapter.generation_identity(options)

    one, other = folder(name="one"), folder(name="other")
    options = {"custom_generate": one, **TRUST, "rank": 1}
    assert identity(options) == {**options, "custom_generate": code_hash(one)}
    assert identity(options) == identity({**options, "custom_generate": other})
    (moved_hash,) = {code_hash(one)}
    with open(f"{other}/custom_generate/choices.py", "a") as file:
        file.write("# changed\n")
    assert code_hash(other) != moved_hash
    assert identity(options) != identity({**options, "custom_generate": other})
    moved(one)
    found = identity({"penalty_alpha": 0.6, **TRUST})
    assert found == {"penalty_alpha": 0.6, **TRUST, "custom_generate": moved_hash}
    assert identity({"do_sample": True}) == {"do_sample": True}


def test_code_that_has_changed_is_loaded_anew(make, folder):
    options = {"custom_generate": folder(), **TRUST}
    before = tokens(make(), options)
    folder(LOOP.replace("rank=0", "rank=1"))
    assert tokens(make(), options) == tokens(make(), {**options, "rank": 1}) != before
