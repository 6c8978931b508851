"""Observers on whole models: what they see, and that none of them costs nothing."""

from types import SimpleNamespace

import pytest

from sah_core import Pipeline, Request
from sah_core.attention import Session
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.metrics.density import Density
from sah_plugins.metrics.mass import Mass
from sah_plugins.metrics.output_error import OutputError
from sah_plugins.metrics.recall import Recall

pytestmark = pytest.mark.unit

REQUEST = Request(
    context="the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. ",
    questions=["who is in the tin?", "where is the hen?"],
)
NEW = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture
def make(models, caplog):
    caplog.set_level("ERROR", logger="transformers")

    def make(family="llama"):
        source = ModelSource(kind="folder", location="tiny", label="tiny")
        model, tokenizer = models.build(family), models.tokenizer()
        loaded = Loaded(model=model, tokenizer=tokenizer, source=source, weights_hash="0")
        return HuggingFaceAdapter.of(loaded)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_a_window_over_everything_has_no_error_on_any_kind_of_attention(make, family):
    adapter, metrics = make(family), [OutputError(), Mass(), Recall()]
    pipeline = "local(1000) @ layer_types=[full_attention, sliding_attention]"
    if family == "llama":
        pipeline = "local(1000)"
    adapter.answer(adapter.prefill(REQUEST), pipeline, NEW, observers=metrics)
    error, mass, recall = (metric.result() for metric in metrics)
    assert 0 < error["max"] < 1e-5
    assert mass["min"] == pytest.approx(1, abs=1e-5)
    assert recall["min"] == 1
    assert set(error["layers"]) == {"0", "1"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_what_is_left_out_shows_in_every_metric(make, family):
    adapter, metrics = make(family), [OutputError(), Mass(), Recall()]
    adapter.answer(adapter.prefill(REQUEST), "sink(1) | local(2)", NEW, observers=metrics)
    error, mass, recall = (metric.result() for metric in metrics)
    assert error["mean"] > 0.01
    assert mass["mean"] < 0.99
    assert recall["mean"] < 0.99


def test_a_sparse_prefill_is_observed_step_by_step(make):
    adapter, metric, density = make(), OutputError(every=16), Density()
    pipeline = "sink(1) | local(2) @ prefill=sparse"
    observers = [metric, density]
    options = {"prefill_chunk_size": 30}
    prefilled = adapter.prefill(REQUEST, options, pipeline=pipeline, observers=observers)
    before = density.result()["allowed"]
    assert before == 2 * 4 * sum(range(1, prefilled.shared + 1))
    adapter.answer(prefilled, pipeline, NEW, observers=observers, indices=[0])
    assert density.result()["allowed"] > before
    records = [r for r in metric.records() if r["layer"] == 0]
    assert [r["phase"] for r in records][:2] == ["prefill", "prefill"]
    chunks = [r["rows"] for r in records if r["phase"] == "prefill"]
    assert sum(chunks) == len(range(0, prefilled.shared, 16))


def test_observers_do_not_change_the_answer(make):
    adapter = make()
    prefilled = adapter.prefill(REQUEST)
    for pipeline in ("dense", "sink(1) | local(2)"):
        plain = adapter.answer(prefilled, pipeline, NEW)
        watched = adapter.answer(prefilled, pipeline, NEW, observers=[OutputError(), Density()])
        assert [d.token_ids for d in plain.details] == [d.token_ids for d in watched.details]


def test_without_observers_no_hook_is_made_or_called(make, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was paid")

    sessions = []
    init = Session.__init__

    def remember(self, *arguments, **options):
        init(self, *arguments, **options)
        sessions.append(self)

    adapter = make()
    monkeypatch.setattr(Session, "__init__", remember)
    # pytest lives on pluggy too, so only the core's own use of it is refused
    monkeypatch.setattr("sah_core.attention.session.pluggy", SimpleNamespace(PluginManager=refuse))
    with pytest.raises(AssertionError, match="something was paid"):
        Session(Pipeline.dense(), (), observers=[Density()])
    sessions.clear()
    adapter.answer(adapter.prefill(REQUEST), "sink(1) | local(2)", NEW)
    assert sessions
    assert all(session.hook is None for session in sessions)
    assert all(session.observer_seconds == 0 for session in sessions)
