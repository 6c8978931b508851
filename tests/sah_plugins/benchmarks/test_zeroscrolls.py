"""ZeroSCROLLS on invented rows in the official columns."""

import csv
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import ScoredExample
from sah_core.errors import DataError, ParameterError, RequestError
from sah_core.testing import run_benchmark_checks
from sah_plugins.benchmarks.zeroscrolls import ZeroScrolls
from sah_plugins.benchmarks.zeroscrolls.invented import rows
from sah_plugins.benchmarks.zeroscrolls.tasks import SUMMARIES, TASKS

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path):
    ZeroScrolls.example(tmp_path)
    return str(tmp_path)


def words(text, add_special_tokens=False):
    return {"input_ids": re.findall(r"\w+|[^\w\s]", text)}


def first(bench, task, tokenizer=None):
    return next(bench.examples(task, tokenizer, 0))


@pytest.mark.parametrize("settings", [{}, {"chat": True}])
def test_it_passes_the_conformance_checks(folder, settings):
    bench = ZeroScrolls(data_dir=folder, **settings)
    assert [r for r in run_benchmark_checks(bench) if r.status == "failed"] == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("task", TASKS)
def test_gold_scores_100_and_nothing_0_from_any_file(tmp_path, task, suffix):
    found = rows(task, "validation")
    (tmp_path / task).mkdir()
    if suffix == "parquet":
        table = pyarrow.Table.from_pylist(found)
        pyarrow.parquet.write_table(table, tmp_path / task / "validation.parquet")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{task}.jsonl").write_text(lines)
    bench = ZeroScrolls(data_dir=str(tmp_path))
    examples = list(bench.examples(task, None, 0))
    assert [len(example.references) for example in examples] == [2, 1]
    for example in examples:
        assert bench.score(example, bench.gold(example))["score"] == pytest.approx(100.0)
        assert bench.score(example, "")["score"] == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_the_input_as_it_stands(folder, task):
    example = first(ZeroScrolls(data_dir=folder), task)
    assert example.context + example.question == rows(task, "validation")[0]["input"]
    assert example.context.endswith("number 0. ")
    assert example.max_new_tokens == TASKS[task].max_new_tokens


def test_chat_models_are_asked_for_no_explanation_and_without_the_cue(folder):
    bench = ZeroScrolls(data_dir=folder, chat=True)
    assert bench.protocol_for("qasper").chat
    example = first(bench, "qasper")
    assert example.context.startswith(
        "You are given a text. Answer as asked. Do not provide any explanation.\n\nText:\n"
    )
    assert example.context.endswith("number 0. ")
    assert example.question == "\n\nQuestion:\nWhat is number 0?\n\n"
    summary = first(bench, "qmsum")
    assert "explanation" not in summary.context
    assert first(bench, "gov_report").question == "\n\nAnswer:\n"


def test_the_end_of_a_document_makes_room_as_officially(folder):
    row = rows("qasper", "validation")[0]
    head, query = row["input"][: row["query_start_index"]], row["input"][row["query_start_index"] :]
    fixed = len(words(row["truncation_seperator"] + query)["input_ids"])
    bench = ZeroScrolls(data_dir=folder, max_tokens=fixed + 20)
    example = first(bench, "qasper", words)
    kept = example.context.removesuffix(row["truncation_seperator"])
    assert kept != example.context
    assert head.startswith(kept)
    assert len(words(kept)["input_ids"]) == 20
    assert example.question == query
    long = ZeroScrolls(data_dir=folder, max_tokens=10_000)
    assert first(long, "qasper", words) == first(ZeroScrolls(data_dir=folder), "qasper")


def test_a_limit_below_the_query_is_refused(folder):
    with pytest.raises(ParameterError, match="at least the tokens of the query"):
        first(ZeroScrolls(data_dir=folder, max_tokens=3), "qasper", words)


def test_rouge_of_a_task_is_the_geometric_mean_of_three_means():
    parts = [{"rouge1": 10.0, "rouge2": 0.0, "rougeL": 4.0, "score": 0.0}]
    parts += [{"rouge1": 30.0, "rouge2": 20.0, "rougeL": 12.0, "score": 19.3}]
    samples = [ScoredExample(id=str(i), task="qmsum", scores=s) for i, s in enumerate(parts)]
    metrics = ZeroScrolls().aggregate(samples)
    expected = (20.0 * 10.0 * 8.0) ** (1 / 3)
    assert metrics["scores"]["score"] == pytest.approx(expected)
    assert metrics["tasks"]["qmsum"]["scores"]["score"] == pytest.approx(expected)


def test_the_overall_score_is_the_mean_of_ten_tasks():
    metrics = {task: {"scores": {"score": float(i)}} for i, task in enumerate(TASKS)}
    assert ZeroScrolls.summary(metrics) == {"overall": 4.5}
    metrics.pop("qmsum")
    assert ZeroScrolls.summary(metrics) == {}


def test_the_test_split_is_answered_but_not_scored(folder):
    bench = ZeroScrolls(data_dir=folder, split="test")
    example = first(bench, "qmsum")
    assert example.references == ()
    assert bench.score(example, "A text.") == {"answered": 100.0}
    assert bench.score(example, " ") == {"answered": 0.0}
    samples = [ScoredExample.of(example, {"answered": 100.0})]
    assert bench.aggregate(samples)["scores"] == {"answered": 100.0}
    assert bench.info("qmsum").examples == 281


def test_a_submission_is_the_file_of_the_leaderboard():
    predictions = {task: {f"{task}-1": 'two\nlines, and "quotes"'} for task in TASKS}
    text = ZeroScrolls(split="test").submission(predictions)
    header, *lines = csv.reader(io.StringIO(text))
    assert header == ["Task", "ID", "Prediction"]
    assert lines == [[task, f"{task}-1", 'two\nlines, and "quotes"'] for task in TASKS]


def test_a_submission_needs_the_test_split_and_all_tasks():
    with pytest.raises(RequestError, match=r"run the benchmark as 'zeroscrolls\(split=test\)'"):
        ZeroScrolls().submission({})
    with pytest.raises(RequestError, match="no predictions of summ_screen_fd, qmsum"):
        ZeroScrolls(split="test").submission({"gov_report": {"1": "x"}})


def test_places_that_do_not_ascend_are_a_fault_of_the_data(tmp_path):
    row = {**rows("qmsum", "validation")[0], "query_end_index": 10**6}
    (tmp_path / "qmsum.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="row 0: the places of document and query are"):
        first(ZeroScrolls(data_dir=str(tmp_path)), "qmsum")


def test_summaries_are_the_four_tasks_of_rouge():
    assert SUMMARIES == ("gov_report", "summ_screen_fd", "qmsum", "squality")
