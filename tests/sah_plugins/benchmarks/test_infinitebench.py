"""InfiniteBench on invented rows in the official columns."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sah_core.errors import DataError
from sah_core.testing import run_benchmark_checks
from sah_plugins.benchmarks.infinitebench import InfiniteBench
from sah_plugins.benchmarks.infinitebench.invented import rows
from sah_plugins.benchmarks.infinitebench.tasks import TASKS

pytestmark = pytest.mark.unit
TEXT = "An invented text, number 0. " * 8


@pytest.fixture
def bench(tmp_path):
    return InfiniteBench.example(tmp_path)


def write(folder, task, suffix, found):
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), folder / f"{task}.parquet")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{task}.jsonl").write_text(lines)


def first(bench, task):
    return next(bench.examples(task, None, 0))


@pytest.mark.parametrize("variant", ["official", "kvpress"])
def test_it_passes_the_conformance_checks(tmp_path, variant):
    InfiniteBench.example(tmp_path)
    bench = InfiniteBench(data_dir=str(tmp_path), variant=variant)
    assert [r for r in run_benchmark_checks(bench) if r.status == "failed"] == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("task", TASKS)
def test_gold_scores_100_and_nothing_0_from_any_file(tmp_path, task, suffix):
    write(tmp_path, task, suffix, rows(task))
    bench = InfiniteBench(data_dir=str(tmp_path))
    examples = list(bench.examples(task, None, 0))
    assert len(examples) == 3
    for example in examples:
        assert bench.score(example, bench.gold(example)) == {"score": pytest.approx(100.0)}
        assert bench.score(example, "") == {"score": 0.0}


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (
            "passkey",
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about the important information.\n\n"
            f"{TEXT}\n\nWhat is the pass key?\n\nThe pass key is",
        ),
        (
            "math_find",
            f"What is the largest number in the following list?\n\n{TEXT}\n\nYou should answer "
            "with only one number, no other words. The largest number of the list is: ",
        ),
        (
            "code_run",
            f"There is a function called func_0 in the following Python code.\n\n{TEXT}\n\n"
            "Please compute the exact value of func_0(-0). The value of func_0(-0) is",
        ),
        (
            "longbook_choice_eng",
            f"Read the book and answer the question.\n\n{TEXT}\n\nQuestion: What is seen from "
            "number 0?\nA. a red lighthouse\nB. an old ferry\nC. a stone bridge\nD. a windmill"
            "\n\nThe letter of the correct answer is",
        ),
        (
            "longdialogue_qa_eng",
            "Below is a dialogue script where one random occurrence of a character name is "
            'replaced with "$$MASK$$", and you should try to guess who that character is.\n\n'
            f"{TEXT}\n\nThe name that has been replaced with $$MASK$$ is likely",
        ),
    ],
)
def test_a_prompt_is_the_official_one(bench, task, prompt):
    example = first(bench, task)
    assert example.context + example.question + example.answer_prefix == prompt
    assert example.max_new_tokens == TASKS[task].max_new_tokens
    assert bench.protocol_for(task).chat is False


def test_the_peers_variant_asks_otherwise(tmp_path):
    InfiniteBench.example(tmp_path)
    bench = InfiniteBench(data_dir=str(tmp_path), variant="kvpress")
    example = first(bench, "kv_retrieval")
    assert example.question == '\nKey: "k-0"\n '
    assert example.answer_prefix == "The value associated with the specified key is"
    assert example.max_new_tokens == 70
    protocol = bench.protocol_for("kv_retrieval")
    assert (protocol.chat, protocol.prefix) == (True, "assistant")
    assert first(bench, "longbook_sum_eng").question == "Summary:"


def test_the_peers_variant_scores_otherwise(tmp_path):
    bench = InfiniteBench.example(tmp_path)
    peers = InfiniteBench(data_dir=str(tmp_path), variant="kvpress")
    example = first(bench, "longbook_choice_eng")
    assert bench.score(example, "I would pick A, not B") == {"score": 0.0}
    assert peers.score(example, "I would pick A, not B") == {"score": 100.0}


def test_braces_of_a_text_are_no_fields(tmp_path):
    found = [{**rows("kv_retrieval")[0], "context": '{"input": "{func}"}'}]
    write(tmp_path, "kv_retrieval", "jsonl", found)
    example = first(InfiniteBench(data_dir=str(tmp_path)), "kv_retrieval")
    assert '{"input": "{func}"}' in example.context


@pytest.mark.parametrize(
    ("task", "answer", "references"),
    [
        ("passkey", "71432", ("71432",)),
        ("math_calc", [[1, 4, 8]], ("1", "4", "8")),
        ("math_find", [88.5], ("88.5",)),
        ("code_debug", ["an old ferry", "B"], ("an old ferry", "B")),
        ("code_debug", "an old ferry", ("an old ferry", "B")),
    ],
)
def test_labels_are_taken_in_every_form_that_the_data_has_had(tmp_path, task, answer, references):
    write(tmp_path, task, "jsonl", [{**rows(task)[0], "answer": answer}])
    bench = InfiniteBench(data_dir=str(tmp_path))
    example = first(bench, task)
    assert example.references == references
    assert bench.score(example, bench.gold(example)) == {"score": 100.0}


@pytest.mark.parametrize(
    ("task", "changed", "problem"),
    [
        ("code_run", {"input": "no call"}, "row 0: the column input holds 'no call'"),
        ("math_find", {"input": "largest"}, "expected 'The ... of' in it"),
        (
            "code_run",
            {"answer": ["x"]},
            r"row 0: .* answer holds \['x'\]: expected numbers",
        ),
        ("passkey", {"answer": []}, "row 0: the column answer is empty"),
        ("code_debug", {"options": ["a"]}, "the column options holds 1 texts: expected 4"),
        ("code_debug", {"answer": ["a tower"]}, "the answer 'a tower' is none of the options"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, task, changed, problem):
    write(tmp_path, task, "jsonl", [{**rows(task)[0], **changed}])
    with pytest.raises(DataError, match=problem):
        first(InfiniteBench(data_dir=str(tmp_path)), task)


def test_the_mean_is_of_all_tasks_or_not_given():
    metrics = {task: {"scores": {"score": float(i)}} for i, task in enumerate(TASKS)}
    assert InfiniteBench.summary(metrics) == {"overall": 5.5}
    metrics.pop("passkey")
    assert InfiniteBench.summary(metrics) == {}
