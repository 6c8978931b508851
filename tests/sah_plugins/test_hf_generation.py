"""Everything that ``generate`` can do, through the adapter."""

import json

import attrs
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sah_core import Request
from sah_core.errors import ParameterError, RequestError
from sah_plugins.adapters.hf import HuggingFaceAdapter

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?", "is the rat on it?")
WINDOW, STATEFUL, EVERYTHING = "sink(2) | local(4)", "sink(2) | quest(8, page_size=4)", "local(1.0)"
SAMPLE = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0, "eos_token_id": 1}


def ask(adapter, options, questions=QUESTIONS, context=CONTEXT, **request):
    return adapter.process_request(
        Request(context=context, questions=questions, **request), options
    ).details


def plain(adapter, question, options, stops=None):
    """What transformers alone generates, all sequences."""
    ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
    options = {"pad_token_id": 0, "eos_token_id": [2], **options}
    out = adapter.model.generate(ids, tokenizer=adapter.tokenizer, **options)
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


# Whatever transformers does with an option happens here too

GREEDY = {"max_new_tokens": 8, "do_sample": False}
OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[40], [41], [50], [60]]},
    "suppress_tokens": {"suppress_tokens": list(range(5, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(5, 90))},
    "sequence_bias": {"sequence_bias": [[[30], 50.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 30.0)},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(64))},
    "renormalize_logits": {"renormalize_logits": True},
}


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_greedy_option_gives_what_transformers_alone_gives(make, option, pipeline):
    adapter, options = make(pipeline), {**GREEDY, **OPTIONS[option]}
    for question, detail in zip(QUESTIONS, ask(adapter, options), strict=True):
        [expected] = plain(adapter, question, options)
        assert detail.token_ids == expected


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - {"renormalize_logits"}))
def test_each_of_these_options_changes_an_answer(make, option):
    # the test above would pass if options were dropped on both sides
    adapter, options = make(), {**GREEDY, **OPTIONS[option]}
    with_it = [d.token_ids for d in ask(adapter, options)]
    assert with_it != [d.token_ids for d in ask(adapter, GREEDY)]


SAMPLING = (
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_p": 0.4},
    {"top_k": 3},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01},
    {"temperature": 2.0, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2},
)


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_sampling_draws_what_transformers_alone_draws(make, sampling, pipeline):
    adapter, options = make(pipeline), {"max_new_tokens": 10, "do_sample": True, **sampling}
    for question in QUESTIONS[:2]:
        [detail] = ask(adapter, {**options, "seed": 11}, questions=[question])
        torch.manual_seed(11)
        assert [detail.token_ids] == plain(adapter, question, options)


@pytest.mark.parametrize("pipeline", ["dense", EVERYTHING])
@pytest.mark.parametrize(
    "beams",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 2, "do_sample": True, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
def test_beams_end_where_those_of_transformers_alone_end(make, beams, pipeline, family):
    adapter, options = make(pipeline, family), {"max_new_tokens": 6, **beams}
    for question, detail in zip(QUESTIONS, ask(adapter, {**options, "seed": 3}), strict=True):
        torch.manual_seed(3)
        expected = plain(adapter, question, options)
        ours = [detail.token_ids, *(other.token_ids for other in detail.others)]
        assert len(ours) == beams.get("num_return_sequences", 1)
        for one, other in zip(ours, expected, strict=True):
            assert one == other[: len(one)]
            assert set(other[len(one) :]) <= {0}


def test_beams_work_with_a_selection_and_leave_the_prefill_alone(make):
    adapter = make(WINDOW)
    request = Request(context=CONTEXT, questions=QUESTIONS)
    prefilled = adapter.prefill(request)
    before = adapter.answer(prefilled, WINDOW, GREEDY).responses
    beams = adapter.answer(prefilled, WINDOW, {**GREEDY, "num_beams": 3}).responses
    assert adapter.answer(prefilled, WINDOW, GREEDY).responses == before
    assert adapter.answer(prefilled, WINDOW, {**GREEDY, "num_beams": 3}).responses == beams


# Seeds


@pytest.mark.parametrize("pipeline", ["dense", WINDOW, STATEFUL])
def test_a_seed_makes_answers_reproducible_and_independent_of_the_other_questions(make, pipeline):
    adapter = make(pipeline)
    one = [d.token_ids for d in ask(adapter, {**SAMPLE, "seed": 5})]
    assert [d.token_ids for d in ask(adapter, {**SAMPLE, "seed": 5})] == one
    assert [d.token_ids for d in ask(adapter, {**SAMPLE, "seed": 6})] != one
    backwards = ask(adapter, {**SAMPLE, "seed": 5}, questions=QUESTIONS[::-1])
    assert [d.token_ids for d in backwards] == one[::-1]


def test_a_seed_leaves_the_generators_of_the_caller_alone(make):
    adapter = make(WINDOW)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ask(adapter, {**SAMPLE, "seed": 5})
    assert torch.equal(torch.get_rng_state(), before)
    ask(adapter, SAMPLE)
    assert not torch.equal(torch.get_rng_state(), before)


# Several sequences


@pytest.mark.parametrize("pipeline", ["dense", WINDOW, STATEFUL, f"{STATEFUL} @ prefill=sparse"])
def test_several_sequences_are_draws_from_one_state(make, pipeline):
    adapter = make(pipeline)
    options = {**SAMPLE, "seed": 5, "num_return_sequences": 4}
    details = ask(adapter, options)
    for detail in details:
        assert len(detail.others) == 3
        assert detail.texts == (detail.text, *(other.text for other in detail.others))
        assert len(set(detail.texts)) > 1
        for other in detail.others:
            assert len(other.token_ids) == 8
            assert other.finished == "length"
            assert other.text == adapter.tokenizer.decode(other.token_ids, skip_special_tokens=True)
        assert detail.tokens_per_second is None
    # the first is what one draw gives, and the next comes from the same state
    single = ask(adapter, {**SAMPLE, "seed": 5})
    assert [d.token_ids for d in single] == [d.token_ids for d in details]
    frozen = {**options, "top_k": 1}
    for detail in ask(adapter, frozen):
        assert set(detail.texts) == {detail.text}


def test_a_response_with_several_sequences_is_plain_data(make):
    request = Request(context=CONTEXT, questions=QUESTIONS[0])
    response = make().process_request(request, {**SAMPLE, "num_return_sequences": 2})
    assert response.responses == response.details[0].text
    back = json.loads(json.dumps(attrs.asdict(response)))
    assert back["details"][0]["others"][0]["text"] == response.details[0].texts[1]


class Force(LogitsProcessor):
    """Makes the token of each step certain, a list of tokens per draw."""

    def __init__(self, *draws):
        self.draws = [iter(draw) for draw in draws]
        self.length = 0

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] <= self.length:
            self.draws.pop(0)
        self.length = input_ids.shape[1]
        forced = torch.full_like(scores, -1e4)
        forced[:, next(self.draws[0])] = 0
        return forced


def test_every_sequence_ends_in_its_own_way(make):
    adapter = make()
    stop = adapter.tokenizer("ab.", add_special_tokens=False).input_ids
    processor = Force([30, 2, 9], [*stop, 9], [30, 31, 32, 33])
    options = {
        "max_new_tokens": 4,
        "do_sample": True,
        "num_return_sequences": 3,
        "stop_strings": ["."],
        "logits_processor": LogitsProcessorList([processor]),
    }
    [detail] = ask(adapter, options, questions=QUESTIONS[:1])
    ends = [detail.finished, *(other.finished for other in detail.others)]
    assert ends == ["eos", "stop", "length"]
    assert detail.token_ids == (30, 2)
    assert detail.others[0].text == "ab."
    assert len(detail.others[1].token_ids) == 4


# Stops


def test_an_end_at_which_a_stop_string_ends_too_counts_as_eos(make):
    adapter = make()
    options = {
        "max_new_tokens": 4,
        "stop_strings": "b",
        "eos_token_id": adapter.tokenizer("b", add_special_tokens=False).input_ids,
        "logits_processor": LogitsProcessorList([Force([30, adapter.tokenizer("b").input_ids[1]])]),
    }
    assert ask(adapter, options, questions=QUESTIONS[:1])[0].finished == "eos"


# What makes no sense is said before a model is loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "'temprature' is not known; did you mean 'temperature'?"),
        ({"nonsense": 1}, "'nonsense' is not known"),
        ({"past_key_values": ()}, "a cache that the adapter makes"),
        ({"num_return_sequences": 2}, "needs do_sample=True"),
        ({"num_return_sequences": 4, "num_beams": 3}, "or as many num_beams"),
        ({"num_return_sequences": 4, "num_beams": 3, "do_sample": True}, "as many num_beams"),
        ({"early_stopping": 7}, "do not go together: `early_stopping`"),
    ],
)
def test_a_mistake_in_the_options_is_found_without_a_model(options, message):
    with pytest.raises(RequestError, match=message.replace("?", r"\?")) as caught:
        HuggingFaceAdapter.check_generation(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2.0),
        ("typical_p", 0.0),
        ("repetition_penalty", -1.0),
        ("no_repeat_ngram_size", 0.5),
        ("seed", -1),
        ("seed", 1.5),
        ("num_beams", 0),
        ("num_return_sequences", True),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
    ],
)
def test_a_value_out_of_range_is_found_without_a_model(name, value):
    with pytest.raises(ParameterError, match=f"generation: {name} = ") as caught:
        HuggingFaceAdapter.check_generation({"do_sample": True, name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_strings", 3),
        ("stop_strings", ""),
        ("stop_strings", [".", ""]),
        ("stop_strings", [3]),
        ("eos_token_id", "x"),
        ("eos_token_id", [True]),
        ("pad_token_id", -5),
        ("seed", 2**64),
        ("logits_processor", 3),
        ("stopping_criteria", [3]),
        ("prefix_allowed_tokens_fn", 3),
        ("streamer", 3),
        ("assistant_model", 3),
        ("max_time", -1),
        ("guidance_scale", "x"),
        ("length_penalty", "x"),
        ("bad_words_ids", []),
        ("sequence_bias", 3),
        ("suppress_tokens", "x"),
        ("begin_suppress_tokens", "x"),
        ("forced_eos_token_id", -3),
        ("exponential_decay_length_penalty", 3),
        ("repetition_penalty", 0),
    ],
)
def test_a_value_of_another_form_is_found_without_a_model_though_nothing_is_sampled(name, value):
    with pytest.raises(ParameterError, match=f"generation: {name} = ") as caught:
        HuggingFaceAdapter.check_generation({name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [["temperature"], "temperature=0"])
def test_options_that_are_no_mapping_are_refused(make, options):
    with pytest.raises(RequestError, match="the generation options are .* expected a mapping"):
        HuggingFaceAdapter.check_generation(options)
    with pytest.raises(RequestError, match="the request options are .* expected a mapping"):
        make().process_request(Request(context="a", questions="b"), None, options)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}], ids=str)
def test_greedy_decoding_does_not_read_what_sampling_reads(make, option):
    adapter = make()
    expected = [detail.token_ids for detail in ask(adapter, GREEDY)]
    found = [detail.token_ids for detail in ask(adapter, {**GREEDY, **option})]
    assert found == expected


def test_token_ids_may_be_numbers_of_another_library(make):
    expected = [d.token_ids for d in ask(make(), {**GREEDY, "eos_token_id": [40, 50]})]
    eos = torch.tensor([40, 50])
    assert [d.token_ids for d in ask(make(), {**GREEDY, "eos_token_id": eos})] == expected


def test_options_that_are_fine_pass_and_are_not_changed():
    options = {**SAMPLE, "seed": 3, "top_k": 0, "stop_strings": ["x"], "use_cache": True}
    before = dict(options)
    HuggingFaceAdapter.check_generation(options)
    HuggingFaceAdapter.check_generation(None)
    assert options == before


# Roles

TURNS = [
    ("user", "is it warm?"),
    ("assistant", "it is."),
    ("user", "and red?"),
    ("assistant", "no"),
]


def test_turns_and_system_message_stand_before_the_context(models, make):
    adapter = make(chat=models.PLAIN_CHAT)
    request = Request(context="x", questions=("a?", "b?"), system="be brief", turns=TURNS)
    prefilled = adapter.prefill(request)
    text = adapter.tokenizer.decode(prefilled.prompts[1].ids)
    assert text == (
        "<s>[system]\nbe brief\n[user]\nis it warm?\n[assistant]\nit is.\n[user]\nand red?\n"
        "[assistant]\nno\n[user]\nx\nb?\n[assistant]\n"
    )
    assert adapter.tokenizer.decode(prefilled.prompts[1].ids[: prefilled.shared]).endswith(
        "[user]\nx"
    )


def test_turns_change_the_answer_and_cost_one_prefill(models, make):
    adapter = make(chat=models.PLAIN_CHAT)
    with_turns = ask(adapter, GREEDY, turns=TURNS)
    assert len({d.context_tokens for d in with_turns}) == 1
    assert [d.text for d in with_turns] != [d.text for d in ask(adapter, GREEDY)]


def test_turns_need_a_chat_template(models, make):
    request = Request(context="x", questions="a?", turns=TURNS)
    with pytest.raises(RequestError, match="turns of a conversation need a chat template"):
        make().prefill(request)
    with pytest.raises(RequestError, match="turns of a conversation need a chat template"):
        make(chat=models.PLAIN_CHAT).prefill(request, {"chat": False})


def test_a_template_that_refuses_a_role_is_named(models, make):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    adapter = make(chat=strict + models.PLAIN_CHAT)
    with pytest.raises(RequestError, match="refuses messages of system, user: no system here"):
        adapter.prefill(Request(context="x", questions="a?", system="be brief"))


# Truncation


@pytest.mark.parametrize("policy", ["middle", "head"])
@pytest.mark.parametrize("template", ["PLAIN_CHAT", "BOS_CHAT", "TRIMMING_CHAT"])
def test_truncation_never_cuts_template_system_message_turns_or_question(
    models, make, template, policy
):
    adapter = make(chat=getattr(models, template), adds_bos=template != "BOS_CHAT")
    context = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def text(length):
        request = Request(
            context=context,
            questions="a?",
            separator="|",
            answer_prefix="it",
            system="be brief",
            turns=TURNS[:2],
            truncation=policy,
        )
        [prompt] = adapter.prefill(request, {"max_context_length": length}).prompts
        assert prompt.ids.count(1) == 1
        return adapter.tokenizer.decode(prompt.ids)

    whole = text(100)
    for length in (1, 5, 12):
        head = length if policy == "head" else length // 2
        tail = length - head
        kept = context[:head] + (context[-tail:] if tail else "")
        assert text(length) == whole.replace(context, kept)


def test_stop_strings_of_a_checkpoint_end_answers_unless_others_are_given(make, monkeypatch):
    adapter, options = make(), {"max_new_tokens": 6}
    wanted = [d.texts for d in ask(adapter, {**options, "stop_strings": ["e", "a"]})]
    plain = [d.texts for d in ask(adapter, options)]
    assert wanted != plain
    monkeypatch.setattr(adapter.model.generation_config, "stop_strings", ["e", "a"])
    assert [d.texts for d in ask(adapter, options)] == wanted
    assert [d.texts for d in ask(adapter, {**options, "stop_strings": "~~"})] == plain
