"""What an experiment would run, and what of it lies in the results already; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from .experiment import Experiment
from .identity import cell_identity
from .json_files import count_lines, read_json
from .store import ERROR, METRICS, SAMPLES, canonical, configs


@attrs.frozen(kw_only=True)
class PlannedCell:
    """One cell of an experiment before it runs.

    Attributes:
        model: Name of the model.
        benchmark: Name of the benchmark.
        task: Name of the task.
        pipeline: The pipeline's label.
        state: What its folder holds, in words.
        is_done: Nothing is left to do.
    """

    model: str
    benchmark: str
    task: str
    pipeline: str
    state: str
    is_done: bool


def planned_cells(experiment: Experiment) -> list[PlannedCell]:
    """All cells of an experiment.

    The hash of the weights and the dtype are part of what a cell is but are known only once a model
    is loaded, so here a cell is found by the name of its model in their place; of several that fit,
    the fullest counts.
    """
    found: dict[str, list[Path]] = {}
    for folder, config in configs(experiment.output):
        key = _key(config.get("model"), config.get("identity", {}))
        found.setdefault(key, []).append(folder)
    cells = []
    for model in experiment.models:
        for benchmark in experiment.benchmarks:
            for task, plan in benchmark.by_task():
                for pipeline in experiment.pipelines:
                    identity = cell_identity(experiment, plan, task, pipeline, {})
                    folders = found.get(_key(model, identity), [])
                    state, is_done = _state(folders, experiment.limit)
                    cells.append(
                        PlannedCell(
                            model=model,
                            benchmark=plan.benchmark.name,
                            task=task,
                            pipeline=pipeline.label,
                            state=state.ljust(20),
                            is_done=is_done,
                        )
                    )
    return cells


def _key(model: Any, identity: dict[str, Any]) -> str:
    return canonical([model, {**identity, "model": None}])


def _state(folders: list[Path], limit: int | None) -> tuple[str, bool]:
    if not folders:
        return "new", False
    folder = max(folders, key=lambda folder: count_lines(folder / SAMPLES))
    count = count_lines(folder / SAMPLES)
    metrics = read_json(folder / METRICS)
    enough = limit is not None and count >= limit
    if metrics is not None and (enough or metrics.get("complete")):
        return f"done, {count} samples", True
    word = "failed" if (folder / ERROR).exists() else "begun"
    return f"{word}, {count} samples", False
