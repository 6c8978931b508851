"""Conformance of benchmarks: every registered one passes, and each check catches what it is for."""

import functools
import itertools
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import attrs
import pytest

from sah_core import Benchmark, Example, Protocol, TaskInfo, param, registry
from sah_core.errors import ParameterError
from sah_core.testing import BENCHMARK_CHECKS, run_benchmark_checks
from sah_core.testing import benchmarks as module

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return functools.cache(
        lambda name: registry.benchmarks[name].example(tmp_path_factory.mktemp(name))
    )


@pytest.mark.parametrize("name", registry.benchmarks.names())
@pytest.mark.parametrize("check", BENCHMARK_CHECKS, ids=lambda check: check.__name__)
def test_the_example_of_every_registered_benchmark_conforms(check, name, example):
    check(example(name))


def test_every_check_of_the_modules_is_run():
    parts = [f"{module.__name__}.{part.name}" for part in pkgutil.iter_modules(module.__path__)]
    names = {n for part in parts for n in vars(import_module(part)) if n.startswith("check_")}
    assert {check.__name__ for check in BENCHMARK_CHECKS} == names
    assert all(check.__doc__ for check in BENCHMARK_CHECKS)


@attrs.frozen(kw_only=True)
class Good(Benchmark):
    """Repeat the word."""

    name: ClassVar[str] = "good"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=False)

    words: int = param(3, minimum=1, help="examples")

    def tasks(self):
        return ("one", "two")

    def info(self, task):
        return TaskInfo(metric="accuracy", max_new_tokens=4, length=20)

    def count(self, task):
        return self.words

    def examples(self, task, tokenizer, seed):
        if task not in self.tasks():
            raise ParameterError(self.name, "task", task, "one of one, two")
        for number in range(self.words):
            yield self.one(task, number, seed)

    def one(self, task, number, seed):
        return Example(
            id=f"{number}",
            context_id=f"{number // 2}",
            context=f"text {number // 2} ",
            question=f"word {number} of {seed}?",
            references=(f"w{number}",),
            max_new_tokens=4,
            task=task,
            facts={"number": number},
        )

    def score(self, example, prediction):
        return {"accuracy": 100.0 * (prediction == example.references[0])}


Good.__module__ = __name__


def changed(**changes):
    """An `one` whose example has other fields."""

    def one(self, task, number, seed):
        example = Good.one(self, task, number, seed)
        return attrs.evolve(example, **{k: v(number) for k, v in changes.items()})

    return {"one": one}


def returning(name, value):
    return {name: lambda self, *arguments: value}


counter = itertools.count()
NAN = float("nan")
BAD = {
    "check_declaration": [
        {"__doc__": None},
        returning("tasks", ("one", "one")),
        returning("tasks", ()),
        returning("protocol_for", None),
    ],
    "check_task_info": [
        changed(max_new_tokens=lambda n: 5),
        returning("info", TaskInfo(metric="", max_new_tokens=4)),
    ],
    "check_unique_ids": [
        changed(id=lambda n: "same"),
        changed(context_id=lambda n: "same"),
        changed(task=lambda n: "other"),
        returning("examples", iter(())),
    ],
    "check_reproducible": [changed(question=lambda n: f"{next(counter)}?")],
    "check_streaming": [
        {"examples": lambda self, *a: list(Good.examples(self, *a))},
        changed(question=lambda n: f"{next(counter)}?"),
    ],
    "check_positions": [
        returning("count", 2),
        {"examples_at": lambda self, t, k, s, i: iter(())},
    ],
    "check_prompts": [
        changed(question=lambda n: " "),
        changed(max_new_tokens=lambda n: 0),
        changed(facts=lambda n: {"pair": (1, 2)}),
    ],
    "check_references": [
        changed(references=lambda n: ()),
        changed(references=lambda n: (3,)),
    ],
    "check_token_limits": [
        changed(context=lambda n: "word " * 40),
        returning("info", TaskInfo(metric="accuracy", max_new_tokens=4, length=5)),
    ],
    "check_gold": [returning("score", {"accuracy": 99.0})],
    "check_empty": [returning("score", {"accuracy": 100.0})],
    "check_score_range": [
        returning("score", {"accuracy": NAN}),
        returning("score", {"accuracy": 100.0, "other": -1.0}),
        returning("score", {"other": 0.0}),
    ],
    "check_score_without_context": [
        {"score": lambda self, e, p: {"accuracy": 100.0 * (p in e.context)}}
    ],
    "check_aggregate": [
        {"aggregate": lambda self, s: {**Benchmark.aggregate(self, s), "x": NAN}},
        {"aggregate": lambda self, s: {**Benchmark.aggregate(self, s), "n": 0}},
        returning("summary", {"x": NAN}),
    ],
    "check_follow_up": [{"follow_up": lambda self, example, prediction: example}],
    "check_revision": [
        returning("revision", ""),
        {"revision": lambda self: str(next(counter))},
    ],
    "check_unknown_task": [
        {"examples": lambda self, t, k, s: iter(Good.one(self, t, n, s) for n in range(3))}
    ],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in BAD.items() for change in changes]
)
def test_a_check_catches_what_it_is_for(name, change):
    made = type("Bad", (Good,), {"__module__": __name__, "__doc__": "Bad.", **change})
    globals()["Bad"] = made  # where a pickled instance is looked for
    with pytest.raises(AssertionError, match="good: "):
        getattr(module, name)(made())


def test_a_good_benchmark_passes_every_check():
    assert [result for result in run_benchmark_checks(Good()) if not result.passed] == []


def test_a_listed_reason_takes_a_check_away():
    class Odd(Good):
        """Never right."""

        exceptions: ClassVar = {"*/gold": "the official scorer can never be satisfied"}

        def score(self, example, prediction):
            return {"accuracy": 0.0}

    module.check_gold(Odd())


def test_what_a_benchmark_raises_fails_the_check():
    class Raising(Good):
        """Raises."""

        def score(self, example, prediction):
            raise KeyError("x")

    failed = {result.name for result in run_benchmark_checks(Raising()) if result.failed}
    assert {"gold", "empty", "score_range"} <= failed


def test_the_benchmark_of_the_documentation_conforms():
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    [source] = re.findall(r"```python\n(import attrs\n.*?)```", page.read_text(), re.S)
    namespace = {"__name__": __name__}
    exec(source, namespace)
    globals()["Capitals"] = namespace["Capitals"]  # where a pickled instance is looked for
    results = run_benchmark_checks(namespace["sah_benchmark"]()())
    assert [result for result in results if result.failed] == []
