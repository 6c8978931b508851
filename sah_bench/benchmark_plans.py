"""The benchmarks of an experiment: which ones, with which parameters and tasks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from sah_core import registry
from sah_core.errors import PipelineSyntaxError, nearest_names, short_repr

from .values import Place, Values, distinct

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark


@attrs.frozen(kw_only=True)
class BenchmarkPlan:
    """A benchmark and the tasks of it that are to run."""

    benchmark: Benchmark
    tasks: tuple[str, ...]

    def by_task(self) -> Iterator[tuple[str, BenchmarkPlan]]:
        """Yield each task with the benchmark for it alone."""
        for task in self.tasks:
            yield task, BenchmarkPlan(benchmark=self.benchmark.for_task(task), tasks=(task,))


def benchmark_plans(values: Values, settings: Sequence[str]) -> tuple[BenchmarkPlan, ...]:
    """The benchmarks of an experiment, with their tasks; their data must be there.

    Raises:
        ExperimentError: Naming the place that is wrong.
    """
    found = []
    overrides = _overrides(settings)
    unused = dict.fromkeys(overrides)
    folder = values.text("data_dir")
    for value, place in values.needed("benchmarks", "benchmark"):
        name, parameters = benchmark_call(value, place)
        if name in overrides:
            unused.pop(name, None)
            _check_overrides(name, overrides[name])
            parameters |= overrides[name]
        if folder is not None:
            with place.naming_errors():
                _set_data_dir(name, parameters, folder)
        found.append((_plan(name, parameters, place), place))
    for name in unused:
        raise Place("--set").error(f"the experiment has no benchmark named {name!r}.")
    plans = distinct(found, lambda plan: repr(plan.benchmark))
    places = [place for _, place in found]
    plans = _with_tasks(plans, list(values.items("tasks")))
    for plan, place in zip(plans, places, strict=True):
        for _, alone in plan.by_task():
            with place.naming_errors():
                alone.benchmark.revision()  # data that is not there is found missing now
    return plans


def _check_overrides(name: str, given: Mapping[str, Any]) -> None:
    """Find what is wrong with parameters of a benchmark where they stand: on the command line."""
    from sah_core.parameters import check_names, specs

    with Place("--set").naming_errors():
        benchmark = registry.benchmarks[name]
        own = {key: value for key, value in given.items() if key != "tasks"}
        check_names(benchmark, own)
        for spec in specs(benchmark):
            if spec.name in own:
                spec.convert(name, own[spec.name])


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
