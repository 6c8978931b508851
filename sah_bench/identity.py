"""What a cell is: everything that could change its numbers, and nothing that could not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from sah_core import registry
from sah_core.artifacts import content_hash
from sah_core.kind import Kind
from sah_core.masker import Masker
from sah_core.parameters import specs, to_plain
from sah_core.pipeline import Pipeline

from .benchmark_plans import BenchmarkPlan
from .experiment import Experiment

_FORMAT = 1
"""Changes whenever results of an older version would not be comparable."""

_NAMES = ("name", "model", "model_name")
"""What an adapter calls the name of a model, which may change while the model does not."""


def cell_identity(
    experiment: Experiment,
    plan: BenchmarkPlan,
    task: str,
    pipeline: Pipeline,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """The identity of a cell, as plain data.

    The limit on samples, the device and the versions of libraries are left out: the first adds
    samples to the same cell, the others are recorded beside it.

    Args:
        experiment: The experiment.
        plan: The benchmark.
        task: One of its tasks.
        pipeline: One of the pipelines.
        model: What the adapter says of the loaded model: hash of the weights, dtype.
    """
    benchmark = plan.benchmark
    places = {spec.name for spec in specs(type(benchmark)) if spec.location}
    return {
        "format": _FORMAT,
        "model": {key: value for key, value in model.items() if key not in _NAMES},
        "adapter": experiment.adapter,
        **_pipeline(pipeline),
        "backend": pipeline.backend,
        "benchmark": {
            "name": benchmark.name,
            "parameters": {k: v for k, v in to_plain(benchmark).items() if k not in places},
            "revision": benchmark.revision(),
        },
        "task": task,
        "protocol": benchmark.protocol_for(task).to_plain(),
        "seed": experiment.seed,
        "generation": {
            **benchmark.generation_for(task),
            **_generation(experiment),
            "max_new_tokens": experiment.max_new_tokens,
        },
        "max_context_length": experiment.max_context_length,
        "metrics": sorted(metric.text for metric in experiment.metrics),
        "plugins": plugin_versions(experiment, plan, pipeline),
    }


def _generation(experiment: Experiment) -> Mapping[str, Any]:
    """The generation options, with the content of the code that they name."""
    options = experiment.generation
    adapter = registry.adapters[experiment.adapter] if options else None
    identify = getattr(adapter, "generation_identity", None)
    return options if identify is None else identify(options)


def _pipeline(pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline's text with the content of its files in place of where they lie.

    Files that a step names otherwise than in a parameter of its own, such as those of a masker that
    it holds, come with their hashes beside it.
    """
    steps: list[Masker] = []
    others: dict[str, str] = {}
    for index, step in enumerate(pipeline.steps):
        hashes = {name: f"sha256:{content_hash(path)}" for name, path in step.artifacts().items()}
        own = {spec.name for spec in specs(type(step)) if spec.artifact}
        steps.append(attrs.evolve(step, **{n: h for n, h in hashes.items() if n in own}))
        others |= {f"{index}.{name}": h for name, h in hashes.items() if name not in own}
    text = attrs.evolve(pipeline, steps=tuple(steps)).text
    return {"pipeline": text, "artifacts": others} if others else {"pipeline": text}


def plugin_versions(
    experiment: Experiment, plan: BenchmarkPlan, pipeline: Pipeline
) -> dict[str, str]:
    """The origin of every plugin of a cell: distribution and version, or the hash of its source."""
    used: list[tuple[Kind[Any], str]] = [
        (registry.adapters, experiment.adapter),
        (registry.benchmarks, registry.benchmarks.name_of(type(plan.benchmark))),
        *((registry.metrics, metric.name) for metric in experiment.metrics),
        *((registry.maskers, registry.maskers.name_of(type(step))) for step in pipeline.steps),
    ]
    if pipeline.backend != "auto":
        used.append((registry.backends, pipeline.backend))
    return {f"{kind.singular}:{name}": _origin(kind, name) for kind, name in used}


def environment(experiment: Experiment, device: str) -> dict[str, Any]:
    """Where samples are made: recorded beside the results, no part of what a cell is."""
    libraries: dict[str, str | None] = {}
    for name in ("torch", "transformers"):
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            libraries[name] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "limit": experiment.limit,
        **libraries,
    }


def _origin(kind: Kind[Any], name: str) -> str:
    if name not in kind:
        return "unregistered"
    entry = kind.entry(name)
    if entry.version:
        return f"{entry.distribution} {entry.version}"
    return f"{entry.distribution} source {_source_hash(kind[name])}"


def _source_hash(plugin: Any) -> str:
    """The hash of the file in which a plugin is written; a plugin without a file has none."""
    try:
        file = inspect.getsourcefile(plugin)
    except TypeError:
        file = None
    if file is None or not Path(file).is_file():
        return "unknown"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
