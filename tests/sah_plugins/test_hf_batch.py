"""Batches of requests give the answers of each request alone."""

import itertools
from typing import ClassVar

import attrs
import pytest
import torch
import transformers

from sah_core import KeyRange, Mask, Masker, Pipeline, Request, hookimpl
from sah_core.errors import ContextTooLongError, ParameterError, RequestError, UnsupportedError
from sah_core.models import ModelSource
from sah_core.state import GrowingBuffer
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.adapters.hf.prefilled import Row, shared_context
from sah_plugins.adapters.hf.prompts import Prompt
from sah_plugins.adapters.hf.rounds import rounds
from sah_plugins.metrics.density import Density

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

FAMILIES = ("llama", "gemma3", "gpt-oss", "qwen3-next", "deepseek-v3")
PIPELINES = (
    "dense",
    "sink(4) | local(4)",
    "sink(0.1) | local(0.1) | oracle-top-k(0.2)",
    "sink(2) | quest(8, page_size=4)",
    "sink(2) | quest(0.3, page_size=4) @ prefill=sparse",
    "sink(1) | local(0.3) @ prefill=sparse, decode=dense",
)
NEW = {"max_new_tokens": 4}
REQUESTS = (
    Request(
        context="the hen and the rat are on the hearth. an ant is in the red tin.\nno one is here.",
        questions=("who is in the tin?", "where is the hen?", "is the rat on it?"),
    ),
    Request(context="a rat in a red tin. ", questions="where is the rat?"),
    Request(context="x", questions=("who is it?", "who is in the tin?")),
    Request(context="an ant and a hen.\nthe rat is red.", questions=("b?", "\nwho is there?")),
)


def token_ids(responses):
    return [[detail.token_ids for detail in response.details] for response in responses]


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [("llama", pipeline) for pipeline in PIPELINES]
    + [(family, PIPELINES[3]) for family in FAMILIES[1:]]
    + [("gemma3", PIPELINES[5]), ("gpt-oss", PIPELINES[2])],
)
def test_a_batch_gives_the_answers_of_each_request_alone(models, make, family, pipeline):
    adapter = make(pipeline, family, chat=models.PLAIN_CHAT if family == "llama" else None)
    alone = [adapter.process_request(request, NEW) for request in REQUESTS]
    together = adapter.process_requests(REQUESTS, NEW)
    assert token_ids(together) == token_ids(alone)
    assert [r.responses for r in together] == [r.responses for r in alone]
    assert {d.batch for r in together for d in r.details} == {4}


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([((1, 2, 3, 4), 3)], 3),
        ([((1, 2, 3, 4), 3), ((1, 2, 3, 5, 6), 3)], 3),
        ([((1, 2, 3, 4), 3), ((1, 2, 7, 4), 2)], 2),
        ([((1, 2, 3, 4), 3), ((1, 9, 3, 4), 3)], 1),
        ([((1, 2, 3, 4), 3), ((1, 2, 8, 4), 3), ((5, 2, 3, 4), 3)], 0),
    ],
)
def test_what_prompts_share_ends_where_one_differs_or_its_context_ends(prompts, shared):
    assert shared_context([Prompt(*prompt) for prompt in prompts]) == shared


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("answer", "answer_batch answers them all"),
        ("loglikelihood", "prefill them alone"),
    ],
)
def test_what_takes_one_context_refuses_a_batch(make, method, instead):
    adapter = make("sink(4) | local(4)")
    prefilled = adapter.prefill_batch(REQUESTS[:2])
    message = f"{method} takes one context, and 2 were prefilled together; {instead}"
    with pytest.raises(RequestError, match=message):
        getattr(adapter, method)(prefilled)


@pytest.mark.parametrize("index", [1, -1, "0"])
def test_a_question_that_is_not_there_is_named(make, index):
    adapter = make()
    prefilled = adapter.prefill(REQUESTS[1])
    message = f"there is no question {index!r}: the request has 1, counted from 0"
    for ask in (
        lambda: adapter.answer(prefilled, indices=[index]),
        lambda: adapter.loglikelihood(prefilled, indices=[index]),
        lambda: adapter.capture_decode(prefilled, index=index),
    ):
        with pytest.raises(RequestError, match=message):
            ask()


@pytest.mark.parametrize("pipeline", ["dense", "sink(2) | local(3) | quest(8, page_size=4)"])
def test_contexts_of_equal_length_are_decoded_together_in_a_captured_loop(make, pipeline):
    adapter = make(pipeline)
    contexts = ("the hen and the rat", "the rat and the hen")
    requests = [Request(context=context, questions="who is red?") for context in contexts]
    options = {"max_new_tokens": 6, "eos_token_id": [10**6]}
    alone = [adapter.process_request(r, options).details[0].token_ids for r in requests]
    loop = adapter.capture_decode(adapter.prefill_batch(requests), pipeline, room=6)
    first = loop.token[:, 0].tolist()
    rest = loop.generate(5)
    assert [(a, *b) for a, b in zip(first, rest, strict=True)] == alone


def test_contexts_of_other_lengths_are_not_decoded_in_a_captured_loop(make):
    adapter = make()
    prefilled = adapter.prefill_batch(REQUESTS[:2])
    with pytest.raises(RequestError, match="captured decoding takes contexts and questions of equ"):
        adapter.capture_decode(prefilled)


def test_indices_are_for_every_request_of_a_batch(make):
    adapter = make()
    prefilled = adapter.prefill_batch(REQUESTS[:2])
    with pytest.raises(RequestError, match="indices for 1 requests; 2 were prefilled"):
        adapter.answer_batch(prefilled, indices=[[0]])


@attrs.frozen(kw_only=True)
class Remember(Masker):
    """Keeps all keys and selects the first and the last few, if what it keeps is right."""

    name: ClassVar[str] = "remember"

    def init_state(self, layer):
        state = GrowingBuffer(capacity=layer.capacity)
        state.padding = [0] if layer.first is None else layer.first.tolist()
        return state

    def append(self, state, key, value, start):
        assert state.length == start
        state.append(key)

    def add_mask(self, inputs, previous):
        first = inputs.allowed.first_host
        assert torch.equal(inputs.state.view, inputs.key)
        assert list(first) == inputs.state.padding
        last = inputs.query_position.unsqueeze(0) + 1
        start = inputs.allowed.first.view(-1, 1, 1)
        ranges = [KeyRange(start, start + 3, 3), KeyRange(last - 5, last, 5)]
        return previous | Mask.from_ranges(inputs.shape, ranges)


REMEMBER = Pipeline.of(Remember(), prefill="sparse")


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("llama", PIPELINES[3]),
        ("llama", REMEMBER),
        ("gemma3", "sink(2) | local(2) | oracle-top-k(5) @ prefill=sparse"),
        ("qwen3-next", REMEMBER),
    ],
)
def test_a_batch_may_be_read_in_chunks(make, family, pipeline, chunk):
    # sizes in tokens: a fraction of the keys that are there is less in an early chunk
    adapter = make(pipeline, family)
    whole = adapter.process_requests(REQUESTS, NEW)
    parts = adapter.process_requests(REQUESTS, NEW, {"prefill_chunk_size": chunk})
    assert token_ids(parts) == token_ids(whole)


@pytest.mark.parametrize("chunk", [3, 16])
@pytest.mark.parametrize(
    "pipeline",
    ["sink(1) | oracle-top-k(10%) @ prefill=sparse", "quest(8, page_size=4) @ prefill=sparse"],
)
def test_a_sparse_prefill_in_chunks_is_that_of_each_request_alone(make, pipeline, chunk):
    # a fraction counts the keys that have come, and a page is judged by them
    adapter, options = make(pipeline), (NEW, {"prefill_chunk_size": chunk})
    alone = [adapter.process_request(request, *options) for request in REQUESTS]
    assert token_ids(adapter.process_requests(REQUESTS, *options)) == token_ids(alone)
    with pytest.raises(RequestError, match="in chunks reads contexts of equal length together"):
        adapter.prefill_batch(REQUESTS, options[1], pipeline)
    adapter.prefill_batch([REQUESTS[1]] * 2, options[1], pipeline)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_size_of_the_batches_does_not_matter(make, batch_size):
    adapter = make(PIPELINES[3])
    whole = adapter.process_requests(REQUESTS, NEW)
    parts = adapter.process_requests(REQUESTS, NEW, batch_size=batch_size)
    assert token_ids(parts) == token_ids(whole)


def test_the_order_of_the_requests_does_not_matter(make):
    adapter = make(PIPELINES[3])
    whole = token_ids(adapter.process_requests(REQUESTS, NEW))
    for order in itertools.islice(itertools.permutations(range(4)), 7, 24, 9):
        mixed = adapter.process_requests([REQUESTS[i] for i in order], NEW)
        assert token_ids(mixed) == [whole[i] for i in order]


@pytest.mark.parametrize("pipeline", PIPELINES[1:4])
def test_questions_whose_contexts_end_differently_are_answered_as_alone(make, pipeline):
    # without a separator, ". " or "\n\n" reach from the context into some questions only
    requests = [
        Request(
            context=context,
            questions=("\nwho is there?", " then who?", "who is it?"),
            separator="",
        )
        for context in ("an ant and a hen.\nthe rat is red.", "the rat.", "a hen is in it. no.")
    ]
    adapter = make(pipeline)
    alone = [adapter.process_request(request, NEW) for request in requests]
    assert len({d.context_tokens for d in alone[0].details}) > 1
    assert token_ids(adapter.process_requests(requests, NEW)) == token_ids(alone)


@pytest.mark.parametrize("pipeline", [PIPELINES[1], PIPELINES[3]])
def test_rows_that_end_early_are_cut_there(make, pipeline):
    adapter = make(pipeline)
    options = {"max_new_tokens": 20, "eos_token_id": list(range(20, 50)), "stop_strings": ["e"]}
    alone = [adapter.process_request(request, options) for request in REQUESTS]
    together = adapter.process_requests(REQUESTS, options)
    assert token_ids(together) == token_ids(alone)
    ends = [[d.finished for d in r.details] for r in together]
    assert ends == [[d.finished for d in r.details] for r in alone]
    assert len({len(ids) for answers in token_ids(together) for ids in answers}) > 2


@pytest.mark.parametrize("pipeline", [PIPELINES[0], PIPELINES[1]])
def test_beams_of_a_batch_are_those_of_each_request_alone(make, pipeline):
    adapter, options = make(pipeline), {**NEW, "num_beams": 3, "num_return_sequences": 2}
    alone = [adapter.process_request(request, options) for request in REQUESTS]
    together = adapter.process_requests(REQUESTS, options)
    assert token_ids(together) == token_ids(alone)
    assert together[0].details[1].texts == alone[0].details[1].texts


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "repeats",
    [
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 0.2},
        {"encoder_no_repeat_ngram_size": 1},
    ],
)
def test_padding_is_no_token_that_has_occurred(make, repeats, beams):
    adapter = make("sink(2) | local(6)")
    # tokens that a short context is followed by, which is padded most
    liked = adapter.process_request(REQUESTS[2], NEW).details[0].token_ids
    requests = REQUESTS[1:3]
    for padding in set(liked) - {2}:
        options = {**NEW, **repeats, "num_beams": beams, "pad_token_id": padding}
        alone = token_ids([adapter.process_request(request, options) for request in requests])
        assert token_ids(adapter.process_requests(requests, options)) == alone


def test_processors_of_the_caller_get_whole_rows(make):
    adapter, seen = make(), []

    def look(input_ids, scores):
        seen.append(tuple(input_ids.shape))
        return scores

    options = {**NEW, "logits_processor": [look], "no_repeat_ngram_size": 2}
    adapter.process_requests(REQUESTS[:2], options)
    assert {rows for rows, _ in seen} == {2}
    assert "_get_logits_processor" not in vars(adapter.model)


@pytest.mark.parametrize("sequences", [1, 3])
def test_beams_that_a_stop_string_ends_are_cut_there(make, sequences):
    # beams that end early are padded, with an EOS if the padding token is 0
    adapter = make(PIPELINES[1], "gemma3")
    options = {"max_new_tokens": 7, "stop_strings": ["a", "e"], "num_beams": 3}
    options["num_return_sequences"] = sequences
    alone = [adapter.process_request(request, options) for request in REQUESTS]
    together = adapter.process_requests(REQUESTS, options)
    assert token_ids(together) == token_ids(alone)
    found = [one for r in together for d in r.details for one in (d, *d.others)]
    assert {"stop"} < {one.finished for one in found}
    for one in found:
        assert (one.finished == "eos") == (one.token_ids[-1] == adapter.tokenizer.eos_token_id)
        text = adapter.tokenizer.decode(one.token_ids[-1])
        assert (one.finished == "stop") == any(string in text for string in "ae")


def test_a_batch_samples_reproducibly_from_a_seed(make):
    adapter = make(PIPELINES[1])
    options = {**NEW, "do_sample": True, "temperature": 3.0, "num_return_sequences": 2, "seed": 4}
    one = adapter.process_requests(REQUESTS, options)
    assert token_ids(adapter.process_requests(REQUESTS, options)) == token_ids(one)
    assert all(len(d.others) == 1 for r in one for d in r.details)


def test_a_prefilled_batch_serves_several_pipelines_and_some_questions(make):
    adapter = make()
    prefilled = adapter.prefill_batch(REQUESTS)
    for pipeline in (PIPELINES[0], PIPELINES[3], PIPELINES[1], PIPELINES[3]):
        own = make(pipeline).process_requests(REQUESTS, NEW)
        assert token_ids(adapter.answer_batch(prefilled, pipeline, NEW)) == token_ids(own)
    some = adapter.answer_batch(prefilled, PIPELINES[3], NEW, indices=[[2, 0], [], [1], [0]])
    whole = token_ids(adapter.answer_batch(prefilled, PIPELINES[3], NEW))
    assert token_ids(some) == [[whole[0][2], whole[0][0]], [], [whole[2][1]], [whole[3][0]]]


def test_requests_without_context_stand_beside_others(make):
    requests = [*REQUESTS[:2], Request(context="", questions=("who is it?", "b?"))]
    for pipeline in PIPELINES[:4]:
        adapter = make(pipeline)
        alone = [adapter.process_request(request, NEW) for request in requests]
        assert token_ids(adapter.process_requests(requests, NEW)) == token_ids(alone)


# What runs together


def row(*lengths, shared=5):
    return Row(None, [Prompt(tuple(range(c + q)), c) for c, q in lengths], shared)


def test_as_many_rows_as_possible_run_together():
    rows = [row((5, 3), (5, 4)), row((5, 4)), row((5, 4), (6, 3))]
    made = list(rounds(rows, [[0, 1], [0], [0, 1]]))
    assert [r.asked for r in made] == [(1, 0, 0), (0, None, None), (None, None, 1)]
    assert [(r.extra, r.question) for r in made] == [(0, 4), (0, 3), (1, 3)]
    assert [r.idle for r in made] == [(), (1, 2), (0, 1)]


def test_the_questions_of_one_context_keep_their_order():
    made = list(rounds([row((5, 3), (5, 4), (5, 3))], [[2, 1, 0]]))
    assert [r.asked for r in made] == [(2,), (1,), (0,)]


def test_one_prefill_reads_all_contexts_and_equal_questions_run_together(make):
    adapter = make(PIPELINES[1])
    passes = []
    handle = adapter.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    requests = [
        Request(context=context, questions=("who?", "why?")) for context in ("ab", "abcdefg", "x")
    ]
    try:
        adapter.process_requests(requests, {"max_new_tokens": 2, "eos_token_id": 1})
    finally:
        handle.remove()
    assert all(rows == 3 for rows, _ in passes if rows > 1)
    question = next(length for _, length in passes if 1 < length < 8)
    contexts = [shape for shape in passes if shape == (3, 8)]
    assert len(contexts) == 1
    assert len([shape for shape in passes if shape[0] == 3]) == 1 + 2 * 2
    assert question


# Facts and errors


class Order:
    def __init__(self):
        self.events = []

    @hookimpl
    def sah_request_begin(self, request):
        self.events.append(("begin", request.context))

    @hookimpl
    def sah_prefill_end(self, context_tokens):
        self.events.append(("prefill", context_tokens))

    @hookimpl
    def sah_request_end(self, request, response):
        self.events.append(("end", request.context, len(response.details)))


def test_observers_are_told_of_every_request(make):
    seen = Order()
    responses = make(PIPELINES[1]).process_requests(REQUESTS, NEW, observers=[seen])
    expected = []
    for request, response in zip(REQUESTS, responses, strict=True):
        tokens = max(detail.context_tokens for detail in response.details)
        expected += [("begin", request.context), ("prefill", tokens)]
    for request, response in zip(REQUESTS, responses, strict=True):
        expected.append(("end", request.context, len(response.details)))
    assert seen.events == expected


def test_a_batch_of_equal_requests_has_the_density_of_one(make):
    one, many = Density(), Density()
    adapter = make(PIPELINES[1])
    adapter.process_request(REQUESTS[0], {**NEW, "eos_token_id": 1}, observers=[one])
    adapter.process_requests([REQUESTS[0]] * 3, {**NEW, "eos_token_id": 1}, observers=[many])
    assert many.result()["density"] == one.result()["density"]
    assert many.result()["allowed"] == 3 * one.result()["allowed"]


def test_padding_is_no_key_and_no_query(make):
    adapter, density = make("local(3) @ prefill=sparse"), Density()
    requests = [REQUESTS[0], REQUESTS[2]]
    options = {"max_new_tokens": 1}
    details = [
        d
        for r in adapter.process_requests(
            [Request(context=r.context, questions="who?") for r in requests],
            options,
            observers=[density],
        )
        for d in r.details
    ]
    rows = [row for d in details for row in range(d.prompt_tokens)]
    assert density.result()["allowed"] == sum(8 * (row + 1) for row in rows)
    assert density.result()["selected"] == sum(8 * min(3, row + 1) for row in rows)


def test_a_request_of_a_batch_that_does_not_fit_is_an_error(make):
    adapter = make()
    with pytest.raises(ContextTooLongError):
        adapter.process_requests([REQUESTS[0], Request(context="0" * 600, questions="a?")], NEW)


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_batch_size_that_is_no_count_is_an_error(make, value):
    with pytest.raises(ParameterError, match="batch_size"):
        make().process_requests(REQUESTS, NEW, batch_size=value)


def test_no_requests_give_no_responses(make):
    assert make().process_requests([], NEW) == []
    with pytest.raises(RequestError, match="no request"):
        make().prefill_batch([])


def test_padding_that_a_model_does_not_understand_is_refused_before_anything_is_read(models):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=16,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        init_std=0.3,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    adapter = HuggingFaceAdapter.of(loaded, "local(4)")
    with pytest.raises(UnsupportedError, match="left-padded batch with model class BartForCausal"):
        adapter.process_requests(REQUESTS[:2], NEW)
    assert [len(adapter.process_request(r, NEW).details) for r in REQUESTS[:2]] == [3, 1]
