"""Next-token loss on prose: the texts, and what is made of their likelihood."""

import math

import pytest

from sah_core import registry
from sah_core.benchmark import ScoredExample
from sah_core.errors import ParameterError
from sah_core.requests import Likelihood

pytestmark = pytest.mark.unit


class Words:
    """A tokenizer whose tokens are words, with a BOS that the adapter puts first."""

    bos_token_id = 1

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": text.split()}


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(f"word{i}" for i in range(500)), encoding="utf-8")
    return str(path)


def make(prose, **parameters):
    return registry.benchmarks["perplexity"](**{"essay_path": prose, "lengths": [64], **parameters})


def test_context_and_text_join_to_the_length_and_split_at_the_share(prose):
    benchmark = make(prose, samples=3, context_share=0.25)
    for example in benchmark.examples("64", Words(), seed=0):
        assert len((example.context + example.question).split()) == 64 - 1  # a place for the BOS
        assert len(example.context.split()) == 16 - 1
        assert example.question.startswith(" word")
        assert example.predicted == "question"
        first = example.context.split()[0]
        assert first == f"word{example.facts['word']}"


def test_equal_seeds_give_equal_texts_and_samples_start_in_different_places(prose):
    twice = [list(make(prose).examples("64", Words(), seed=3)) for _ in range(2)]
    assert twice[0] == twice[1]
    assert len({e.facts["word"] for e in twice[0]}) == len(twice[0]) == 4
    other = list(make(prose).examples("64", Words(), seed=4))
    assert [e.context for e in other] != [e.context for e in twice[0]]


def test_a_text_that_is_too_short_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words")
    with pytest.raises(ParameterError, match="a text of at least 64 words for 64 tokens; it has 4"):
        list(make(str(path)).examples("64", Words(), seed=0))


def test_an_unknown_task_names_those_that_exist(prose):
    with pytest.raises(ParameterError, match="one of 64"):
        list(make(prose).examples("65", Words(), seed=0))


def test_scores_are_the_mean_loss_and_the_share_of_tokens_held_most_likely(prose):
    benchmark = make(prose)
    example = next(benchmark.examples("64", Words(), seed=0))
    likelihood = Likelihood(
        token_ids=(5, 6, 7, 8),
        losses=(0.5, 1.0, 1.5, 3.0),
        correct=(True, False, True, False),
        context_tokens=3,
        seconds=0.1,
    )
    scores = benchmark.score_text(example, likelihood)
    assert scores == {"accuracy": 50.0, "loss": 1.5, "tokens": 4.0}
    assert set(scores) - {"accuracy"} == set(benchmark.units)


def test_perplexity_weighs_every_token_alike(prose):
    samples = [
        ScoredExample(id="a", task="64", scores={"accuracy": 0.0, "loss": 1.0, "tokens": 10.0}),
        ScoredExample(id="b", task="64", scores={"accuracy": 100.0, "loss": 4.0, "tokens": 30.0}),
    ]
    metrics = make(prose).aggregate(samples)
    assert metrics["perplexity"] == pytest.approx(math.exp((10 * 1.0 + 30 * 4.0) / 40))
    assert make(prose).aggregate([])["perplexity"] is None


def test_the_revision_follows_the_text(prose, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("other words " * 200)
    assert make(prose).revision() == make(prose, samples=9).revision()
    assert make(prose).revision() != make(str(other)).revision()
