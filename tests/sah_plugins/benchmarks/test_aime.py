"""AIME on invented problems in the columns of its data."""

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import ScoredExample
from sah_core.errors import DataError, ParameterError
from sah_core.testing import run_benchmark_checks
from sah_plugins.benchmarks.aime import Aime, invented_rows
from sah_plugins.benchmarks.aime.estimates import interval, majority_share, pass_at_k

pytestmark = pytest.mark.unit


@pytest.fixture
def bench(tmp_path):
    return Aime.example(tmp_path)


def answered(bench, answers, year="2025"):
    """The samples of a year, three of each of three problems, with these answers."""
    pairs = zip(bench.examples(year, None, 0), answers, strict=True)
    return [ScoredExample.of(example, bench.score(example, text)) for example, text in pairs]


def test_it_passes_the_conformance_checks(bench):
    assert [r for r in run_benchmark_checks(bench) if r.status == "failed"] == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("year", ["2024", "2025", "2026"])
def test_gold_scores_100_and_nothing_0_from_any_file(tmp_path, year, suffix):
    found = invented_rows(year)
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / f"{year}.parquet")
    else:
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{year}.jsonl").write_text(text)
    bench = Aime(data_dir=str(tmp_path), samples=2, years=(int(year),))
    examples = list(bench.examples(year, None, 0))
    assert len(examples) == bench.count(year) == 6
    for example in examples:
        assert bench.score(example, bench.gold(example))["accuracy"] == 100.0
        assert bench.score(example, "")["accuracy"] == 0.0


def test_samples_share_a_context_and_have_ids_of_their_own(bench):
    examples = list(bench.examples("2024", None, 0))[:4]
    assert [e.id for e in examples] == ["2024-I-1-0", "2024-I-1-1", "2024-I-1-2", "2024-I-2-0"]
    assert [e.context_id for e in examples] == ["2024-I-1"] * 3 + ["2024-I-2"]


def test_a_prompt_asks_for_a_boxed_answer_or_is_that_of_the_harness(bench):
    example = list(bench.examples("2025", None, 0))[-1]
    assert example.context + example.question == (
        "Solve the following AIME (American Invitational Mathematics Examination) problem.\n\n"
        "Problem: Find \\{x\\} - x + 1.\n\nInstructions:\n"
        "- The answer should be an integer between 0 and 999\n"
        "- You must wrap your final answer in \\boxed{...} format\n\n"
        "What is the answer to this problem?"
    )
    harness = Aime(data_dir=bench.data_dir, prompt="lm-eval")
    example = next(harness.examples("2025", None, 0))
    assert example.context + example.question == "Question: Find 2 + 31.\nAnswer:"


def test_years_are_chosen_and_each_is_identified_by_its_own_data(bench):
    assert Aime().tasks() == ("2024", "2025")
    assert bench.for_task("2024").years == (2024,)
    Path(bench.data_dir, "2026.jsonl").unlink()
    assert bench.for_task("2025").revision()
    with pytest.raises(DataError, match="aime 2026"):
        list(bench.examples("2026", None, 0))


def test_a_file_of_one_year_is_never_taken_for_another(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in invented_rows("2025"))
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(DataError, match="no file with its rows"):
        list(Aime(data_dir=str(tmp_path)).examples("2025", None, 0))


@pytest.mark.parametrize("answer", ["x", "1000", "-1", ""])
def test_an_answer_out_of_range_is_a_fault_of_the_data(tmp_path, answer):
    row = {**invented_rows("2025")[0], "answer": answer}
    (tmp_path / "2025.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="row 0: the answer is .*: expected an integer from 0 to"):
        list(Aime(data_dir=str(tmp_path)).examples("2025", None, 0))


def test_greedy_answers_are_asked_for_once():
    with pytest.raises(ParameterError, match="1 where temperature is 0"):
        Aime(temperature=0.0)
    assert Aime(temperature=0.0, samples=1).generation_for("2024") == {}
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert Aime().generation_for("2024") == sampled


def test_metrics_of_a_year(bench):
    right = r"\boxed{33}"
    texts = (right, right, "no", r"\boxed{49}", r"\boxed{7}", r"\boxed{8}", "no", "no", "no")
    samples = answered(bench, texts)
    metrics = bench.aggregate(samples)
    assert metrics["scores"]["accuracy"] == pytest.approx(100 / 3)
    assert metrics["scores"]["extracted"] == pytest.approx(500 / 9)
    assert "answer" not in metrics["scores"]
    assert metrics["problems"] == 3
    assert metrics["pass@1"]["value"] == pytest.approx(100 / 3)
    low, high = metrics["pass@1"]["interval"]
    assert 0 < low < 100 / 3 < high < 100
    assert metrics["pass@k"] == {
        "1": pytest.approx(100 / 3),
        "2": pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
    }
    assert metrics["majority"] == pytest.approx(100 * (1 + 1 / 3 + 0) / 3)
    assert metrics["tasks"]["2025"]["majority"] == metrics["majority"]


def test_years_are_summed_up_by_problems(bench):
    right, wrong = [r"\boxed{33}"] * 3 + [r"\boxed{49}"] * 3 + [r"\boxed{1}"] * 3, ["no"] * 9
    tasks = {
        year: bench.aggregate(answered(bench, texts, year))["tasks"][year]
        for year, texts in (("2024", right), ("2025", wrong))
    }
    assert Aime.summary(tasks) == {"pass@1": 50.0, "pass@2": 50.0, "majority": 50.0}
    tasks.pop("2025")
    assert Aime.summary(tasks) == {}


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right, k):
    samples = [True] * right + [False] * (5 - right)
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_interval_is_wilsons_over_independent_samples():
    low, high = interval([1.0, 0.0, 1.0, 1.0], samples=4)
    # By hand, for 3 of 4 at z = 1.96: the spread speaks for 3 draws, and 4 problems there are.
    assert (low, high) == (pytest.approx(0.3006, abs=1e-3), pytest.approx(0.9544, abs=1e-3))


def test_the_interval_narrows_with_samples_that_differ_and_not_with_those_that_agree():
    def width(shares, samples):
        low, high = interval(shares, samples)
        return high - low

    agree, differ = [1.0, 0.0] * 5, [0.5] * 5 + [0.6] * 5
    assert width(agree, 80) == pytest.approx(width(agree, 10), abs=0.03)
    assert width(differ, 80) < 0.6 * width(differ, 10)


def test_the_interval_of_all_or_nothing_is_no_point():
    assert interval([], 0) is None
    low, high = interval([0.0] * 30, 240)
    assert low == 0.0
    assert 0.05 < high < 0.2
    assert interval([1.0], 1)[1] == 1.0


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([3, 3, 4], 1.0),
        ([4, 4, 3], 0.0),
        ([3, 4, None], 0.5),
        ([None, None, 3], 1.0),
        ([None], 0.0),
        ([], 0.0),
    ],
)
def test_the_majority_is_that_of_those_who_answer_and_a_tie_is_shared(answers, share):
    assert majority_share(answers, 3) == share
