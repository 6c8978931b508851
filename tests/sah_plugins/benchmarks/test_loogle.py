"""LooGLE on invented rows in the official columns."""

import json
import logging
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import ScoredExample
from sah_core.errors import DataError, MissingLibraryError
from sah_core.scorer import find_scorer
from sah_core.testing import run_benchmark_checks
from sah_plugins.benchmarks import loogle as module
from sah_plugins.benchmarks.loogle import Loogle
from sah_plugins.benchmarks.loogle.invented import CONFIGS, rows
from sah_plugins.benchmarks.loogle.tasks import LONG_QA, TASKS
from sah_plugins.scorers import loogle as scorers

pytestmark = pytest.mark.unit
TEXT = "An invented text, number 0. " * 8


@pytest.fixture
def bench(tmp_path):
    Loogle.example(tmp_path)
    return Loogle(data_dir=str(tmp_path), meteor=False)


def first(bench, task):
    return next(bench.examples(task, None, 0))


def with_rows(tmp_path, config, found):
    (tmp_path / f"{config}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return Loogle(data_dir=str(tmp_path), meteor=False)


def test_it_passes_the_conformance_checks(bench):
    assert [r for r in run_benchmark_checks(bench) if r.status == "failed"] == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_gold_scores_100_and_nothing_0_from_any_file(tmp_path, suffix):
    for config in CONFIGS:
        path = tmp_path / f"{config}.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(config)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(config)))
    bench = Loogle(data_dir=str(tmp_path), meteor=False)
    for task in TASKS:
        examples = list(bench.examples(task, None, 0))
        assert len(examples) == (4 if task == "shortdep_qa" else 2)
        for example in examples:
            assert bench.score(example, bench.gold(example))["score"] == pytest.approx(100.0)
            assert bench.score(example, "")["score"] == 0.0


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (
            "shortdep_qa",
            f"Please answer the question based on the long texts below. \n{TEXT}\n"
            "Question: Who is Ann of 0?\nAnswer: ",
        ),
        (
            "longdep_summarization",
            f"Please generate a summary of the below paper. \n{TEXT}\n Summarization: ",
        ),
        (
            "shortdep_cloze",
            "Please fill in the clozes based on the given long texts below. Each of the "
            "placeholder '<mask-n>' in the question could be an entity of Person, Location or "
            "Organiocation. The same masks represent the same entity. Output a json format answer, "
            "for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': 'Bethel "
            f"Horizon'}}\n{TEXT}\n Question: <mask-0> went to <mask-1>. What are the masked "
            "entities? \nAnswer:",
        ),
    ],
)
def test_a_prompt_is_the_official_one(bench, task, prompt):
    example = first(bench, task)
    assert example.context + example.question == prompt
    assert example.max_new_tokens == TASKS[task].max_new_tokens


def test_a_question_goes_to_the_task_of_its_type(bench):
    answers = {task: first(bench, task).references[0] for task in LONG_QA}
    assert answers == {
        "longdep_qa_comprehension": "The ferry sank because it was old and heavy.",
        "longdep_qa_retrieval": "Red stone, white wood and some glass.",
        "longdep_qa_reorder": "II,I,III",
        "longdep_qa_computation": "It took 5 hours and 33 minutes.",
    }


def test_questions_may_come_as_a_list_too(tmp_path):
    pairs = [{"Q": "Reorder.", "A": "II,I", "type": "时间线", "S": []}]
    bench = with_rows(tmp_path, "longdep_qa", [{"input": "x", "qa_pairs": pairs, "output": "none"}])
    assert first(bench, "longdep_qa_reorder").references == ("II,I",)


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ("__import__('os').getcwd()", "row 0: the column qa_pairs holds None"),
        ("[{'Q': 'x'}]", "expected a list of questions, each with Q and A"),
        ("[{'Q': 'x', 'A': 'y', 'type': 'riddle'}]", "the type 'riddle': expected one of"),
    ],
)
def test_what_is_no_list_of_questions_is_named_and_never_run(tmp_path, pairs, problem):
    bench = with_rows(tmp_path, "longdep_qa", [{"input": "x", "qa_pairs": pairs, "output": "none"}])
    with pytest.raises(DataError, match=problem):
        first(bench, "longdep_qa_reorder")


def test_a_cloze_without_names_is_named(tmp_path):
    pairs = "[{'Q': 'x', 'A': 'Bob'}]"
    found = [{"input": "x", "qa_pairs": pairs, "output": "none"}]
    with pytest.raises(DataError, match="the answer of a cloze is 'Bob': expected names by mask"):
        first(with_rows(tmp_path, "shortdep_cloze", found), "shortdep_cloze")


def test_scores_of_clozes_are_over_all_masks(bench):
    two, one = bench.examples("shortdep_cloze", None, 0)
    answers = (two, "{'<mask-0>': \"Bob O'Neil\", '<mask-1>': 'Rome'}"), (one, "{}")
    samples = [ScoredExample.of(example, bench.score(example, text)) for example, text in answers]
    assert [sample.scores["score"] for sample in samples] == [50.0, 0.0]
    metrics = bench.aggregate(samples)
    assert metrics["scores"]["score"] == pytest.approx(100 / 3)
    assert metrics["tasks"]["shortdep_cloze"]["scores"]["partial"] == pytest.approx(100 / 3)


def test_a_timeline_is_scored_by_four_similarities(bench):
    scores = bench.score(first(bench, "longdep_qa_reorder"), "I. x\nII. y\nIII. z")
    assert scores["location_square"] == pytest.approx(100 * (1 - (2 / 3) / (8 / 3)))
    assert scores["location_mean"] == pytest.approx(100 * (1 - (2 / 3) / (4 / 3)))
    assert scores["swap"] == scores["swap_distance"] == pytest.approx(50.0)
    assert scores["score"] == pytest.approx((75 + 50 + 50 + 50) / 4)


def test_long_questions_have_a_mean_over_all_of_them():
    metrics = {task: {"n": n, "scores": {"rouge_l": 10.0 * n}} for n, task in enumerate(LONG_QA, 1)}
    assert Loogle.summary(metrics) == {
        "longdep_qa rouge_l": pytest.approx((10 + 40 + 90 + 160) / 10)
    }
    metrics.pop(LONG_QA[0])
    assert Loogle.summary(metrics) == {}


def test_the_official_penalty_can_be_turned_off():
    assert Loogle().generation_for("shortdep_qa") == {"repetition_penalty": 2.0}
    assert Loogle(repetition_penalty=1.0).generation_for("shortdep_qa") == {}


def test_without_wordnet_only_meteor_is_missing_and_said_once(tmp_path, monkeypatch, caplog):
    def missing(*_):
        raise MissingLibraryError("METEOR", "WordNet 3.0", command="get it")

    module._say_once.cache_clear()
    monkeypatch.setattr(scorers, "meteor", missing)
    bench = Loogle.example(tmp_path)
    example = first(bench, "shortdep_qa")
    with caplog.at_level(logging.WARNING):
        assert all("meteor" not in bench.score(example, "Ann") for _ in range(3))
    assert [r.getMessage() for r in caplog.records] == [
        "no METEOR: METEOR needs WordNet 3.0: get it"
    ]


def test_bertscore_is_asked_for_and_is_the_precision_of_the_answer(bench, monkeypatch):
    class Scorer:
        def __init__(self, lang):
            assert lang == "en"

        def score(self, candidates, references):
            assert (candidates, references) == (["Ann is a person."], ["Ann"])
            return [0.2], [0.75], [0.3]

    scorers._bert_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(BERTScorer=Scorer))
    asked = Loogle(data_dir=bench.data_dir, meteor=False, bertscore=True)
    assert asked.score(first(asked, "shortdep_qa"), "Ann")["bertscore"] == 75.0
    assert "bertscore" not in bench.score(first(bench, "shortdep_qa"), "Ann")
    scorers._bert_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(MissingLibraryError, match="package bert-score: pip install bert-score$"):
        find_scorer("loogle_bertscore")("Ann", ["Ann"])
