"""LongBench on invented rows in the official columns."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.benchmark import ScoredExample
from sah_core.errors import DataError
from sah_plugins.benchmarks.longbench import LongBench, invented
from sah_plugins.benchmarks.longbench.tasks import CATEGORIES, EXTENDED, TASKS, base_of
from sah_plugins.scorers.longbench import SCORERS
from sah_plugins.text.prompts import prompts_of

pytestmark = pytest.mark.unit

ROW = {
    "input": "Who {keeps} it?",
    "context": "Long {text}\n",
    "answers": ["a keeper", "the keeper"],
    "length": 5000,
    "dataset": "narrativeqa",
    "language": "en",
    "all_classes": None,
    "_id": "abc",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return LongBench.example(tmp_path_factory.mktemp("longbench"))


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_tasks_are_the_21_and_the_13():
    assert len(TASKS) == 21
    assert len(EXTENDED) == 13
    assert LongBench().tasks() == (*TASKS, *EXTENDED)
    assert sum(task.examples for task in TASKS.values()) == 4750


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("task", ["narrativeqa", "qasper_e", "lcc", "trec"])
def test_a_prompt_is_the_official_template_with_the_row_in_it(tmp_path, suffix, task):
    row = {**ROW, "all_classes": ["Date", "City"]} if task == "trec" else ROW
    write(tmp_path / f"{task}.{suffix}", [row])
    [example] = LongBench(data_dir=str(tmp_path)).examples(task, None, 0)
    template = prompts_of("sah_plugins.benchmarks.longbench")[base_of(task).name]
    assert example.context + example.question == template.format(**row)
    assert example.context.endswith(row["context"])
    assert (example.id, example.references, example.answer_prefix) == (
        "abc",
        ("a keeper", "the keeper"),
        "",
    )
    assert example.facts["length"] == 5000
    assert example.facts.get("all_classes") == row["all_classes"]


def test_the_prompt_of_a_task_is_byte_for_byte_the_official_one(bench):
    example = next(bench.examples("qmsum", None, 0))
    assert example.context.startswith(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\nInvented text"
    )
    assert example.question == (
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences."
        "\n\nQuery: Where is item 0?\nAnswer:"
    )


def test_few_shot_and_code_tasks_go_without_chat_template(bench):
    without = [task for task in bench.tasks() if not bench.protocol_for(task).chat]
    assert {base_of(task).name for task in without} == {
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "lcc",
        "repobench-p",
    }
    assert {bench.protocol_for(task).truncation for task in bench.tasks()} == {"middle"}


def test_rows_of_one_text_share_its_prefill(bench):
    first, second, third = bench.examples("qasper", None, 0)
    assert first.context_id == second.context_id != third.context_id


@pytest.mark.parametrize("task", [*TASKS, *EXTENDED])
def test_right_answers_score_100_and_none_scores_0(bench, task):
    for example in bench.examples(task, None, 0):
        gold = bench.score(example, bench.gold(example))["score"]
        assert gold == pytest.approx(100.0, abs=1e-4)
        assert bench.score(example, "")["score"] == 0.0
        assert bench.info(task).metric in SCORERS


def test_only_the_first_line_counts_in_few_shot_tasks(bench):
    trivia = next(bench.examples("triviaqa", None, 0))
    assert bench.score(trivia, "\n\nred lighthouse\nmore words")["score"] == 100.0
    story = next(bench.examples("narrativeqa", None, 0))
    assert bench.score(story, "red lighthouse\nmore words")["score"] < 100.0


def test_longbench_e_is_scored_by_length_too(bench):
    samples = [
        ScoredExample.of(example, {"score": 10.0 * number})
        for number, example in enumerate(bench.examples("qasper_e", None, 0), 1)
    ]
    buckets = bench.aggregate(samples)["buckets"]
    assert buckets == {
        "0-4k": {"n": 1, "score": 10.0},
        "4-8k": {"n": 1, "score": 20.0},
        "8k+": {"n": 1, "score": 30.0},
    }
    assert bench.aggregate(samples[:1])["buckets"]["8k+"] == {"n": 0, "score": None}
    plain = [ScoredExample(id="1", task="qasper", scores={"score": 1.0}, facts={"length": 1})]
    assert "buckets" not in bench.aggregate(plain)


def metrics_of(tasks, score):
    return {task: {"scores": {"score": score(task)}} for task in tasks}


def test_categories_and_their_mean_are_given_where_all_tasks_are():
    figures = LongBench.summary(metrics_of(TASKS, lambda task: 60.0 if task == "lcc" else 30.0))
    assert figures["code"] == 45.0
    assert figures["summarisation"] == 30.0
    assert figures["overall"] == pytest.approx((5 * 30 + 45) / 6)
    english = [name for name, task in TASKS.items() if task.language != "zh"]
    figures = LongBench.summary(metrics_of(english, lambda task: 12.0))
    assert set(figures) == {f"{name} (en)" for name in (*CATEGORIES, "overall")}
    assert LongBench.summary(metrics_of(english[1:], lambda task: 12.0)) == {}


def test_longbench_e_as_a_whole_is_given_by_length():
    def buckets(task):
        score = 90.0 if base_of(task).category == "code" else 30.0
        return {bucket: {"n": 1, "score": score} for bucket in ("0-4k", "4-8k", "8k+")}

    metrics = {task: {"scores": {}, "buckets": buckets(task)} for task in EXTENDED}
    assert LongBench.summary(metrics)["E 4-8k"] == pytest.approx((5 * 30 + 90) / 6)


def test_token_limits_are_the_official_ones_unless_more_is_asked_for(bench):
    assert bench.info("gov_report").max_new_tokens == 512
    more = LongBench(extra_tokens=20).info("gov_report_e")
    assert (more.max_new_tokens, more.official_max_new_tokens) == (532, 512)
    assert [bench.info(task).examples for task in ("multifieldqa_en", "qasper_e")] == [150, 224]


def test_a_missing_column_says_which_and_where(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "answers"} for row in invented.rows("qmsum")]
    write(tmp_path / "qmsum.jsonl", rows)
    with pytest.raises(DataError, match=r"longbench qmsum: .*qmsum.jsonl: row 0 has no column 'an"):
        list(LongBench(data_dir=str(tmp_path)).examples("qmsum", None, 0))
    rows = [{k: v for k, v in row.items() if k != "all_classes"} for row in invented.rows("trec")]
    write(tmp_path / "trec.jsonl", rows)
    with pytest.raises(DataError, match="has no column 'all_classes'"):
        list(LongBench(data_dir=str(tmp_path)).examples("trec", None, 0))
