"""Beams of pipelines that keep states: those of a reference that keeps none from step to step."""

import copy
from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import Masker, Pipeline, Request, attach, param, registry
from sah_core.attention import Session, context_only, layer_info, with_step
from sah_core.errors import RequestError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("quiet")]

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
QUESTIONS = ("who is in the tin?", "where is the hen?")
REQUESTS = (
    Request(context=CONTEXT, questions=QUESTIONS),
    Request(context="an ant and a hen. the rat is red.", questions="is the rat red?"),
    Request(context=CONTEXT[:60], questions=QUESTIONS[:1]),
)
BEAMS = {
    "max_new_tokens": 6,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
}
FEW_TABLES = {"socket": {"lsh_l": 9, "lsh_k": 4}, "magicpig": {"lsh_l": 30, "lsh_k": 5}}
SOME = ("magicpig", "pq-cache", "quest", "twilight")
"""Each keeps something else of a sequence: a mean, centroids, pages from its first key, keys."""
STATEFUL = [name for name in registry.maskers.names() if registry.maskers[name].is_stateful()]


@attrs.frozen(kw_only=True)
class Rebuilt(Masker):
    """Another masker without a memory: what it keeps is built anew from the keys of every call."""

    name: ClassVar[str] = "rebuilt"
    inner: str = param(type=str, help="Text of the other masker.")
    context: int = param(type=int, help="Keys of the context.")

    def add_mask(self, inputs, previous):
        [masker] = Pipeline.parse(self.inner).steps
        random = inputs.random
        state = masker.init_state(attrs.evolve(layer_info(inputs), random=random))
        if state is not None:
            key, value = inputs.key, inputs.value
            masker.append(state, key[:, :, : self.context], value[:, :, : self.context], 0)
            end = context_only(inputs, self.context)
            masker.end_prefill(state, with_step(end, random.step, state, random.seed))
            rest = key[:, :, self.context :], value[:, :, self.context :]
            masker.append(state, *rest, self.context)
        return masker.add_mask(attrs.evolve(inputs, state=state), previous)


@pytest.fixture(scope="module")
def model(models):
    """As many layers and heads as the examples' artefacts are for."""
    return models.build("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def adapter(models, model):
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(model=model, tokenizer=models.tokenizer(), source=source, weights_hash="0")
    return HuggingFaceAdapter.of(loaded, "dense")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    def make(name):
        masker = registry.maskers[name].example(tmp_path_factory.mktemp(name))
        return attrs.evolve(masker, **FEW_TABLES.get(name, {}))

    return make


def pipelines(masker, context):
    """The masker as it is, and without a memory, at the same place of the same pipeline."""
    first = registry.maskers["oracle-top-k"](heavy_size=24 if masker.capabilities.prunes else 1)
    inner = Pipeline.of(masker).text
    return Pipeline.of(first, masker), Pipeline.of(first, Rebuilt(inner=inner, context=context))


def sequences(details):
    """Tokens and scores of every sequence of every question."""
    return [
        (one.token_ids, scores)
        for detail in details
        for one, scores in zip(
            (detail, *detail.others), detail.outputs[0].sequences_scores.tolist(), strict=True
        )
    ]


def count_moves(monkeypatch):
    """The reorderings of sessions in which places really change, as they happen."""
    moves = []
    reorder = Session.reorder
    monkeypatch.setattr(Session, "reorder", lambda s, r: moves.append(r.tolist()) or reorder(s, r))
    return moves


@pytest.mark.parametrize("name", STATEFUL)
def test_beams_with_a_state_are_those_without_a_memory(adapter, example, name, monkeypatch):
    moves = count_moves(monkeypatch)
    prefilled = adapter.prefill(REQUESTS[0])
    kept, rebuilt = pipelines(example(name), prefilled.width)
    found = sequences(adapter.answer(prefilled, kept, BEAMS).details)
    assert len(moves) >= 3
    assert found == sequences(adapter.answer(prefilled, rebuilt, BEAMS).details)
    assert found != sequences(adapter.answer(prefilled, "dense", BEAMS).details)


@pytest.mark.parametrize("name", SOME)
def test_beams_of_a_padded_batch_are_those_without_a_memory(adapter, example, name):
    prefilled = adapter.prefill_batch(REQUESTS)
    assert any(prefilled.padding)
    kept, rebuilt = pipelines(example(name), prefilled.width)
    together = adapter.answer_batch(prefilled, kept, BEAMS)
    expected = adapter.answer_batch(prefilled, rebuilt, BEAMS)
    assert [sequences(r.details) for r in together] == [sequences(r.details) for r in expected]
    for response, request in zip(together, REQUESTS, strict=True):
        alone = adapter.answer(adapter.prefill(request), kept, BEAMS)
        assert [d.token_ids for d in response.details] == [d.token_ids for d in alone.details]


@pytest.mark.parametrize(
    ("name", "tensor"), [("quest", "low"), ("double-sparsity", "labels"), ("pq-cache", "codes")]
)
def test_a_tensor_that_stays_behind_gives_other_beams(adapter, example, name, tensor, monkeypatch):
    prefilled = adapter.prefill(REQUESTS[0])
    kept, _ = pipelines(example(name), prefilled.width)
    expected = sequences(adapter.answer(prefilled, kept, BEAMS).details)
    state = type(adapter._state(prefilled, kept).session.layers[0].states[1])
    reorder = state.reorder

    def forgets(self, rows):
        before = copy.copy(getattr(self, tensor))
        reorder(self, rows)
        if len(getattr(before, "data", before)) == len(rows):
            setattr(self, tensor, before)

    monkeypatch.setattr(state, "reorder", forgets)
    assert sequences(adapter.answer(prefilled, kept, BEAMS).details) != expected


@pytest.mark.parametrize("name", SOME)
def test_beams_leave_the_states_of_the_context_alone(adapter, example, name):
    kept, _ = pipelines(example(name), 0)
    greedy = {"max_new_tokens": 8}
    prefilled = adapter.prefill(REQUESTS[0])
    before = adapter.answer(prefilled, kept, greedy).responses
    beams = adapter.answer(prefilled, kept, BEAMS)
    assert adapter.answer(prefilled, kept, greedy).responses == before
    assert adapter.answer(prefilled, kept, BEAMS).responses == beams.responses
    # a question alone, from a context that no other question was asked of
    for index, detail in enumerate(beams.details):
        alone = adapter.answer(adapter.prefill(REQUESTS[0]), kept, BEAMS, indices=[index])
        assert sequences(alone.details) == sequences([detail])


@pytest.mark.parametrize(
    "pipeline", ["sink(1) | quest(8, page_size=4)", "magicpig(lsh_l=20, lsh_k=4)"]
)
def test_beams_that_a_stop_string_ends_are_cut_there(adapter, pipeline):
    options = {"max_new_tokens": 7, "stop_strings": ["a", "e"], "num_beams": 3}
    options["num_return_sequences"] = 3
    prefilled = adapter.prefill_batch(REQUESTS)
    together = adapter.answer_batch(prefilled, pipeline, options)
    found = [one for r in together for d in r.details for one in (d, *d.others)]
    assert "stop" in {one.finished for one in found}
    for one in found:
        text = adapter.tokenizer.decode(one.token_ids[-1])
        assert (one.finished == "stop") == any(string in text for string in "ae")
    for response, request in zip(together, REQUESTS, strict=True):
        alone = adapter.answer(adapter.prefill(request), pipeline, options)
        assert [d.token_ids for d in response.details] == [d.token_ids for d in alone.details]


def test_contexts_that_end_differently_and_a_sparse_prefill_go_with_beams(adapter):
    request = Request(
        context="an ant and a hen.\nthe rat is red.",
        questions=("\nwho is there?", " then who?", "who is it?"),
        separator="",
    )
    for pipeline in ("quest(8, page_size=4)", "sink(1) | quest(8, page_size=4) @ prefill=sparse"):
        together = adapter.answer(adapter.prefill(request, pipeline=pipeline), pipeline, BEAMS)
        assert len({d.context_tokens for d in together.details}) > 1
        for index, detail in enumerate(together.details):
            prefilled = adapter.prefill(request, pipeline=pipeline)
            alone = adapter.answer(prefilled, pipeline, BEAMS, indices=[index])
            assert sequences(alone.details) == sequences([detail])


SAMPLERS = (
    "magicpig(lsh_k=4, lsh_l=20)",
    "sink(2) | local(4) | adaptive-sampling(0.1)",
    "sink(2) | random-sampling(0.2)",
    "random-at-budget('quest(8, page_size=4)')",
)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("pipeline", SAMPLERS)
def test_beams_of_samplers_come_out_the_same_with_a_seed(adapter, pipeline, do_sample):
    options = {**BEAMS, "do_sample": do_sample, "seed": 5}
    options["temperature"] = 2.0 if do_sample else None
    answers = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        answers.append(
            sequences(adapter.answer(adapter.prefill(REQUESTS[0]), pipeline, options).details)
        )
    assert answers[0] == answers[1]
    other = adapter.answer(adapter.prefill(REQUESTS[0]), f"{pipeline} @ seed=7", options)
    assert sequences(other.details) != answers[0]


@pytest.mark.parametrize("name", STATEFUL)
def test_beams_under_attach_are_those_without_a_memory(models, model, example, name, monkeypatch):
    moves = count_moves(monkeypatch)
    ids = models.tokens(2, 40)
    options = {
        "max_new_tokens": 8,
        "num_beams": 4,
        "do_sample": False,
        "eos_token_id": [1000],
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    made = []
    with torch.no_grad():
        for pipeline in pipelines(example(name), 40):
            with attach(model, pipeline):
                output = model.generate(ids, **options)
            made.append((output.sequences.tolist(), output.sequences_scores.tolist()))
        dense = model.generate(ids, **options)
    assert made[0] == made[1]
    assert made[0][0] != dense.sequences.tolist()
    assert len(moves) >= 3


@pytest.mark.integration
@pytest.mark.usefixtures("real_model")
def test_beams_of_smollm2_are_those_without_a_memory():
    adapter = HuggingFaceAdapter("smollm2-135m", device="cpu", dtype="float32")
    context = "Ann has a red ball, a blue box and a green key. Ben has a red box and a blue key. "
    request = Request(context=context * 3, questions=("Who has a ball?",))
    prefilled = adapter.prefill(request)
    window = Pipeline.parse("sink(4) | local(8)")
    quest = Pipeline.parse("quest(heavy_size=24, page_size=8)")
    kept, rebuilt = window | quest, window | Rebuilt(inner=quest.text, context=prefilled.width)
    found = sequences(adapter.answer(prefilled, kept, BEAMS).details)
    assert found == sequences(adapter.answer(prefilled, rebuilt, BEAMS).details)
    assert found != sequences(adapter.answer(prefilled, "dense", BEAMS).details)


def test_a_state_that_cannot_follow_is_refused_before_a_context_is_read(adapter, monkeypatch):
    from sah_plugins.maskers.quest import PageBounds

    monkeypatch.delattr(PageBounds, "reorder")
    monkeypatch.setattr(adapter, "prefill", lambda *_, **__: pytest.fail("it reads the context"))
    monkeypatch.setattr(adapter, "pipeline", Pipeline.parse("sink(2) | quest(8, page_size=4)"))
    with pytest.raises(
        RequestError,
        match=r"'num_beams' is not supported with masker 'quest': its state \(PageBounds\) has no "
        r"method reorder\(rows\) to follow by; use num_beams=1",
    ):
        adapter.process_request(REQUESTS[0], {"num_beams": 2})


def test_choices_that_layers_share_are_refused_with_beams(adapter):
    from sah_core import Capabilities

    @attrs.frozen(kw_only=True)
    class Sharing(Masker):
        name: ClassVar[str] = "sharing"
        capabilities: ClassVar[Capabilities] = Capabilities(shares_layers=True)

        def add_mask(self, inputs, previous):
            return previous

    prefilled = adapter.prefill(REQUESTS[0])
    with pytest.raises(RequestError, match="'sharing': what its layers hand each other in request"):
        adapter.answer(prefilled, Pipeline.of(Sharing()), BEAMS)
