"""The request that examples become, and what is kept of an answer."""

import pytest

from sah_bench.benchmark_plans import BenchmarkPlan
from sah_bench.samples import request_of, sample_of, timing_of
from sah_core import Example, Protocol
from sah_core.requests import AnswerDetail, Likelihood

pytestmark = pytest.mark.unit

EXAMPLES = [
    Example(
        id=f"0-{number}",
        context_id="0",
        context="The door is red.",
        question=f"Question {number}?",
        answer_prefix=f" Cue {number}:",
        references=("red",),
        max_new_tokens=4,
        task="easy",
        facts={"number": number},
    )
    for number in (0, 1)
]


def request(fakes, monkeypatch, **protocol):
    monkeypatch.setattr(fakes.Quiz, "protocol", Protocol(**protocol))
    return request_of(BenchmarkPlan(benchmark=fakes.Quiz(), tasks=("easy",)), "easy", EXAMPLES)


def test_questions_about_a_context_are_one_request_with_exact_prompts(fakes, monkeypatch):
    made = request(fakes, monkeypatch, chat=False)
    assert made.context == "The door is red."
    assert made.questions == ("Question 0?", "Question 1?")
    assert made.separator == ""


@pytest.mark.parametrize(
    ("prefix", "questions", "prefixes"),
    [
        ("assistant", ("Question 0?", "Question 1?"), (" Cue 0:", " Cue 1:")),
        ("user", ("Question 0? Cue 0:", "Question 1? Cue 1:"), ("", "")),
    ],
)
def test_the_cue_stands_where_the_protocol_puts_it(fakes, monkeypatch, prefix, questions, prefixes):
    made = request(fakes, monkeypatch, chat=False, prefix=prefix)
    assert made.questions == questions
    assert made.answer_prefix == prefixes


@pytest.mark.parametrize("truncation", ["none", "middle", "head"])
def test_a_long_context_is_cut_as_the_protocol_says(fakes, monkeypatch, truncation):
    made = request(fakes, monkeypatch, chat=False, truncation=truncation)
    assert made.truncation == truncation


def test_a_template_is_used_where_the_protocol_asks_for_one_and_the_model_has_it(
    fakes, monkeypatch
):
    assert request(fakes, monkeypatch, chat=True).chat is None
    assert request(fakes, monkeypatch, chat=False).chat is False


def detail(**changes):
    given = {
        "text": "red",
        "token_ids": (1, 2),
        "prompt_tokens": 12,
        "context_tokens": 10,
        "new_tokens": 2,
        "seconds_prefill": 1.0,
        "seconds_decode": 2.0,
        "finished": "eos",
        "backends": ("triton", "gather"),
        "overflow_rows": 3,
    }
    return AnswerDetail(**{**given, **changes})


class Counts:
    """An observer that keeps single observations."""

    def result(self):
        return {"n": 2}

    def records(self):
        return [{"n": 1}, {"n": 1}]


def test_a_sample_keeps_what_scores_need_and_no_context():
    made = sample_of(EXAMPLES[1], detail(), {"accuracy": 100.0}, {"counts": Counts()}, {})
    assert made.id == "0-1"
    assert made.record["prediction"] == "red"
    assert made.record["references"] == ["red"]
    assert made.record["facts"] == {"number": 1}
    assert made.record["scores"] == {"accuracy": 100.0}
    assert not {"context", "turns", "losses"} & made.record.keys()
    assert made.micro == {
        "metrics": {"counts": {"n": 2}},
        "backends": ["gather", "triton"],
        "overflow_rows": 3,
    }
    assert made.observed == {"counts": [{"n": 1}, {"n": 1}]}


def test_a_sample_of_a_text_that_was_predicted_keeps_its_losses():
    likelihood = Likelihood(
        token_ids=(1, 2), losses=(0.5, 1.5), correct=(True, False), context_tokens=4, seconds=1.0
    )
    made = sample_of(EXAMPLES[0], detail(likelihood=likelihood), {}, {}, {})
    assert made.record["losses"] == [0.5, 1.5]


def test_seconds_are_those_of_a_pass_without_observers():
    kept, timed = detail(seconds_decode=99.0), detail(seconds_prefill=5.0)
    assert timing_of(kept, timed) == {
        "prefill": 5.0,
        "index": timed.seconds_index,
        "first_token": timed.seconds_first_token,
        "decode": 2.0,
        "same_tokens": True,
    }
    assert timing_of(kept, detail(token_ids=(1, 3)))["same_tokens"] is False
    assert "same_tokens" not in timing_of(kept, kept)


def test_without_such_a_pass_there_are_no_seconds_but_those_of_a_prefill_that_nobody_watched():
    timing = timing_of(detail(), None)
    assert timing == {"prefill": 1.0, "index": None, "first_token": None, "decode": None}
    assert timing_of(detail(), None, prefill_is_timed=False)["prefill"] is None
