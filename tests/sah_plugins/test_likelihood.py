"""Teacher-forced text: the adapter's losses against the model's own."""

import pytest
import torch

from sah_core import Request
from sah_core.errors import RequestError
from sah_core.models import ModelSource
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded
from sah_plugins.metrics.density import Density

pytestmark = pytest.mark.unit

CONTEXT = "the hen and the rat are on the hearth. an ant is in the red tin.\nno one is there. "
TEXTS = ("then the ant sees the hen and the hen sees it.", "in there it is.")


@pytest.fixture(scope="module")
def adapter(models):
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    loaded = Loaded(
        model=models.build("llama"), tokenizer=models.tokenizer(), source=source, weights_hash="0"
    )
    return HuggingFaceAdapter.of(loaded)


@pytest.fixture(scope="module")
def prefilled(adapter):
    return adapter.prefill(Request(context=CONTEXT, questions=TEXTS, separator="", chat=False))


@torch.no_grad()
def expected(adapter, ids, context_tokens):
    logits = adapter.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    rows = range(context_tokens, len(ids) - 1)
    return (
        [-float(logits[row, ids[row + 1]]) for row in rows],
        [int(logits[row].argmax()) == ids[row + 1] for row in rows],
    )


@pytest.mark.parametrize("step", [None, 1, 5])
@pytest.mark.parametrize("pipeline", ["dense", "local(100%)"])
def test_losses_are_those_of_the_model_over_the_joint_tokens(adapter, prefilled, pipeline, step):
    results = adapter.loglikelihood(prefilled, pipeline, step=step)
    assert len(results) == len(TEXTS)
    for prompt, result in zip(prefilled.prompts, results, strict=True):
        losses, correct = expected(adapter, prompt.ids, prompt.context_tokens)
        assert result.token_ids == prompt.ids[prompt.context_tokens + 1 :]
        assert result.losses == pytest.approx(losses, abs=1e-4)
        assert list(result.correct) == correct
        assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        assert result.context_tokens == prompt.context_tokens


def test_a_sparse_pipeline_changes_them_and_the_next_dense_call_does_not(adapter, prefilled):
    [before] = adapter.loglikelihood(prefilled, "dense", indices=[0])
    density = Density()
    [sparse] = adapter.loglikelihood(
        prefilled, "sink(1) | local(2)", indices=[0], observers=[density]
    )
    [after] = adapter.loglikelihood(prefilled, "dense", indices=[0])
    assert sparse.losses != before.losses
    assert after.losses == before.losses
    assert 0 < density.result()["density"] < 0.5
    assert sparse.backends


def test_step_by_step_is_decoding_and_at_once_is_a_question(adapter, prefilled):
    decoding = "sink(1) | local(2) @ phases=[decode]"
    [at_once] = adapter.loglikelihood(prefilled, decoding, indices=[0])
    [dense] = adapter.loglikelihood(prefilled, "dense", indices=[0])
    [stepwise] = adapter.loglikelihood(prefilled, decoding, indices=[0], step=1)
    assert at_once.losses == pytest.approx(dense.losses, abs=1e-5)
    assert stepwise.losses[0] == pytest.approx(dense.losses[0], abs=1e-5)
    assert stepwise.losses[1:] != pytest.approx(dense.losses[1:], abs=1e-5)


def test_a_text_of_one_token_has_nothing_to_predict(adapter):
    prefilled = adapter.prefill(Request(context=CONTEXT, questions="a", separator="", chat=False))
    with pytest.raises(RequestError, match="text 0 has 1 token; at least 2 are needed"):
        adapter.loglikelihood(prefilled)
