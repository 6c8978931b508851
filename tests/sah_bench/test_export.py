"""`sah-bench export`: predictions as a leaderboard takes them."""

import pytest
from click.testing import CliRunner

from sah_bench.cli import main
from sah_bench.experiment import resolve
from sah_bench.progress import Silent
from sah_bench.runner import run_experiment

pytestmark = pytest.mark.unit


def run(tmp_path, **settings):
    document = {
        "adapter": "fake",
        "models": ["m"],
        "pipelines": ["dense"],
        "benchmarks": ["quiz(contexts=2)"],
        "tasks": ["easy"],
        "metrics": [],
        "output": str(tmp_path / "results"),
        **settings,
    }
    return run_experiment(resolve(document), Silent())


def submit(tmp_path):
    output = tmp_path / "file.txt"
    arguments = ["export", str(tmp_path / "results"), "--output", str(output)]
    return CliRunner().invoke(main, arguments), output


@pytest.fixture
def leaderboard(fakes, monkeypatch):
    """A leaderboard of the quiz that takes a line per answer."""

    def write(self, predictions):
        lines = [
            f"{task} {name} {answer}"
            for task in self.tasks()
            for name, answer in predictions.get(task, {}).items()
        ]
        return "\n".join(lines)

    monkeypatch.setattr(fakes.Quiz, "submission", write)


def test_predictions_are_written_by_task_and_id(fakes, leaderboard, tmp_path):
    results = run(tmp_path)
    result, output = submit(tmp_path)
    assert result.exit_code == 0, result.output
    lines = output.read_text().splitlines()
    assert {line.split(" ")[0] for line in lines} == {r.task for r in results}
    assert result.output == f"predictions written to {output}: easy {len(lines)}.\n"


def test_a_benchmark_without_a_leaderboard_says_so(fakes, tmp_path):
    run(tmp_path)
    result, output = submit(tmp_path)
    assert result.exit_code == 2
    assert "the benchmark quiz has no leaderboard that takes a file" in result.output
    assert not output.exists()


def test_a_part_of_a_task_is_no_submission(fakes, leaderboard, tmp_path):
    run(tmp_path, limit=1)
    result, _ = submit(tmp_path)
    assert result.exit_code == 2
    assert "has a part of its examples" in result.output
    assert "run it again, without --limit" in result.output


def test_results_of_two_pipelines_are_no_submission(fakes, leaderboard, tmp_path):
    run(tmp_path, pipelines=["dense", "sink(4)"])
    result, _ = submit(tmp_path)
    assert result.exit_code == 2
    assert "these are results of 2: m, quiz, dense; m, quiz, sink(4)" in result.output


def test_a_place_that_cannot_be_written_is_bad_input(fakes, leaderboard, tmp_path):
    run(tmp_path)
    arguments = ["export", str(tmp_path / "results"), "--output", str(tmp_path / "absent" / "f")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: cannot write to '")


@pytest.mark.parametrize("text", ["{}", "no json", '{"identity": 1, "benchmark": "quiz"}'])
def test_a_config_that_does_not_say_what_was_run_is_bad_input(fakes, leaderboard, tmp_path, text):
    [result] = run(tmp_path)
    (result.folder / "config.json").write_text(text)
    result, output = submit(tmp_path)
    assert result.exit_code == 2
    assert "config.json' does not say what was run: restore it, or" in result.stderr
    assert not output.exists()
