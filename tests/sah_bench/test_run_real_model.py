"""`sah-bench run` on the real model, from the command line to the table."""

import json

import pytest
from click.testing import CliRunner

from sah_bench.cli import main

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("real_model")
def test_needles_are_found_densely_and_by_the_oracle_but_not_in_a_window(tmp_path):
    pipelines = ["dense", "sink(32) | local(32)", "sink(32) | local(32) | oracle-top-k(0.1)"]
    options = [word for pipeline in pipelines for word in ("--pipeline", pipeline)]
    benchmark = "niah(lengths=[1024], depths=[40], needles=2, questions=2, max_new_tokens=12)"
    options += ["--benchmark", benchmark, "--model", "smollm2-135m", "--no-progress"]
    result = CliRunner().invoke(main, ["run", *options, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = {}
    for path in tmp_path.rglob("metrics.json"):
        config = json.loads((path.parent / "config.json").read_text())
        found[config["label"]] = json.loads(path.read_text())
    dense, window, oracle = (found[pipeline] for pipeline in pipelines)
    scores = [metrics["scores"]["accuracy"] for metrics in (dense, window, oracle)]
    assert scores == [100.0, 0.0, 100.0]
    densities = [m["micro_metrics"]["density"]["density"] for m in (dense, window, oracle)]
    assert densities[0] == 1.0
    assert 0.05 < densities[1] < 0.08
    assert 0.14 < densities[2] < 0.18
    assert [metrics["saving"] for metrics in (dense, window, oracle)] == [
        "none",
        "realised",
        "realised",
    ]
    timings = [path.read_text().splitlines()[0] for path in tmp_path.rglob("timings.jsonl")]
    assert len({json.loads(line)["prefill"] for line in timings}) == 1
