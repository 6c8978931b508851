"""`sah-bench data`, and what `plugins show` and `plugins check` say of benchmarks."""

import json

import pytest
from click.testing import CliRunner

from sah_bench.cli import main
from sah_plugins.benchmarks.longbench_v2 import LongBenchV2, invented_rows
from sah_plugins.data import hub

pytestmark = pytest.mark.unit


def invoke(*arguments):
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def test_list_says_where_every_task_comes_from_without_looking():
    result = invoke("list", "longbench", "niah", "--task", "qasper*", "--task", "4096")
    assert result.exit_code == 0
    assert result.output == (
        "longbench qasper: THUDM/LongBench qasper test (no commit pinned), 200 examples, "
        "MIT for LongBench; the data sets it draws on keep their own licences\n"
        "longbench qasper_e: THUDM/LongBench qasper_e test (no commit pinned), 224 examples, "
        "MIT for LongBench; the data sets it draws on keep their own licences\n"
        "niah 4096: generated, 15 examples, generated; wording of RULER (Apache-2.0)\n"
    )


def test_list_shows_all_benchmarks_by_default():
    names = {line.split()[0] for line in invoke("list").output.splitlines()}
    assert {"longbench", "longbench-v2", "niah", "ruler"} <= names


def test_a_pattern_that_fits_no_task_is_bad_input():
    result = invoke("list", "longbench", "--task", "qaspre")
    assert result.exit_code == 2
    assert "error: no task fits 'qaspre'. did you mean 'qasper'?" in result.stderr


def test_verify_checks_columns_and_the_number_of_rows(tmp_path):
    LongBenchV2.example(tmp_path)
    result = invoke("verify", "longbench-v2", "--data-dir", tmp_path, "--task", "cot")
    assert result.exit_code == 1
    assert result.output.startswith("failed  longbench-v2 cot: 6 rows, sha256:")
    assert result.output.endswith("data.json: officially 503 rows\n0 ok, 1 failed\n")
    rows = [{**row, "_id": str(i)} for i, row in enumerate(invented_rows() * 84)][:503]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    result = invoke("verify", "longbench-v2", "--data-dir", tmp_path)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "2 ok, 0 failed")
    del rows[400]["answer"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    result = invoke("verify", "longbench-v2", "--data-dir", tmp_path, "--task", "cot")
    assert "row 400 has no column 'answer'" in result.output


def test_verify_of_what_is_not_there_says_what_was_looked_for(tmp_path):
    result = invoke("verify", "longbench", "niah", "--data-dir", tmp_path, "--task", "[t4]*")
    assert result.exit_code == 1
    assert f"failed  longbench trec: {tmp_path}: no file with its rows" in result.output
    assert "ok      niah 4096: generated, nothing to check" in result.output


def test_fetch_makes_a_folder_that_verify_and_a_run_take(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "_id": str(i)} for i, row in enumerate(invented_rows() * 84)][:503]
    monkeypatch.setattr(hub, "commit_of", lambda source, owner: "c0ffee")
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(hub, "load", lambda source, commit, owner: data)
    result = invoke("fetch", "longbench-v2", "niah", "--data-dir", tmp_path, "--task", "[c4]*")
    assert result.exit_code == 0
    assert result.stdout == (
        f"ok      longbench-v2 cot: {tmp_path}/longbench-v2/train.parquet\n"
        "ok      niah 4096: generated, nothing to fetch\n"
    )
    result = invoke("verify", "longbench-v2", "--data-dir", tmp_path)
    assert result.exit_code == 0
    assert "503 rows, THUDM/LongBench-v2@c0ffee, " in result.output


def test_fetch_without_a_network_is_one_line_per_task(tmp_path):
    result = invoke("fetch", "longbench-v2", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert result.output.count("failed  longbench-v2") == 2
    assert "offline mode is on (HF_HUB_OFFLINE)" in result.output


def plugins(*arguments):
    return CliRunner().invoke(main, ["plugins", *arguments])


def test_show_prints_what_a_benchmark_declares():
    text = plugins("show", "longbench", "--kind", "benchmark").output
    assert (
        "  trec: longbench_classification, 200 examples, 64 new tokens, no chat template, "
        "truncation middle, answer prefix with the user\n"
    ) in text
    assert "THUDM/LongBench, split test (no commit pinned; the one at hand is recorded)" in text
    facts = json.loads(plugins("show", "longbench", "--kind", "benchmark", "--json").output)
    assert len(facts["tasks"]) == 34
    assert facts["tasks"][0]["source"]["files"] == "data.zip::data/narrativeqa.jsonl"


def test_show_prints_the_metrics_of_a_family():
    text = plugins("show", "gsm8k").output
    assert "The metric of GSM8K as lm-evaluation-harness has it" in text
    assert "gsm8k_lm_eval: 1 if the number behind ####" in text


def test_check_runs_the_checks_of_benchmarks():
    result = plugins("check", "niah(lengths=[600], samples=1)")
    assert result.exit_code == 0
    assert "passed   gold" in result.output
    assert plugins("check", "longbench-v2").exit_code == 0


def test_check_of_a_benchmark_in_a_file(tmp_path):
    source = """
import attrs
from sah_core import Benchmark, Example, Protocol, hookimpl


@attrs.frozen(kw_only=True)
class Wrong(Benchmark):
    "Scores beyond the scale."

    name = "wrong-quiz"
    main_score = "accuracy"
    protocol = Protocol(chat=False)

    def load(self, task):
        yield Example(id="1", context_id="1", context="", question="?", references=("a",),
                      max_new_tokens=1, task=task)

    def score(self, example, prediction):
        return {"accuracy": 1000.0 * (prediction == "a")}


@hookimpl
def sah_benchmark():
    return Wrong
"""
    path = tmp_path / "wrong-quiz.py"
    path.write_text(source)
    result = plugins("check", str(path))
    assert result.exit_code == 1
    assert "failed   gold" in result.output
    assert "gold scores 1000.0, expected 100.0" in result.output
