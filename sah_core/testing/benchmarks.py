"""Conformance checks of benchmarks: what every one must do, whatever it asks.

Each check is a function of a benchmark that raises `AssertionError`, saying what is wrong and what
to change, or `CheckSkipped`, saying why it cannot apply. A plugin's test suite runs them all on a
small instance:

    @pytest.mark.parametrize("check", BENCHMARK_CHECKS)
    def test_conformance(check, tmp_path):
        check(MyBenchmark.example(tmp_path))
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import attrs

from sah_core.benchmark import Benchmark, Example, Protocol, ScoredExample, TaskInfo
from sah_core.errors import MissingLibraryError, SahError
from sah_core.parameters import from_plain, to_plain
from sah_core.requests import TRUNCATIONS, Likelihood

from .conformance import CheckResult, CheckSkipped, run_checks

SEED = 7
MOST_EXAMPLES = 200
"""How many examples of a task the checks look at."""

TOLERANCE = 1e-3
"""Of a score: ROUGE of identical texts is a little below 100 in the package that computes it."""

PREDICTIONS = (
    "",
    " ",
    "no",
    "\n\nThe answer is (A) 1, 2.\n",
    "```\nx\n```",
    "{",
    "你好。",
    "7" * 50,
)
_MOST_TURNS = 8

BenchmarkCheck = Callable[[Benchmark], None]


class WordTokenizer:
    """A tokenizer of words and signs, for checks without a model."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return a token per word and sign."""
        found = re.findall(r"\w+|[^\w\s]", text)
        return {"input_ids": [zlib.crc32(token.encode()) for token in found]}


def run_benchmark_checks(
    benchmark: Benchmark, checks: Iterable[BenchmarkCheck] | None = None
) -> list[CheckResult]:
    """Run the checks over a benchmark, all of them by default.

    Whatever a benchmark raises fails the check during which it did.
    """
    chosen: Any = BENCHMARK_CHECKS if checks is None else checks
    subject: Any = benchmark
    return run_checks(subject, chosen)


def _tasks(benchmark: Benchmark) -> tuple[str, ...]:
    tasks = tuple(benchmark.tasks())
    if not tasks:
        _fail(benchmark, "tasks() names none: name at least one")
    return tasks


def _examples(benchmark: Benchmark, task: str) -> list[Example]:
    """The first examples of a task, made anew."""
    made = []
    for example in benchmark.examples(task, WordTokenizer(), SEED):
        made.append(example)
        if len(made) == MOST_EXAMPLES:
            break
    return made


def _all_examples(benchmark: Benchmark) -> Iterator[tuple[str, list[Example]]]:
    for task in _tasks(benchmark):
        yield task, _examples(benchmark, task)


def _bytes(examples: Iterable[Example]) -> bytes:
    return b"\n".join(
        json.dumps(attrs.asdict(example), sort_keys=True, ensure_ascii=False).encode()
        for example in examples
    )


def _fail(benchmark: Benchmark, message: str) -> NoReturn:
    raise AssertionError(f"{benchmark.name}: {message}")


def _check_plain(benchmark: Benchmark, what: str, value: object) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        _fail(benchmark, f"{what} is no plain data ({error}): use None for what has no value")


def _excepted(benchmark: Benchmark, task: str, what: str) -> bool:
    return f"{task}/{what}" in benchmark.exceptions or f"*/{what}" in benchmark.exceptions


def _scores(benchmark: Benchmark, example: Example, prediction: str | None) -> dict[str, float]:
    """The scores of an answer; None is the right one.

    A text that is predicted in place of an answer is predicted right for the right one, else wrong.
    """
    try:
        if example.predicted is not None:
            return benchmark.score_text(example, _likelihood(prediction is None))
        answer = benchmark.gold(example) if prediction is None else prediction
        return benchmark.score(example, answer)
    except MissingLibraryError as error:
        raise CheckSkipped(str(error)) from error


def _likelihood(correct: bool) -> Likelihood:
    return Likelihood(
        token_ids=(1, 2, 3),
        losses=(0.25,) * 3,
        correct=(correct,) * 3,
        context_tokens=4,
        seconds=1.0,
    )


def check_declaration(benchmark: Benchmark) -> None:
    """Name, main score, protocol and tasks are declared, and the class says what it is."""
    cls = type(benchmark)
    if not (cls.__doc__ or "").strip():
        _fail(benchmark, f"{cls.__name__} has no docstring: say what it asks")
    tasks = _tasks(benchmark)
    if len(set(tasks)) < len(tasks):
        _fail(benchmark, "tasks() names a task twice")
    for task in tasks:
        protocol = benchmark.protocol_for(task)
        if not isinstance(protocol, Protocol) or protocol.truncation not in TRUNCATIONS:
            _fail(benchmark, f"protocol_for({task!r}) is no Protocol: {protocol!r}")
        _check_plain(benchmark, f"generation_for({task!r})", dict(benchmark.generation_for(task)))


def check_task_info(benchmark: Benchmark) -> None:
    """What is declared of a task fits what its examples are."""
    known = 0
    for task, examples in _all_examples(benchmark):
        info = benchmark.info(task)
        if info is None:
            continue
        known += 1
        if not isinstance(info, TaskInfo) or not info.metric:
            _fail(benchmark, f"info({task!r}) names no metric: return a TaskInfo with one")
        if info.source is not None and not info.source.columns:
            _fail(benchmark, f"the source of {task} names no columns")
        for example in examples:
            if example.max_new_tokens != info.max_new_tokens:
                _fail(
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
        _fail(benchmark, f"parameters change on the way: {to_plain(benchmark)}, {to_plain(again)}")
    copy = pickle.loads(pickle.dumps(benchmark))
    if to_plain(copy) != to_plain(benchmark):
        _fail(benchmark, "a pickled copy has other parameters")


def check_unique_ids(benchmark: Benchmark) -> None:
    """Ids are unique in a task; an id of a context stands for one text."""
    for task, examples in _all_examples(benchmark):
        if not examples:
            _fail(benchmark, f"{task} has no examples")
        seen: set[str] = set()
        contexts: dict[str, str] = {}
        for example in examples:
            if not example.id or example.id in seen:
                _fail(benchmark, f"{task}: id {example.id!r} is empty or used twice")
            seen.add(example.id)
            if contexts.setdefault(example.context_id, example.context) != example.context:
                _fail(benchmark, f"{task}: context_id {example.context_id!r} stands for two texts")
            if example.task != task:
                _fail(benchmark, f"{task} {example.id}: its task is {example.task!r}")


def check_reproducible(benchmark: Benchmark) -> None:
    """Equal parameters and seed give equal bytes, in any order and in a copy."""
    tasks = _tasks(benchmark)
    first = {task: _bytes(_examples(benchmark, task)) for task in tasks}
    copy = pickle.loads(pickle.dumps(benchmark))
    for task in reversed(tasks):
        if _bytes(_examples(copy, task)) != first[task]:
            _fail(benchmark, f"{task}: a second time, other examples: the seed must decide all")
        if _bytes(_examples(benchmark.for_task(task), task)) != first[task]:
            _fail(benchmark, f"{task}: for_task() changes the examples")


def check_streaming(benchmark: Benchmark) -> None:
    """Examples come from an iterator, not in a list."""
    for task in _tasks(benchmark):
        examples = benchmark.examples(task, WordTokenizer(), SEED)
        if not isinstance(examples, Iterator):
            _fail(benchmark, f"examples({task!r}) is a {type(examples).__name__}: yield one by one")
        other = benchmark.examples(task, WordTokenizer(), SEED)
        if next(examples) != next(other):
            _fail(benchmark, f"{task}: two iterators at once disturb each other")


def check_positions(benchmark: Benchmark) -> None:
    """The declared number of examples is right, and single ones are those of the whole."""
    for task, examples in _all_examples(benchmark):
        count = benchmark.count(task)
        if count is not None and len(examples) < MOST_EXAMPLES and count != len(examples):
            _fail(benchmark, f"{task}: count() says {count}, examples() yields {len(examples)}")
        wanted = sorted({0, len(examples) // 2, len(examples) - 1})
        chosen = benchmark.examples_at(task, WordTokenizer(), SEED, wanted)
        if _bytes(chosen) != _bytes(examples[index] for index in wanted):
            _fail(benchmark, f"{task}: examples_at({wanted}) differs from examples() there")


def check_prompts(benchmark: Benchmark) -> None:
    """Every example has something to answer, room for it, and facts that are plain data."""
    for task, examples in _all_examples(benchmark):
        in_question = benchmark.protocol_for(task).prefix == "user"
        for example in examples:
            where = f"{task} {example.id}"
            asked = example.question + (example.answer_prefix if in_question else "")
            if not asked.strip():
                _fail(benchmark, f"{where}: the question is empty: move its cue there")
            room = example.max_new_tokens
            if not isinstance(room, int) or room < (example.predicted is None):
                _fail(benchmark, f"{where}: max_new_tokens is {example.max_new_tokens!r}")
            facts = dict(example.facts)
            if json.loads(json.dumps(facts, allow_nan=False)) != facts:
                _fail(benchmark, f"{where}: its facts change when they are written as JSON")


def check_references(benchmark: Benchmark) -> None:
    """Every example has at least one reference, and all are texts."""
    for task, examples in _all_examples(benchmark):
        if _excepted(benchmark, task, "references"):
            continue
        for example in examples:
            if example.predicted is not None:
                continue
            if not example.references or not all(isinstance(r, str) for r in example.references):
                _fail(benchmark, f"{task} {example.id}: references are {example.references!r}")


def check_token_limits(benchmark: Benchmark) -> None:
    """Prompt and answer fit the length for which a task is made."""
    limited = 0
    for task in _tasks(benchmark):
        info = benchmark.info(task)
        if info is None or info.length is None:
            continue
        limited += 1
        for example in _examples(benchmark, task):
            prompt = example.context + example.question + example.answer_prefix
            tokens = len(WordTokenizer()(prompt, add_special_tokens=False)["input_ids"])
            if tokens + example.max_new_tokens > info.length:
                _fail(
                    benchmark,
                    f"{task} {example.id}: {tokens} tokens and an answer of "
                    f"{example.max_new_tokens} exceed {info.length}",
                )
    if not limited:
        raise CheckSkipped(f"{benchmark.name} has no task of a given length")


def check_gold(benchmark: Benchmark) -> None:
    """The right answer scores 100, unless the benchmark lists the reason why not."""
    _check_main_score(benchmark, "gold", None, 100.0)


def check_empty(benchmark: Benchmark) -> None:
    """No answer scores 0, unless the benchmark lists the reason why not."""
    _check_main_score(benchmark, "empty", "", 0.0)


def _check_main_score(benchmark: Benchmark, what: str, answer: str | None, expected: float) -> None:
    for task, examples in _all_examples(benchmark):
        if _excepted(benchmark, task, what) or _excepted(benchmark, task, "references"):
            continue
        for example in examples:
            score = _scores(benchmark, example, answer)[benchmark.main_score]
            if not math.isclose(score, expected, abs_tol=TOLERANCE):
                _fail(
                    benchmark,
                    f"{task} {example.id}: {what} scores {score}, expected {expected}: mend the "
                    f"score, or give the reason in exceptions[{f'{task}/{what}'!r}]",
                )


def check_score_range(benchmark: Benchmark) -> None:
    """Whatever is answered, scores are numbers from 0 to 100, the main score among them."""
    for task, examples in _all_examples(benchmark):
        if _excepted(benchmark, task, "references"):
            continue
        for example in examples[:5]:
            for prediction in (*PREDICTIONS, None):
                scores = _scores(benchmark, example, prediction)
                where = f"{task} {example.id}: the scores of {prediction!r} are {scores}"
                if benchmark.main_score not in scores:
                    _fail(benchmark, f"{where}: {benchmark.main_score!r} is missing")
                for name, score in scores.items():
                    # This also finds NaN.
                    most = math.inf if name in benchmark.units else 100.0 + TOLERANCE
                    if isinstance(score, bool) or not 0.0 <= score <= most:
                        _fail(benchmark, f"{where}: expected percentages from 0 to 100")


def check_score_without_context(benchmark: Benchmark) -> None:
    """A score depends on what results keep: everything but the context."""
    for task, examples in _all_examples(benchmark):
        if _excepted(benchmark, task, "references"):
            continue
        for example in examples[:5]:
            kept = example.without_context()
            facts = json.loads(json.dumps(dict(example.facts)))
            kept = attrs.evolve(kept, facts=facts, max_new_tokens=1)
            for prediction in (*PREDICTIONS[:4], None):
                if _scores(benchmark, kept, prediction) != _scores(benchmark, example, prediction):
                    _fail(benchmark, f"{task} {example.id}: it scores otherwise without context")


def check_aggregate(benchmark: Benchmark) -> None:
    """Metrics of any number of samples are plain data without NaN, means within 0 to 100."""
    _check_plain(benchmark, "aggregate() of nothing", benchmark.aggregate([]))
    for task, examples in _all_examples(benchmark):
        if _excepted(benchmark, task, "references"):
            continue
        samples = [
            ScoredExample.of(example, _scores(benchmark, example, None if index % 2 else "no"))
            for index, example in enumerate(examples)
        ]
        for some in (samples, samples[:1]):
            metrics = benchmark.aggregate(some)
            _check_plain(benchmark, f"{task}: aggregate()", metrics)
            if metrics["n"] != len(some) or metrics["tasks"].keys() != {task}:
                _fail(benchmark, f"{task}: aggregate() counts {metrics['n']} of {len(some)}")
            score = metrics["scores"].get(benchmark.main_score)
            if score is None or not 0.0 <= score <= 100.0 + TOLERANCE:
                _fail(benchmark, f"{task}: aggregate() gives {benchmark.main_score} = {score}")
        summary = benchmark.summary({task: benchmark.aggregate(samples)})
        _check_plain(benchmark, f"{task}: summary()", summary)


def check_follow_up(benchmark: Benchmark) -> None:
    """A chain of questions ends, and its examples have ids of their own."""
    for task, examples in _all_examples(benchmark):
        example, ids = examples[0], {examples[0].id}
        for _ in range(_MOST_TURNS):
            further = benchmark.follow_up(example, "It follows.")
            if further is None:
                break
            if further.id in ids or not further.question.strip():
                _fail(
                    benchmark, f"{task}: a follow-up repeats the id {further.id!r} or asks nothing"
                )
            ids.add(further.id)
            example = further
        else:
            _fail(benchmark, f"{task}: follow_up() does not end within {_MOST_TURNS} turns")


def check_revision(benchmark: Benchmark) -> None:
    """The data has a name that is the same in a copy."""
    for task in _tasks(benchmark):
        alone = benchmark.for_task(task)
        revision = alone.revision()
        if not isinstance(revision, str) or not revision:
            _fail(benchmark, f"revision() is {revision!r}: expected a text")
        if pickle.loads(pickle.dumps(alone)).revision() != revision:
            _fail(benchmark, f"{task}: a copy has another revision")


def check_unknown_task(benchmark: Benchmark) -> None:
    """A task that does not exist is bad input, not a fault."""
    if _tasks(benchmark) == (benchmark.name,):
        raise CheckSkipped(f"{benchmark.name} has one task")
    try:
        next(iter(benchmark.examples("no-such-task", WordTokenizer(), SEED)), None)
    except SahError:
        return
    _fail(benchmark, "examples() of an unknown task must raise ParameterError")


BENCHMARK_CHECKS: tuple[BenchmarkCheck, ...] = (
    check_declaration,
    check_task_info,
    check_parameters_round_trip,
    check_unique_ids,
    check_reproducible,
    check_streaming,
    check_positions,
    check_prompts,
    check_references,
    check_token_limits,
    check_gold,
    check_empty,
    check_score_range,
    check_score_without_context,
    check_aggregate,
    check_follow_up,
    check_revision,
    check_unknown_task,
)
"""All checks, in the order in which they are run."""
