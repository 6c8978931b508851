"""Checks of what a benchmark declares: tasks, parameters, the name of its data."""

from __future__ import annotations

import pickle

from sah_core.benchmark import Benchmark, Protocol, TaskInfo
from sah_core.errors import SahError
from sah_core.parameters import from_plain, to_plain
from sah_core.requests import TRUNCATIONS
from sah_core.testing.conformance import CheckSkipped

from .samples import (
    SEED,
    WordTokenizer,
    all_examples,
    fail,
    require_plain,
    tasks_of,
)


def check_declaration(benchmark: Benchmark) -> None:
    """Name, main score, protocol and tasks are declared, and the class says what it is."""
    cls = type(benchmark)
    if not (cls.__doc__ or "").strip():
        fail(benchmark, f"{cls.__name__} has no docstring: say what it asks")
    tasks = tasks_of(benchmark)
    if len(set(tasks)) < len(tasks):
        fail(benchmark, "tasks() names a task twice")
    for task in tasks:
        protocol = benchmark.protocol_for(task)
        if not isinstance(protocol, Protocol) or protocol.truncation not in TRUNCATIONS:
            fail(benchmark, f"protocol_for({task!r}) is no Protocol: {protocol!r}")
        require_plain(benchmark, f"generation_for({task!r})", dict(benchmark.generation_for(task)))


def check_task_info(benchmark: Benchmark) -> None:
    """What is declared of a task fits what its examples are."""
    known = 0
    for task, examples in all_examples(benchmark):
        info = benchmark.info(task)
        if info is None:
            continue
        known += 1
        if not isinstance(info, TaskInfo) or not info.metric:
            fail(benchmark, f"info({task!r}) names no metric: return a TaskInfo with one")
        if info.source is not None and not info.source.columns:
            fail(benchmark, f"the source of {task} names no columns")
        for example in examples:
            if example.max_new_tokens != info.max_new_tokens:
                fail(
                    benchmark,
                    f"{task} {example.id}: max_new_tokens is {example.max_new_tokens}, but "
                    f"info() says {info.max_new_tokens}",
                )
    if not known:
        raise CheckSkipped(f"{benchmark.name} declares nothing in info()")


def check_parameters_round_trip(benchmark: Benchmark) -> None:
    """Parameters survive the way to plain data and back, and a benchmark the way to a worker."""
    again = from_plain(type(benchmark), to_plain(benchmark))
    if to_plain(again) != to_plain(benchmark):
        fail(benchmark, f"parameters change on the way: {to_plain(benchmark)}, {to_plain(again)}")
    copy = pickle.loads(pickle.dumps(benchmark))
    if to_plain(copy) != to_plain(benchmark):
        fail(benchmark, "a pickled copy has other parameters")


def check_revision(benchmark: Benchmark) -> None:
    """The data has a name that is the same in a copy."""
    for task in tasks_of(benchmark):
        alone = benchmark.for_task(task)
        revision = alone.revision()
        if not isinstance(revision, str) or not revision:
            fail(benchmark, f"revision() is {revision!r}: expected a text")
        if pickle.loads(pickle.dumps(alone)).revision() != revision:
            fail(benchmark, f"{task}: a copy has another revision")


def check_unknown_task(benchmark: Benchmark) -> None:
    """A task that does not exist is bad input, not a fault."""
    if tasks_of(benchmark) == (benchmark.name,):
        raise CheckSkipped(f"{benchmark.name} has one task")
    try:
        next(iter(benchmark.examples("no-such-task", WordTokenizer(), SEED)), None)
    except SahError:
        return
    fail(benchmark, "examples() of an unknown task must raise ParameterError")
