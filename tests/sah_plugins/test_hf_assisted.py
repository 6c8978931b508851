"""Assisted decoding: the pipeline verifies proposals, and the answer is what it is without."""

import copy
from typing import ClassVar

import attrs
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sah_core import (
    Allowed,
    Capabilities,
    Mask,
    Masker,
    Pipeline,
    Request,
    hookimpl,
    registry,
)
from sah_core.attention import Session
from sah_core.errors import RequestError, UnsupportedError
from sah_core.testing import MODEL

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?")
LENGTH = 16
PIPELINES = (
    "dense",
    "sink(2) | local(4)",
    "local(0.1)",
    "oracle-top-k(0.2)",
    "sink(2) | quest(8, page_size=4)",
    "random-sampling(0.3)",
    "sink(2) | local(2) | magicpig(lsh_l=20, lsh_k=3) @ phases=[decode]",
    "oracle-top-k(6) @ prefill=sparse",
)


@pytest.fixture(scope="module")
def draft(models):
    """A model that agrees with llama half of the time: the same weights, somewhat disturbed."""
    model = models.build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def answers(adapter, options, questions=QUESTIONS):
    request = Request(context=CONTEXT, questions=questions)
    return adapter.process_request(request, {"max_new_tokens": LENGTH, **options}).details


def tokens(adapter, options=(), questions=QUESTIONS):
    return [detail.token_ids for detail in answers(adapter, dict(options), questions)]


class Propose(LogitsProcessor):
    """Forces a repeating text, so that looking up the prompt proposes much that is accepted."""

    def __init__(self, period):
        self.period = period

    def __call__(self, input_ids, scores):
        scores[:, input_ids[:, -self.period]] += 8.0
        return scores


class Passes:
    """Counts the passes of a model by their rows."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __enter__(self):
        embeddings = self.model.get_input_embeddings()
        self.hook = embeddings.register_forward_pre_hook(
            lambda module, arguments: self.rows.append(arguments[0].shape[1])
        )
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_looking_up_the_prompt_changes_no_token(make, pipeline, family):
    adapter = make(pipeline, family)
    processors = LogitsProcessorList([Propose(9)])
    expected = tokens(adapter, {"logits_processor": processors})
    options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    with Passes(adapter.model) as passes:
        found = tokens(adapter, {"logits_processor": processors, **options})
    assert found == expected
    assert max(passes.rows[2:]) > 1
    assert len(passes.rows) < 2 * LENGTH


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_assistant_changes_no_token_whether_it_guesses_well_or_badly(
    models, make, draft, pipeline
):
    adapter = make(pipeline)
    expected = tokens(adapter)
    for assistant in (draft, models.build("gemma3", seed=9)):
        assert tokens(adapter, {"assistant_model": assistant}) == expected


def test_an_assistant_saves_passes_and_some_of_its_proposals_are_rejected(make, draft):
    adapter = make("sink(2) | quest(12, page_size=4)")
    with Passes(adapter.model) as passes:
        made = answers(adapter, {"assistant_model": draft, "num_assistant_tokens": 5})
    [first] = [p for p in passes.rows if p > 20]
    assert first > 20
    steps = len(passes.rows) - 1
    proposed = sum(passes.rows[1:]) - steps
    accepted = sum(d.new_tokens for d in made) - steps
    assert 0 < accepted < proposed


@pytest.mark.parametrize("pipeline", ["dense", "sink(2) | quest(8, page_size=4)", "local(0.1)"])
def test_the_first_layers_of_the_model_propose_without_touching_the_pipelines_states(
    make, pipeline
):
    adapter = make(pipeline)
    assert tokens(adapter, {"assistant_early_exit": 1}) == tokens(adapter)


def test_the_model_may_assist_itself(make):
    adapter = make("sink(2) | quest(8, page_size=4)")
    assert tokens(adapter, {"assistant_model": adapter.model}) == tokens(adapter)


def test_sampling_with_an_assistant_draws_what_transformers_alone_draws(make, draft):
    adapter = make()
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 10}
    for question in QUESTIONS:
        [found] = tokens(adapter, {**options, "assistant_model": draft, "seed": 4}, [question])
        ids = torch.tensor([adapter.tokenizer(f"{CONTEXT}\n{question}").input_ids])
        torch.manual_seed(4)
        alone = adapter.model.generate(
            ids, assistant_model=draft, pad_token_id=0, eos_token_id=[2], **options
        )
        assert found == tuple(alone[0, ids.shape[1] :].tolist())


def test_an_assistant_with_another_vocabulary_needs_its_tokenizer(models, make):
    adapter = make("sink(2) | quest(8, page_size=4)")
    other = models.build("llama", seed=3, vocab_size=140)
    with pytest.raises(RequestError, match="another vocabulary; give its assistant_tokenizer"):
        tokens(adapter, {"assistant_model": other})
    both = {"assistant_model": other, "assistant_tokenizer": models.tokenizer()}
    assert tokens(adapter, both) == tokens(adapter)


def test_an_assistant_may_be_named(models, make, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    adapter = make("local(4)")
    assert tokens(adapter, {"assistant_model": str(tmp_path)}) == tokens(adapter)


def test_the_assistants_generation_config_is_left_as_it_was(make, draft):
    before = copy.deepcopy(draft.generation_config.to_dict())
    adapter = make()
    drafting = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic"}
    tokens(adapter, {"assistant_model": draft, **drafting})
    assert draft.generation_config.to_dict() == before


def test_the_number_of_proposals_is_what_was_asked_for(make, draft):
    adapter = make()
    with Passes(adapter.model) as passes:
        tokens(adapter, {"assistant_model": draft, "num_assistant_tokens": 2})
    assert max(passes.rows[1:]) <= 24
    assert all(rows <= 3 for rows in passes.rows[1:] if rows < 10)


def test_a_stop_inside_accepted_proposals_ends_the_answer_there(make):
    adapter = make()
    words = adapter.tokenizer("ab.ab.ab.ab.", add_special_tokens=False).input_ids

    class Repeat(LogitsProcessor):
        def __init__(self, start):
            self.start = start

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -1e4)
            forced[:, words[(input_ids.shape[1] - self.start) % len(words)]] = 0
            return forced

    request = Request(context="ab.ab.ab.ab.ab.", questions="ab.ab.?")
    start = len(adapter.prefill(request).prompts[0].ids)
    options = {
        "max_new_tokens": 9,
        "stop_strings": ["b.a"],
        "logits_processor": LogitsProcessorList([Repeat(start)]),
    }
    expected = adapter.process_request(request, options).details[0]
    found = adapter.process_request(request, {**options, "prompt_lookup_num_tokens": 6}).details[0]
    assert (found.text, found.finished) == (expected.text, expected.finished) == ("ab.a", "stop")


def test_requests_are_read_one_at_a_time(make):
    adapter = make("sink(2) | quest(8, page_size=4)")
    requests = [Request(context=CONTEXT, questions=q) for q in QUESTIONS]
    plain = adapter.process_requests(requests, {"max_new_tokens": LENGTH})
    options = {"max_new_tokens": LENGTH, "prompt_lookup_num_tokens": 3}
    found = adapter.process_requests(requests, options)
    assert [r.responses for r in found] == [r.responses for r in plain]
    prefilled = adapter.prefill_batch(requests)
    with pytest.raises(RequestError, match="takes one context at a time, not 2"):
        adapter.answer_batch(prefilled, generation_kwargs=options)


def test_models_that_cannot_take_tokens_back_are_refused_before_any_work(make):
    adapter = make("dense", "qwen3-next")
    with Passes(adapter.model) as passes:
        with pytest.raises(RequestError, match="Qwen3NextForCausalLM: its linear layers cannot"):
            tokens(adapter, {"prompt_lookup_num_tokens": 3})
        with pytest.raises(RequestError, match="Qwen3NextForCausalLM cannot be an assistant"):
            tokens(make(), {"assistant_model": adapter.model})
    assert passes.rows == []


def test_a_masker_whose_layers_hand_each_other_choices_is_refused(make):
    @attrs.frozen(kw_only=True)
    class HandsOn(Masker):
        name: ClassVar[str] = "hands-on"
        capabilities: ClassVar[Capabilities] = Capabilities(shares_layers=True)

        def add_mask(self, inputs, previous):
            return previous

    class Plugin:
        @hookimpl
        def sah_masker(self):
            return HandsOn

    registry.maskers.register("hands-on", Plugin())
    try:
        with pytest.raises(RequestError, match="assisted generation .* masker 'hands-on'"):
            tokens(make("hands-on() | local(4)"), {"prompt_lookup_num_tokens": 3})
    finally:
        registry.maskers.unregister("hands-on")


# The session's part, on plain tensors


def verified_and_one_by_one(pipeline, layer_type="full_attention", window=None):
    """Outputs of ten tokens that a session verifies in passes of which some rows are rejected, and
    those of a session that gets them one by one.
    """
    heads, kv_heads, dim = MODEL.heads, MODEL.kv_heads, MODEL.head_dim
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, heads, 60, dim, generator=generator)
    right = [torch.randn(1, kv_heads, 60, dim, generator=generator) for _ in range(2)]
    drafts = [tensor.clone() for tensor in right]

    def run(session, begin, end, keys=right):
        first = 0 if window is None else max(0, begin - window + 1)
        allowed = Allowed.causal(end - begin, end - first, window=window)
        held = [tensor[:, :, first:end] for tensor in keys]
        return session.attend(0, query[:, :, begin:end], *held, allowed, 0.3)

    def begun(verified=None):
        session = Session(pipeline, (layer_type,) * MODEL.layers)
        session.start_question(verified)
        run(session, 40, 44)
        return session

    plain = begun()
    expected = torch.cat([run(plain, i, i + 1) for i in range(44, 54)], dim=1)
    session, found = begun(verified=4), []
    # of five proposals the first two are right, of three none, and then all
    for begin, end, accepted in ((44, 50, 3), (47, 51, 1), (48, 54, 6)):
        for tensor, truth in zip(drafts, right, strict=True):
            tensor[:, :, begin : begin + accepted] = truth[:, :, begin : begin + accepted]
            tensor[:, :, begin + accepted : end] = 9.0
        found.append(run(session, begin, end, drafts)[:, :accepted])
    return torch.cat(found, dim=1), expected


@pytest.mark.parametrize("name", registry.maskers.names())
def test_rows_that_are_verified_attend_as_if_decoded_one_by_one(name, tmp_path):
    pipeline = Pipeline.of(registry.maskers[name].example(tmp_path))
    found, expected = verified_and_one_by_one(pipeline)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("text", ["local(0.3)", "oracle-top-k(0.4)", "sink(2) | local(3)"])
def test_in_a_sliding_layer_they_see_the_keys_of_their_own_window(text):
    pipeline = Pipeline.parse(f"{text} @ layer_types=[sliding_attention]")
    found, expected = verified_and_one_by_one(pipeline, "sliding_attention", window=12)
    torch.testing.assert_close(found, expected)


def test_there_a_masker_that_keeps_something_is_refused():
    pipeline = Pipeline.parse("quest(8, page_size=4) @ layer_types=[sliding_attention]")
    with pytest.raises(UnsupportedError, match=r"verifying proposed tokens in layer 0 \(sliding"):
        verified_and_one_by_one(pipeline, "sliding_attention", window=100)


def test_the_last_queries_of_rejected_tokens_are_forgotten_too():
    @attrs.frozen(kw_only=True)
    class LikeThose(Masker):
        """Selects the keys that the sum of the last queries, rejected ones left out, likes best."""

        name: ClassVar[str] = "like-those"
        capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"window_queries"}))

        def add_mask(self, inputs, previous):
            liked = inputs.window_queries.sum(2, keepdim=True)
            key = inputs.key.repeat_interleave(inputs.group, dim=1)
            scores = (liked @ key.transpose(2, 3)).expand(*inputs.shape)
            limits = {"start": inputs.allowed.start, "stop": inputs.allowed.stop}
            indices, _ = inputs.ops.masked_topk(scores, 6, **limits)
            return previous | Mask.from_indices(inputs.shape, indices)

    found, expected = verified_and_one_by_one(Pipeline.of(LikeThose()))
    torch.testing.assert_close(found, expected)
