"""LongBench v2 on invented rows in the official columns."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import ScoredExample
from sah_plugins.benchmarks.longbench_v2 import LongBenchV2, invented_rows

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path):
    return LongBenchV2.example(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_prompt_is_the_official_one(tmp_path, suffix):
    rows = invented_rows()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(lines)
    first, *_ = LongBenchV2(data_dir=str(tmp_path)).examples("0shot", None, 0)
    assert first.context + first.question == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        + ("An invented text, number 0. \n" * 5).strip()
        + "\n</text>\n\nWhat is the correct answer to this question: Which of the four is number 0?"
        "\nChoices:\n(A) Choice A of 0\n(B) Choice B of 0\n(C) Choice C of 0\n(D) Choice D of 0"
        '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert first.references == ("A",)
    assert first.max_new_tokens == 128


def test_reasoning_is_followed_by_a_question_without_the_text(bench):
    example = next(bench.examples("cot", None, 0))
    assert example.max_new_tokens == 1024
    assert example.question.endswith("\n\nLet’s think step by step:")
    second = bench.follow_up(example, " It is plain.\n")
    assert second.context + second.question == (
        "Please read the following text and answer the questions below.\n\n"
        "The text is too long and omitted here.\n\n"
        "What is the correct answer to this question: Which of the four is number 0?\n"
        "Choices:\n(A) Choice A of 0\n(B) Choice B of 0\n(C) Choice C of 0\n(D) Choice D of 0\n\n"
        "Let’s think step by step: It is plain.\n\n"
        "Based on the above, what is the single, most likely answer choice? "
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (second.max_new_tokens, second.id) == (128, "row-0-answer")
    assert bench.follow_up(second, "The correct answer is (A)") is None
    assert bench.follow_up(next(bench.examples("0shot", None, 0)), "x") is None


def test_reasoning_that_looks_like_a_mark_stays_as_it_is(bench):
    second = bench.follow_up(next(bench.examples("cot", None, 0)), "$COT$ and $QUESTION$")
    assert "Let’s think step by step: $COT$ and $QUESTION$\n\nBased" in second.question


@pytest.mark.parametrize(
    ("answer", "accuracy", "compensated"),
    [
        ("The correct answer is (A)", 100.0, 100.0),
        ("**The correct answer is A**", 100.0, 100.0),
        ("The correct answer is (B)", 0.0, 0.0),
        ("A", 0.0, 25.0),
        ("", 0.0, 25.0),
    ],
)
def test_no_letter_is_worth_a_guess_in_the_compensated_score(bench, answer, accuracy, compensated):
    example = next(bench.examples("0shot", None, 0))
    scores = bench.score(example.without_context(), answer)
    assert (scores["accuracy"], scores["compensated"]) == (accuracy, compensated)


def test_gold_scores_100_in_both_tasks(bench):
    for task in bench.tasks():
        for example in bench.examples(task, None, 0):
            assert bench.score(example, bench.gold(example))["accuracy"] == 100.0


def test_accuracy_is_given_by_difficulty_and_length(bench):
    samples = [
        ScoredExample.of(example, {"accuracy": 100.0 * (number < 2), "compensated": 50.0})
        for number, example in enumerate(bench.examples("0shot", None, 0))
    ]
    metrics = bench.aggregate(samples)
    columns = metrics["columns"]
    assert metrics["scores"]["accuracy"] == pytest.approx(100 / 3)
    assert {name: column["n"] for name, column in columns.items()} == {
        "Easy": 3,
        "Hard": 3,
        "Short": 2,
        "Medium": 2,
        "Long": 2,
    }
    assert columns["Easy"]["accuracy"] == pytest.approx(100 / 3)
    assert columns["Short"]["accuracy"] == 50.0
    assert columns["Long"] == {"n": 2, "accuracy": 0.0, "compensated": 50.0}
    assert bench.aggregate([])["columns"]["Long"] == {"n": 0, "accuracy": None, "compensated": None}


def test_sampling_is_official_and_can_be_turned_off():
    assert LongBenchV2().generation_for("cot") == {"do_sample": True, "temperature": 0.1}
    assert LongBenchV2(temperature=0.0).generation_for("cot") == {}


def test_both_tasks_are_the_same_data(bench):
    assert bench.for_task("cot").revision() == bench.for_task("0shot").revision()
