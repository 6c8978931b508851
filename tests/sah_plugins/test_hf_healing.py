"""Token healing: as transformers does it, behind contexts that are read once."""

import attrs
import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from sah_core import Request
from sah_core.errors import ParameterError, RequestError
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.healing import extensions
from sah_plugins.metrics.density import Density

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is it? a", "where is the hen? h", "what t", "is it so.", "so\n \n", "b a")
HEALS = "Qh"
"""A question whose end the model of the family Llama chooses anew."""
HEAL = {"max_new_tokens": 6, "token_healing": True}
FAMILIES = ("llama", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3")
EVERYTHING, WINDOW = "local(1.0)", "sink(2) | local(4)"
STATEFUL = "sink(2) | quest(8, page_size=4)"
PIPELINES = (
    "dense",
    WINDOW,
    "sink(0.1) | local(0.1) | oracle-top-k(0.2)",
    STATEFUL,
    "sink(2) | pq-cache(8)",
    f"{STATEFUL} @ prefill=sparse",
    "sink(1) | local(0.3) @ prefill=sparse, decode=dense",
)


@pytest.fixture
def adapters(make):
    """Adapters whose tokenizer adds no BOS, for transformers hides it while it heals."""
    return lambda *args, **options: make(*args, **{"adds_bos": False, **options})


def asking(question, context=CONTEXT, **options):
    return Request(**{"context": context, "questions": question, "separator": "", **options})


def ask(adapter, question, options=HEAL, request_options=None, **request):
    response = adapter.process_request(asking(question, **request), options, request_options)
    return response.details[0]


def plain(adapter, text, options=HEAL):
    """The healed token and the new ones of every sequence, from transformers alone."""
    ids = torch.tensor([adapter.tokenizer(text).input_ids])
    stripped = len(adapter.tokenizer(text.strip()).input_ids)
    given = {"pad_token_id": 0, "eos_token_id": [2], "tokenizer": adapter.tokenizer, **options}
    rows = adapter.model.generate(ids, **given).tolist()
    return [(row[stripped - 1], tuple(row[stripped:])) for row in rows]


def tail_of(adapter, text):
    return adapter.tokenizer(text.rstrip(), add_special_tokens=False).input_ids[-1]


def last(adapter, detail, question):
    """The last token of the prompt that was answered."""
    healed = detail.healed_token
    return tail_of(adapter, question) if healed is None else healed


# As in transformers


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [(family, "dense") for family in FAMILIES] + [("llama", EVERYTHING), ("gemma3", EVERYTHING)],
)
def test_a_healed_prompt_and_its_answer_are_those_of_transformers_alone(adapters, family, pipeline):
    adapter, healed = adapters(pipeline, family), 0
    for question in QUESTIONS:
        detail = ask(adapter, question)
        [expected] = plain(adapter, CONTEXT + question)
        assert (last(adapter, detail, question), detail.token_ids) == expected
        healed += detail.healed_token is not None
    assert healed


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 2.0, "seed": 5},
        {"num_beams": 3, "num_return_sequences": 2},
        {"guidance_scale": 1.7},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.8},
        {"max_length": 80, "min_length": 78, "max_new_tokens": None},
        {"stop_strings": ["e", "o"]},
    ],
    ids=str,
)
def test_other_options_are_those_of_transformers_behind_a_healed_prompt(adapters, options):
    adapter, options = adapters(), {**HEAL, **options}
    for question in QUESTIONS[:4]:
        detail = ask(adapter, question, options)
        seed = options.get("seed")
        torch.manual_seed(seed or 0)
        theirs = {k: v for k, v in options.items() if k != "seed" and v is not None}
        expected = plain(adapter, CONTEXT + question, theirs)
        ours = [detail.token_ids, *(other.token_ids for other in detail.others)]
        assert len(ours) == len(expected)
        for one, (token, other) in zip(ours, expected, strict=True):
            assert token == last(adapter, detail, question)
            assert one == other[: len(one)]
            assert set(other[len(one) :]) <= {0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_of_one_token_is_healed_behind_the_end_of_its_context(adapters, family):
    adapter, context, healed = adapters(family=family), f"{CONTEXT}what?", 0
    for question in ("t", "a", "h", "a \n"):
        detail = ask(adapter, question, context=context)
        [expected] = plain(adapter, context + question)
        assert (last(adapter, detail, question), detail.token_ids) == expected
        assert detail.prompt_tokens == detail.context_tokens + 1
        healed += detail.healed_token is not None
    assert healed


def test_what_transformers_has_no_token_for_stays_as_it_is(adapters):
    adapter = adapters()
    for question in ("what @", "what 7", "(é"):
        detail = ask(adapter, question)
        assert detail.healed_token is None
        assert detail.token_ids == ask(adapter, question, {"max_new_tokens": 6}).token_ids


@pytest.mark.parametrize("tail", ["a", "h", " t", ".", "?", "<", "he", "Z", "\n"])
def test_extensions_are_the_tokens_of_the_vocabulary_that_begin_with_the_text(models, tail):
    tokenizer = models.tokenizer()
    token = tokenizer.convert_tokens_to_ids(tail)
    expected = {i for text, i in tokenizer.get_vocab().items() if text[: len(tail)] == tail}
    assert set(extensions(tokenizer, token, 1000)) == expected
    assert set(extensions(tokenizer, token, 100)) == {i for i in expected if i < 100}
    assert extensions(tokenizer, tokenizer.eos_token_id, 1000) == []


# A BOS, whitespace and templates


@pytest.mark.parametrize("context", [CONTEXT, "", "x"])
def test_a_bos_stays_where_it_is(adapters, context):
    adapter, question = adapters(adds_bos=True), "h"
    detail = ask(adapter, question, context=context)
    ids = adapter.tokenizer(context + question).input_ids
    assert ids[0] == 1
    assert detail.prompt_tokens == len(ids)
    logits = adapter.model(torch.tensor([ids[:-1]])).logits[0, -1]
    for token in extensions(adapter.tokenizer, ids[-1], len(logits)):
        logits[token] += 10
    logits[ids[-1]] += 1
    assert int(logits.argmax()) == last(adapter, detail, question)


def test_a_prompt_of_one_token_has_nothing_to_be_chosen_from(adapters):
    detail = ask(adapters(), "h", context="")
    assert (detail.prompt_tokens, detail.healed_token) == (1, None)


@pytest.mark.parametrize("end", [" ", "\n", "  \n", "\n\n "])
def test_whitespace_at_the_end_of_a_prompt_counts_as_not_given(adapters, end):
    # ".\n" is one token, whose point another token has
    for question in ("is it so.", "where is the h", "a b"):
        with_it, without = (ask(adapters(), text) for text in (question + end, question))
        assert with_it.token_ids == without.token_ids
        assert with_it.text == without.text
        assert with_it.prompt_tokens == without.prompt_tokens
        assert with_it.healed_token == without.healed_token


def test_of_a_chat_the_answer_prefix_is_healed_and_never_the_template(models, adapters):
    adapter = adapters(chat=models.PLAIN_CHAT)
    bare, none = (ask(adapter, "what?", given) for given in (HEAL, {"max_new_tokens": 6}))
    assert bare.healed_token is None
    assert bare.token_ids == none.token_ids
    blank = ask(adapter, "what?", answer_prefix=" \n")
    assert blank.prompt_tokens == bare.prompt_tokens + 2
    healed, spaced = (ask(adapter, "what?", answer_prefix=text) for text in ("Qh", "Qh \n"))
    assert healed.healed_token == spaced.healed_token is not None
    assert (healed.text, healed.prompt_tokens) == (spaced.text, spaced.prompt_tokens)
    text = adapter.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{CONTEXT}what?"}], tokenize=False, add_generation_prompt=True
    )
    [expected] = plain(adapter, f"{text}Qh")
    assert (healed.healed_token, healed.token_ids) == expected


# Text


def test_the_text_of_an_answer_follows_what_the_caller_wrote(adapters):
    adapter = adapters()
    for question in QUESTIONS:
        detail = ask(adapter, question, {**HEAL, "num_beams": 3, "num_return_sequences": 2})
        tail, token = tail_of(adapter, question), last(adapter, detail, question)
        begins = adapter.tokenizer.decode([token])[len(adapter.tokenizer.decode([tail])) :]
        assert (token == tail) == (begins == "")
        for text, ids in (
            (detail.text, detail.token_ids),
            *((other.text, other.token_ids) for other in detail.others),
        ):
            assert text == begins + adapter.tokenizer.decode(ids, skip_special_tokens=True)
        assert detail.new_tokens == len(detail.token_ids)


def test_a_special_token_that_takes_the_place_of_text_has_none(adapters, monkeypatch):
    adapter = adapters()
    monkeypatch.setattr(type(adapter), "_chosen", lambda *a: {(0, 0): 3})
    detail = ask(adapter, "so <")
    assert detail.healed_token == 3
    assert detail.text == adapter.tokenizer.decode(detail.token_ids, skip_special_tokens=True)


# Pipelines, batches and states


def written_out(adapter, question, options=None):
    """The answer to the question that the healing made, where its tokens are those."""
    detail = ask(adapter, question, HEAL, options)
    if detail.healed_token is None:
        return None
    tail = tail_of(adapter, question)
    spelt = adapter.tokenizer.decode([detail.healed_token])
    text = question.rstrip().removesuffix(adapter.tokenizer.decode([tail])) + spelt
    if tail_of(adapter, text) != detail.healed_token or text != text.rstrip():
        return None
    return detail, ask(adapter, text, {"max_new_tokens": 6}, options)


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [(pipeline, None) for pipeline in PIPELINES]
    + [(pipeline, {"prefill_chunk_size": 7}) for pipeline in (STATEFUL, *PIPELINES[-2:])],
)
def test_the_answer_is_that_of_the_healed_prompt_whatever_the_pipeline(adapters, pipeline, options):
    adapter = adapters(pipeline)
    questions = ("Qh", "Qa", "x", "I a", "who? a", "b a", "who? h", "Qo", "xe", "so a")
    pairs = [written_out(adapter, question, options) for question in questions]
    pairs = [pair for pair in pairs if pair is not None]
    assert len(pairs) >= 2
    for healed, told in pairs:
        assert healed.token_ids == told.token_ids


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [("llama", pipeline) for pipeline in PIPELINES]
    + [("gemma3", pipeline) for pipeline in (STATEFUL, PIPELINES[-2])],
)
def test_healing_leaves_no_trace_in_cache_and_states(adapters, family, pipeline):
    adapter = adapters(pipeline, family)
    request = asking(("what is it?", "a", "Qh"), context=f"{CONTEXT}so?")
    prefilled = adapter.prefill(request, None, pipeline)
    before = adapter.answer(prefilled, pipeline, {"max_new_tokens": 6}).responses
    ids = [prompt.ids for prompt in prefilled.prompts]
    healed = adapter.answer(prefilled, pipeline, HEAL).responses
    assert adapter.answer(prefilled, pipeline, {"max_new_tokens": 6}).responses == before
    assert adapter.answer(prefilled, pipeline, HEAL).responses == healed
    assert [prompt.ids for prompt in prefilled.prompts] == ids


REQUESTS = (
    Request(context=CONTEXT, questions=("Qh", "where a", "is the t"), chat=False),
    asking("a", context="a rat in a red tin?"),
    asking(("h", "is it so. \n", "x"), context=""),
    asking(("b? ", "a", "th"), context="an ant and a hen!\nthe rat is red!"),
)


@pytest.mark.parametrize(
    ("family", "pipeline", "bos"),
    [("llama", pipeline, True) for pipeline in PIPELINES]
    + [(family, STATEFUL, False) for family in FAMILIES],
)
def test_a_batch_heals_as_each_request_alone(adapters, family, pipeline, bos):
    adapter = adapters(pipeline, family, adds_bos=bos)
    alone = [adapter.process_request(request, HEAL) for request in REQUESTS]
    together = adapter.process_requests(REQUESTS, HEAL)
    for one, other in zip(together, alone, strict=True):
        assert one.responses == other.responses
        for detail, expected in zip(one.details, other.details, strict=True):
            assert detail.token_ids == expected.token_ids
            assert detail.healed_token == expected.healed_token
            assert detail.batch == 4
    healed = [detail.healed_token is not None for one in alone for detail in one.details]
    assert sum(healed) >= 3


class Passes:
    """Tokens of every forward pass of a model."""

    def __init__(self, model):
        self.tokens = []
        self.handle = model.register_forward_pre_hook(
            lambda _, args, named: self.tokens.append(named["input_ids"].shape[1]), with_kwargs=True
        )

    def __enter__(self):
        return self.tokens

    def __exit__(self, *exc):
        self.handle.remove()


def test_healing_costs_a_pass_over_the_question_and_no_second_prefill(adapters):
    adapter, context, new = adapters(), f"{CONTEXT}so?", {**HEAL, "max_new_tokens": 3}
    length = len(adapter.tokenizer(context).input_ids)
    with Passes(adapter.model) as passes:
        ask(adapter, "Qh", new, context=context)
    assert passes == [length, 1, 2, 1, 1]
    with Passes(adapter.model) as passes:
        ask(adapter, "a", new, context=context)
    assert passes == [length, 1, 1, 1, 1]
    request = asking(("Qh", "Qa"), context=context)
    with Passes(adapter.model) as passes:
        adapter.process_requests([request, request], {**HEAL, "max_new_tokens": 1})
    # rows whose prompts end alike are healed together
    assert passes == [length, 1, 1, 2, 2]


def test_observers_see_the_answer_and_the_times_count_the_healing(adapters, monkeypatch):
    adapter, calls = adapters(WINDOW), []
    chosen = HuggingFaceAdapter._chosen

    def slow(*args):
        calls.append(1)
        args[0].clock += 100
        return chosen(*args)

    monkeypatch.setattr(HuggingFaceAdapter, "_chosen", slow)
    monkeypatch.setattr(HuggingFaceAdapter, "_now", lambda self: self.clock)
    adapter.clock = 0.0
    watches = Density(), Density()
    healed = adapter.process_request(asking(HEALS), HEAL, observers=[watches[0]]).details[0]
    assert calls == [1]
    # what observers take is taken off, by another clock
    assert round(healed.seconds_first_token) == round(healed.seconds_decode) == 100
    written = f"{HEALS[:-1]}{adapter.tokenizer.decode([healed.healed_token])}"
    told = adapter.process_request(asking(written), {"max_new_tokens": 6}, observers=[watches[1]])
    assert round(told.details[0].seconds_decode) == 0
    assert told.details[0].token_ids == healed.token_ids
    assert watches[0].result() == watches[1].result()


# What else is asked for


def test_a_streamer_gets_the_healed_prompt_and_only_that(adapters, capsys):
    adapter = adapters()
    detail = ask(adapter, HEALS, {**HEAL, "streamer": TextStreamer(adapter.tokenizer)})
    assert capsys.readouterr().out == f"{CONTEXT}{HEALS}{detail.text}\n"
    assert detail.healed_token is not None


def test_outputs_hold_the_healed_prompt(adapters):
    adapter = adapters()
    detail = ask(adapter, HEALS, {**HEAL, "return_dict_in_generate": True, "output_scores": True})
    [output] = detail.outputs
    assert len(output.scores) == detail.new_tokens
    assert tuple(output.sequences[0].tolist()[-detail.new_tokens :]) == detail.token_ids
    assert int(output.sequences[0, -detail.new_tokens - 1]) == detail.healed_token


def test_a_function_of_the_caller_gets_the_healed_prompt(adapters):
    seen = []

    def loop(model, input_ids, **others):
        seen.append(input_ids[0].tolist())
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    adapter = adapters()
    detail = ask(adapter, HEALS, {**HEAL, "custom_generate": loop})
    assert [ids[-1] for ids in seen] == [detail.healed_token]


@pytest.mark.parametrize("says", [True, False])
def test_a_checkpoint_may_ask_for_it_and_the_caller_may_not_want_it(adapters, monkeypatch, says):
    adapter = adapters()
    expected = ask(adapter, HEALS, {"max_new_tokens": 6, "token_healing": says})
    config = GenerationConfig(**adapter.model.generation_config.to_dict())
    config.token_healing = True
    monkeypatch.setattr(adapter.model, "generation_config", config)
    options = {"max_new_tokens": 6, **({} if says else {"token_healing": False})}
    found = ask(adapter, HEALS, options)
    assert found.token_ids == expected.token_ids
    assert found.healed_token == expected.healed_token
    assert (found.healed_token is not None) == says


def test_a_length_of_the_whole_prompt_does_not_count_dropped_whitespace(adapters):
    adapter = adapters()
    tokens = len(adapter.tokenizer(f"{CONTEXT}{HEALS}").input_ids)
    options = {"token_healing": True, "max_length": tokens + 1}
    assert len(ask(adapter, f"{HEALS} \n \n", options).token_ids) == 1
    with pytest.raises(RequestError, match=f"'max_length' is {tokens}, which the prompt of"):
        ask(adapter, f"{HEALS} \n \n", {**options, "max_length": tokens})


def test_it_is_true_or_false():
    with pytest.raises(ParameterError, match="token_healing = 'yes' is not allowed: expected true"):
        HuggingFaceAdapter.check_generation({"token_healing": "yes"})


def test_details_are_plain_data(adapters):
    detail = attrs.asdict(ask(adapters(), HEALS))
    assert isinstance(detail["healed_token"], int)
