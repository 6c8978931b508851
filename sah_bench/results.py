"""What a finished cell says: its metrics, and the row that a table shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from sah_core import registry
from sah_core.benchmark import Benchmark, ScoredExample, mean
from sah_core.parameters import specs, to_plain
from sah_core.pipeline import Pipeline

from .benchmark_plans import BenchmarkPlan
from .experiment import Experiment
from .store import Cell, canonical

Status = Literal["done", "failed"]

PERCENT = "%"
"""The unit of a score for which a benchmark declares none."""


@attrs.frozen(kw_only=True)
class CellResult:
    """How one cell of an experiment came out.

    Attributes:
        model: Name of the model.
        benchmark: Name of the benchmark.
        task: Name of the task.
        pipeline: The pipeline's label.
        status: ``done`` or ``failed``.
        samples: How many samples it has.
        main_score: Name of the score that tables show.
        score: That score; None if there is none.
        unit: Of that score: ``%``, unless the benchmark declares another.
        density: Selected over allowed keys; None if it was not observed.
        observed: Means of the other metrics, by name; of those that have one.
        prefill_seconds: Mean over contexts of the time to prefill one, without observers.
        decode_seconds: Mean over the timed samples of the time for question and answer, without
            observers.
        timed: Samples that were timed.
        differing: Timed samples whose timed answer is not the observed one.
        saving: ``none``, ``simulated`` or ``realised``.
        message: Why it failed, on one line.
        bad_input: It failed for what was asked, not for a fault.
        folder: Where it lies.
        metrics: The content of metrics.json.
        setting: The benchmark's parameters, as text, but for the choice of tasks: only results of
            one setting make a summary.
    """

    model: str
    benchmark: str
    task: str
    pipeline: str
    status: Status
    samples: int
    main_score: str
    score: float | None = None
    unit: str = PERCENT
    density: float | None = None
    observed: Mapping[str, float] = attrs.field(factory=dict)
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    timed: int = 0
    differing: int = 0
    saving: str = "none"
    message: str = ""
    bad_input: bool = False
    folder: Path
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    setting: str = ""


def metrics_of(
    cell: Cell,
    experiment: Experiment,
    plan: BenchmarkPlan,
    task: str,
    pipeline: Pipeline,
    *,
    complete: bool,
) -> dict[str, Any]:
    """The content of metrics.json, from the samples that are kept.

    Args:
        cell: The cell.
        experiment: The experiment.
        plan: The benchmark.
        task: The task.
        pipeline: The pipeline.
        complete: Whether the task has no more examples than these.
    """
    scored = [
        ScoredExample(id=row["id"], task=task, scores=row["scores"], facts=row["facts"])
        for row in cell.records
    ]
    backends = sorted({name for row in cell.micro for name in row["backends"]})
    return {
        **plan.benchmark.aggregate(scored),
        "main_score": plan.benchmark.main_score,
        "metric": metric_name(plan.benchmark, task),
        "complete": complete,
        "micro_metrics": {
            metric.name: combine(
                registry.metrics[metric.name], [row["metrics"][metric.name] for row in cell.micro]
            )
            for metric in experiment.metrics
        },
        "backends": backends,
        "overflow_rows": sum(row.get("overflow_rows", 0) for row in cell.micro),
        "saving": saving(pipeline, backends),
        "protocol": {
            **plan.benchmark.protocol_for(task).to_plain(),
            "sparse_phases": [] if pipeline.is_dense else sorted(pipeline.phases),
            "max_context_length": experiment.max_context_length,
            "max_new_tokens": experiment.max_new_tokens,
        },
    }


def metric_name(benchmark: Benchmark, task: str) -> str:
    """What the main score of a task is, by the name of its metric."""
    info = benchmark.info(task)
    return benchmark.main_score if info is None else info.metric


def summaries(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Figures over the tasks of each benchmark, model and pipeline, from finished cells."""
    groups: dict[tuple[str, str, str, str], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        if result.status == "done":
            key = (result.model, result.benchmark, result.setting, result.pipeline)
            groups.setdefault(key, {})[result.task] = result.metrics
    found = []
    for (model, benchmark, _, pipeline), tasks in groups.items():
        kind = registry.benchmarks[benchmark]
        figures = {
            name: {"value": value, "unit": kind.units.get(name, PERCENT)}
            for name, value in kind.summary(tasks).items()
        }
        if figures:
            found.append(
                {"model": model, "benchmark": benchmark, "pipeline": pipeline, "figures": figures}
            )
    return found


def setting_of(benchmark: Benchmark) -> str:
    """The parameters of a benchmark as text, without those that only choose among tasks."""
    chosen = {spec.name for spec in specs(type(benchmark)) if spec.selects}
    plain = to_plain(benchmark)
    return canonical({name: value for name, value in plain.items() if name not in chosen})


def combine(metric: Any, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a metric over all samples.

    A metric class may say how, in ``combine(results) -> dict``; otherwise numbers are averaged.
    """
    own = getattr(metric, "combine", None)
    if own is not None:
        return dict(own(results))
    names = dict.fromkeys(name for result in results for name in result)
    numbers = {name: [r[name] for r in results if _is_number(r.get(name))] for name in names}
    return {name: mean(values) for name, values in numbers.items() if values}


def saving(pipeline: Pipeline, backends: Sequence[str]) -> str:
    """Whether unselected keys were really not read: ``none``, ``simulated`` or ``realised``."""
    if pipeline.is_dense or not backends:
        return "none"
    known = [registry.backends[name].realised for name in backends if name in registry.backends]
    return "realised" if known and all(known) else "simulated"


def result_of(
    cell: Cell,
    model: str,
    plan: BenchmarkPlan,
    task: str,
    pipeline: Pipeline,
    error: Mapping[str, Any] | None,
) -> CellResult:
    """The row of a cell, from what its folder holds."""
    metrics = cell.metrics or {}
    main_score = plan.benchmark.main_score
    observed = metrics.get("micro_metrics", {})
    contexts = {
        row["context_id"]: timing["prefill"]
        for row, timing in zip(cell.records, cell.timings, strict=False)
        if timing["prefill"] is not None
    }
    timed = [timing for timing in cell.timings if timing["decode"] is not None]
    return CellResult(
        model=model,
        benchmark=plan.benchmark.name,
        task=task,
        pipeline=pipeline.label,
        status="failed" if error is not None else "done",
        samples=len(cell.records),
        main_score=main_score,
        unit=plan.benchmark.units.get(main_score, PERCENT),
        score=metrics.get("scores", {}).get(main_score),
        density=observed.get("density", {}).get("density"),
        observed={
            name: result["mean"]
            for name, result in observed.items()
            if _is_number(result.get("mean"))
        },
        prefill_seconds=mean(contexts.values()),
        decode_seconds=mean(timing["decode"] for timing in timed),
        timed=len(timed),
        differing=sum(timing.get("same_tokens") is False for timing in timed),
        saving=metrics.get("saving", "none"),
        message="" if error is None else str(error.get("message", "")),
        bad_input=error is not None and error.get("kind") == "input",
        folder=cell.folder,
        metrics=metrics,
        setting=setting_of(plan.benchmark),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
