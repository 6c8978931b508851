"""Experiments: what to run, read from a YAML file and flags and checked before anything is loaded.

models: [smollm2-135m]
pipelines:
  - dense
  - {name: streaming, steps: "sink(128) | local(128)"}
benchmarks:
  - niah: {lengths: [4096], samples: 3}
limit: 20
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from sah_core import registry
from sah_core.errors import (
    OutputFolderError,
    short_repr,
)

from .benchmark_plans import BenchmarkPlan, benchmark_plans
from .values import Values, distinct

if TYPE_CHECKING:
    from sah_core.metric import MetricCall
    from sah_core.pipeline import Pipeline

KEYS = {
    "models": "--model",
    "pipelines": "--pipeline",
    "benchmarks": "--benchmark",
    "tasks": "--task",
    "data_dir": "--data-dir",
    "limit": "--limit",
    "max_context_length": "--max-context-length",
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
    "dtype": "--dtype",
    "device": "--device",
    "backend": "--backend",
    "output": "--output",
    "generation": None,
    "metrics": "--metric",
    "timed_samples": "--timed-samples",
    "adapter": "--adapter",
}
"""The keys of an experiment file, and the flag that says the same."""

TIMED_SAMPLES = 8
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@attrs.frozen(kw_only=True)
class Experiment:
    """Everything that a run needs to know, resolved.

    Attributes:
        models: Names of models, as an adapter takes them.
        pipelines: The pipelines, all different.
        benchmarks: The benchmarks with their tasks.
        adapter: Registered name of the adapter.
        metrics: The observers whose results are kept per sample.
        timed_samples: Samples per cell that are answered once more without observers, since seconds
            come from such passes only; without metrics every pass is one.
        seed: Seed of the examples, and of sampled generation.
        limit: The most examples per task; None for all.
        max_context_length: The most tokens of a prompt; a longer one is cut as the benchmark says.
        max_new_tokens: Replaces what the benchmark prescribes; None leaves it.
        dtype: Of the weights; None leaves it to the adapter.
        device: Where the model runs; None leaves it to the adapter.
        generation: Further generation arguments of the adapter.
        output: The folder of the results.
    """

    models: tuple[str, ...]
    pipelines: tuple[Pipeline, ...]
    benchmarks: tuple[BenchmarkPlan, ...]
    adapter: str = "hf"
    metrics: tuple[MetricCall, ...] = ()
    timed_samples: int = TIMED_SAMPLES
    seed: int = 0
    limit: int | None = None
    max_context_length: int | None = None
    max_new_tokens: int | None = None
    dtype: str | None = None
    device: str | None = None
    generation: Mapping[str, Any] = attrs.field(factory=dict)
    output: Path = Path("results")


def resolve(
    document: Mapping[str, Any] | None = None,
    *,
    path: str = "",
    flags: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    check_output: bool = True,
) -> Experiment:
    """Check an experiment as a whole, so that mistakes cost no time.

    Args:
        document: The plain data of an experiment file.
        path: Its name in errors.
        flags: Values by key that replace those of the document.
        settings: Texts ``benchmark.parameter=value`` that replace parameters of benchmarks.
        check_output: Make sure that the output folder can be written.

    Raises:
        ExperimentError: Naming the file and the place in it, or the flag.
        OutputFolderError: The output folder cannot be written.
    """
    values = Values(document or {}, path, flags or {}, KEYS)
    values.check_keys()
    pipelines = _pipelines(values)
    timed = values.number("timed_samples", minimum=0)
    adapter = _plugin_name(values, "adapter", registry.adapters, "hf")
    experiment = Experiment(
        models=_models(values),
        pipelines=pipelines,
        benchmarks=benchmark_plans(values, settings),
        adapter=adapter,
        metrics=_metrics(values),
        timed_samples=TIMED_SAMPLES if timed is None else timed,
        seed=values.number("seed", minimum=0) or 0,
        limit=values.number("limit", minimum=1),
        max_context_length=values.number("max_context_length", minimum=1),
        max_new_tokens=values.number("max_new_tokens", minimum=1),
        dtype=_dtype(values),
        device=values.text("device"),
        generation=_generation(values, adapter),
        output=Path(values.text("output") or "results").expanduser(),
    )
    if check_output:
        check_folder(experiment.output)
    return experiment


def check_folder(folder: Path) -> None:
    """Make a folder and write into it once.

    Raises:
        OutputFolderError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".probe-")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise OutputFolderError(str(folder), error.strerror or str(error)) from error


def _models(values: Values) -> tuple[str, ...]:
    names = []
    for value, place in values.needed("models", "model"):
        if not isinstance(value, str) or not value:
            raise place.error(f"{short_repr(value)} is not allowed: expected the name of a model.")
        if any(value in (entry.name, entry.id) for entry in registry.models.entries()):
            with place.naming_errors():
                registry.models[value]()  # an alias finds its files now or not at all
        names.append((value, place))
    return distinct(names, lambda name: name)


def _pipelines(values: Values) -> tuple[Pipeline, ...]:
    from sah_core.pipeline import Pipeline

    backend = _plugin_name(values, "backend", registry.backends, "auto")
    found = []
    for value, place in values.needed("pipelines", "pipeline"):
        with place.naming_errors():
            pipeline = Pipeline.parse(value)
            pipeline.check_artifacts()
        if pipeline.name is not None and not isinstance(pipeline.name, str):
            raise place.at("name").error(
                f"{short_repr(pipeline.name)} is not allowed: expected a text."
            )
        label = " ".join(value.split()) if isinstance(value, str) else None
        if not pipeline.is_dense and pipeline.backend == "auto" and backend != "auto":
            pipeline, label = attrs.evolve(pipeline, backend=backend), None
        if pipeline.name is None and label is not None:
            pipeline = attrs.evolve(pipeline, name=label)  # tables show it as it was written
        found.append((pipeline, place))
    named = [(p, place) for p, place in found if p.name is not None]
    distinct(named, lambda pipeline: str(pipeline.name))
    return distinct(found, lambda pipeline: pipeline.text)


def _metrics(values: Values) -> tuple[MetricCall, ...]:
    from sah_core.metric import MetricCall

    value, _ = values.get("metrics")
    if value is None:
        return (MetricCall("density"),) if "density" in registry.metrics else ()
    found = []
    for source, place in values.items("metrics"):
        with place.naming_errors():
            found.append((MetricCall.parse(source), place))
    return distinct(found, lambda metric: metric.name)


def _plugin_name(values: Values, key: str, kind: Any, default: str) -> str:
    name, place = values.get(key)
    if name is None or name == default:
        return default
    if not isinstance(name, str):
        raise place.error(
            f"{short_repr(name)} is not allowed: expected the name of a {kind.singular}."
        )
    with place.naming_errors():
        kind.entry(name)
    return name


def _dtype(values: Values) -> str | None:
    dtype = values.text("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise values.get("dtype")[1].error(
            f"{dtype!r} is not allowed: expected one of {', '.join(DTYPES)}."
        )
    return dtype


def _generation(values: Values, adapter: str) -> dict[str, Any]:
    value, place = values.get("generation")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise place.error(
            f"{short_repr(value)} is not allowed: expected a mapping of generation arguments."
        )
    named = registry.adapters[adapter] if value else None
    spread = getattr(named, "plain_generation", None)
    if spread is not None:
        # a file that is named may change: what it says is part of what a result is
        with place.naming_errors():
            value = spread(value)
    for name in ("max_new_tokens", "max_length"):
        if name in value:
            hint = "write max_new_tokens beside 'generation'"
            raise place.error(f"{name} does not stand here: {hint}.")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise place.error(f"the values must be plain data: {error}.") from error
    check = getattr(named, "check_generation", None)
    if check is not None:
        with place.naming_errors():
            check(value)
    return dict(value)
