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

import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from sah_core import registry
from sah_core.errors import (
    ExperimentError,
    OutputFolderError,
    PipelineSyntaxError,
    nearest_names,
    short_repr,
)

from .values import Place, Values, distinct

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark
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
class BenchmarkPlan:
    """A benchmark and the tasks of it that are to run."""

    benchmark: Benchmark
    tasks: tuple[str, ...]

    def by_task(self) -> Iterator[tuple[str, BenchmarkPlan]]:
        """Yield each task with the benchmark for it alone."""
        for task in self.tasks:
            yield task, BenchmarkPlan(benchmark=self.benchmark.for_task(task), tasks=(task,))


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


def load_document(path: str | Path) -> dict[str, Any]:
    """Read an experiment file as plain data.

    Raises:
        ExperimentError: There is no such file, it is no YAML, or no mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExperimentError(str(path), "", f"cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ExperimentError(str(path), where, f"not valid YAML: {problem}") from error
    if not isinstance(document, dict):
        raise ExperimentError(
            str(path), "", f"an experiment is a mapping with keys such as {', '.join([*KEYS][:3])}"
        )
    return document


def _refuse_repeated_keys(root: Any) -> None:
    """Raise for a key that stands twice in a mapping: the loader would keep the last one."""
    import yaml

    waiting, visited = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in visited:  # an alias, perhaps of what it stands in
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    problem = f"key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))


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
        benchmarks=_benchmarks(values, settings),
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


def _benchmarks(values: Values, settings: Sequence[str]) -> tuple[BenchmarkPlan, ...]:
    found = []
    overrides = _overrides(settings)
    folder = values.text("data_dir")
    for value, place in values.needed("benchmarks", "benchmark"):
        name, parameters = benchmark_call(value, place)
        parameters |= overrides.pop(name, {})
        if folder is not None:
            with place.naming_errors():
                _set_data_dir(name, parameters, folder)
        found.append((_plan(name, parameters, place), place))
    for name in overrides:
        raise Place("--set").error(f"the experiment has no benchmark named {name!r}.")
    plans = distinct(found, lambda plan: repr(plan.benchmark))
    places = [place for _, place in found]
    plans = _with_tasks(plans, list(values.items("tasks")))
    for plan, place in zip(plans, places, strict=True):
        for _, alone in plan.by_task():
            with place.naming_errors():
                alone.benchmark.revision()  # data that is not there is found missing now
    return plans


def _set_data_dir(name: str, parameters: dict[str, Any], folder: str) -> None:
    """Give a benchmark the common folder of data, if it reads one and has none of its own."""
    from sah_core.parameters import specs

    if any(spec.name == "data_dir" for spec in specs(registry.benchmarks[name])):
        parameters.setdefault("data_dir", folder)


def benchmark_call(value: Any, place: Place) -> tuple[str, dict[str, Any]]:
    """The name and the parameters that a text such as ``niah(samples=2)`` or a mapping means."""
    if isinstance(value, str):
        return _parse_call(value, place)
    if isinstance(value, dict) and len(value) == 1:
        [(name, parameters)] = value.items()
        if isinstance(name, str) and isinstance(parameters, dict | None):
            return name, dict(parameters or {})
    raise place.error(
        f"{short_repr(value)} is no benchmark: expected a name, a text such as 'niah(samples=2)', "
        "or a mapping such as {niah: {samples: 2}}."
    )


def _parse_call(text: str, place: Place) -> tuple[str, dict[str, Any]]:
    from sah_core.pipeline_text import parse_text

    try:
        parsed = parse_text(text)
    except PipelineSyntaxError as error:
        raise place.error(
            f"benchmark {short_repr(text)}: found {error.found} at column {error.position + 1}, "
            f"expected {error.expected}."
        ) from error
    step = parsed.steps[0]
    if len(parsed.steps) > 1 or parsed.options or step.positional is not attrs.NOTHING:
        raise place.error(
            f"{short_repr(text)} is no benchmark: expected a name, with parameters by name if any, "
            "such as 'niah(lengths=[1024], samples=2)'."
        )
    return step.name, dict(step.arguments)


def _plan(name: str, parameters: dict[str, Any], place: Place) -> BenchmarkPlan:
    from sah_core.parameters import from_plain

    asked = parameters.pop("tasks", None)
    with place.naming_errors():
        benchmark = from_plain(registry.benchmarks[name], parameters)
        known = benchmark.tasks()
    if asked is None:
        return BenchmarkPlan(benchmark=benchmark, tasks=known)
    asked = asked if isinstance(asked, list) else [asked]
    tasks = [task for one in asked for task in _known_tasks(one, known, place.at(name).at("tasks"))]
    return BenchmarkPlan(benchmark=benchmark, tasks=tuple(dict.fromkeys(tasks)))


def _known_tasks(task: Any, known: Sequence[str], place: Place) -> list[str]:
    """The tasks that a name or a pattern such as ``niah_*`` means."""
    if str(task) in known:
        return [str(task)]
    matching = fnmatch.filter(known, str(task))
    if matching:
        return matching
    if any(sign in str(task) for sign in "*?["):
        raise place.error(f"no task fits {str(task)!r}. the tasks are {', '.join(known)}.")
    nearest = nearest_names(str(task), known)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise place.error(f"no task named {str(task)!r}. {hint}the tasks are {', '.join(known)}.")


def _with_tasks(
    plans: tuple[BenchmarkPlan, ...], asked: list[tuple[Any, Place]]
) -> tuple[BenchmarkPlan, ...]:
    """Restrict the benchmarks to the tasks that were asked for, if any were."""
    if not asked:
        return plans
    offered = list(dict.fromkeys(task for plan in plans for task in plan.tasks))
    wanted = {name for task, place in asked for name in _known_tasks(task, offered, place)}
    chosen = []
    for plan in plans:
        tasks = tuple(task for task in plan.tasks if task in wanted)
        if not tasks:
            raise asked[0][1].error(f"benchmark {plan.benchmark.name!r} has none of these tasks.")
        chosen.append(attrs.evolve(plan, tasks=tasks))
    return tuple(chosen)


def _overrides(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameters by benchmark from texts such as ``niah.samples=2``; the values are YAML."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        benchmark, dot, parameter = target.strip().rpartition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not (equals and dot and benchmark and parameter):
            raise Place("--set").error(
                f"{short_repr(setting)} is not allowed: expected benchmark.parameter=value, "
                "such as niah.samples=2."
            )
        found.setdefault(benchmark, {})[parameter] = value
    return found


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
    if "max_new_tokens" in value:
        raise place.error("max_new_tokens does not stand here: write it beside 'generation'.")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise place.error(f"the values must be plain data: {error}.") from error
    check = getattr(registry.adapters[adapter], "check_generation", None) if value else None
    if check is not None:
        with place.naming_errors():
            check(value)
    return dict(value)
