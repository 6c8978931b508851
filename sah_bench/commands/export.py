"""``sah-bench export``: predictions of a finished run in the form that a leaderboard takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options import debug_option, plugin_option


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option("--output", required=True, metavar="FILE", help="The file to write.")
@plugin_option
@debug_option
def export(results: tuple[str, ...], output: str) -> None:
    """Write the predictions of a finished run as the benchmark's leaderboard takes them.

    RESULTS are folders that a run wrote, of one model, pipeline and benchmark: all of its tasks,
    with all their examples. The form of the file is the benchmark's.
    """
    from sah_core import registry
    from sah_core.errors import OutputFolderError, RequestError
    from sah_core.parameters import from_plain

    from ..json_files import read_rows
    from ..rescoring import cell_folders, config_of
    from ..store import SAMPLES

    predictions: dict[str, dict[str, str]] = {}
    subjects: dict[str, dict[str, Any]] = {}
    for folder in cell_folders(results):
        config = config_of(folder)
        identity = config["identity"]["benchmark"]
        pipeline = config.get("label", config.get("pipeline"))
        subjects[f"{config.get('model')}, {config['benchmark']}, {pipeline}"] = identity
        task = str(config["task"])
        _check_complete(folder, f"{config['benchmark']} {task}")
        if task in predictions and len(subjects) == 1:
            raise RequestError(f"{task} is there twice, under other settings: name one of the runs")
        rows = read_rows(folder / SAMPLES)
        predictions[task] = {str(row["id"]): str(row["prediction"]) for row in rows}
    if len(subjects) > 1:
        raise RequestError(
            f"these are results of {len(subjects)}: {'; '.join(sorted(subjects))}. a submission is "
            "of one model, benchmark and pipeline: name their folders alone"
        )
    [identity] = subjects.values()
    benchmark = from_plain(registry.benchmarks[identity["name"]], identity["parameters"])
    text = benchmark.submission(predictions)
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputFolderError(output, error.strerror or str(error)) from error
    counts = ", ".join(f"{task} {len(answers)}" for task, answers in predictions.items())
    click.echo(f"predictions written to {output}: {counts}.")


def _check_complete(folder: Path, task: str) -> None:
    from sah_core.errors import RequestError

    from ..json_files import read_json
    from ..store import METRICS

    metrics = read_json(folder / METRICS)
    if metrics is None or not metrics.get("complete"):
        state = "is not finished" if metrics is None else "has a part of its examples"
        raise RequestError(f"{task} {state} ({folder}): run it again, without --limit")
