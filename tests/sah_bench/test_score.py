"""`sah-bench score`: finished results scored again."""

import json

import pytest
from click.testing import CliRunner

from sah_bench.cli import main
from sah_bench.experiment import resolve
from sah_bench.progress import Silent
from sah_bench.runner import run_experiment

pytestmark = pytest.mark.unit


@pytest.fixture
def results(fakes, tmp_path):
    """A finished run of two cells, and its folder."""
    document = {
        "adapter": "fake",
        "models": ["m"],
        "pipelines": ["dense", "sink(4)"],
        "benchmarks": ["quiz(contexts=2)"],
        "tasks": ["easy"],
        "metrics": [],
        "output": str(tmp_path / "results"),
    }
    return run_experiment(resolve(document), Silent())


def score(*arguments):
    return CliRunner().invoke(main, ["score", *map(str, arguments)])


def kept(folder):
    names = ("samples.jsonl", "metrics.json")
    return [(folder / name).read_bytes() for name in names]


def mend(monkeypatch, fakes):
    """A mended metric: an answer is half right."""
    monkeypatch.setattr(fakes.Quiz, "score", lambda self, example, text: {"accuracy": 50.0})


def test_scores_that_did_not_change_are_shown_as_they_are(results, tmp_path):
    result = score(tmp_path / "results")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["m,", "quiz", "easy,", "dense", "accuracy", "100.00", "100.00", "0", "4"] in lines
    assert ["m,", "quiz", "easy,", "sink(4)", "accuracy", "0.00", "0.00", "0", "4"] in lines


def test_only_write_changes_files(results, tmp_path, monkeypatch, fakes):
    mend(monkeypatch, fakes)
    before = kept(results[0].folder)
    result = score(tmp_path / "results")
    assert result.output.splitlines()[2].split()[-4:] == ["100.00", "50.00", "4", "4"]
    assert kept(results[0].folder) == before
    result = score(tmp_path / "results", "--write")
    assert "2 of 2 cells written." in result.output
    metrics = json.loads((results[0].folder / "metrics.json").read_text())
    assert metrics["scores"] == {"accuracy": 50.0}
    assert metrics["rescored"] == {"protocol_version": "1", "scores_before": {"accuracy": 100.0}}
    assert metrics["complete"] is True
    rows = (results[0].folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["scores"] for row in rows] == [{"accuracy": 50.0}] * 4


def test_written_results_are_what_a_run_goes_on_from(results, tmp_path, monkeypatch, fakes):
    mend(monkeypatch, fakes)
    score(tmp_path / "results", "--write")
    fakes.FakeAdapter.calls.clear()
    document = {
        "adapter": "fake",
        "models": ["m"],
        "pipelines": ["dense"],
        "benchmarks": ["quiz(contexts=2)"],
        "tasks": ["easy"],
        "metrics": [],
        "output": str(tmp_path / "results"),
    }
    [again] = run_experiment(resolve(document), Silent())
    assert again.score == 50.0
    assert [call[0] for call in fakes.FakeAdapter.calls] == ["load"]


def test_another_metric_stands_beside_the_benchmarks_own(results, tmp_path):
    result = score(results[0].folder, "--metric", "longbench_qa_f1", "--write")
    assert result.exit_code == 0
    metrics = json.loads((results[0].folder / "metrics.json").read_text())
    assert metrics["scores"] == {"accuracy": 100.0}
    assert metrics["other_metrics"]["longbench_qa_f1"]["score"] == pytest.approx(100.0)
    assert metrics["other_metrics"]["longbench_qa_f1"]["n"] == 4
    result = score(results[0].folder, "--metric", "longbench_qa_f1")
    assert result.output.splitlines()[2].split()[-4:] == ["100.00", "100.00", "0", "4"]


def test_a_metric_takes_its_keywords_from_the_facts(results, tmp_path):
    result = score(results[0].folder, "--metric", "longbench_classification")
    assert result.exit_code == 1
    assert "not scored: m, quiz easy, dense: TypeError" in result.output
    path = results[0].folder / "samples.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    for row in rows:
        row["facts"]["all_classes"] = [row["references"][0], "other"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score(results[0].folder, "--metric", "longbench_classification")
    assert result.output.splitlines()[2].split()[-3:] == ["100.00", "0", "4"]


def test_an_unknown_metric_and_a_folder_without_results_are_bad_input(results, tmp_path):
    result = score(tmp_path / "results", "--metric", "longbench_qa_f2")
    assert result.exit_code == 2
    assert "no metric named 'longbench_qa_f2'. did you mean" in result.stderr
    (tmp_path / "empty").mkdir()
    assert "holds no results" in score(tmp_path / "empty").stderr


def test_a_cell_that_cannot_be_scored_does_not_stop_the_others(results, tmp_path):
    config = results[0].folder / "config.json"
    broken = json.loads(config.read_text())
    broken["identity"]["benchmark"]["name"] = "quzi"
    config.write_text(json.dumps(broken))
    result = score(tmp_path / "results")
    assert result.exit_code == 1
    assert "no benchmark named 'quzi'" in result.output
    assert "sink(4)" in result.output


def test_a_config_that_does_not_say_what_was_run_is_named_by_its_folder(results, tmp_path):
    folder = results[0].folder
    (folder / "config.json").write_text("{}")
    result = score(tmp_path / "results")
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("not scored")]
    assert line.startswith(f"not scored: {folder}: '{folder}/config.json' does not say what was")
    assert "sink(4)" in result.output


def test_the_score_of_a_task_need_not_be_a_mean(results, tmp_path, monkeypatch, fakes):
    def aggregate(self, samples):
        return {"n": len(samples), "scores": {"accuracy": 12.5}, "tasks": {}}

    monkeypatch.setattr(fakes.Quiz, "aggregate", aggregate)
    line = score(tmp_path / "results").output.splitlines()[2]
    assert line.split()[-4:] == ["100.00", "12.50", "0", "4"]
