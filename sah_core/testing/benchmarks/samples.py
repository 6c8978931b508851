"""What the checks of benchmarks look at: tasks, their first examples, and scores."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import attrs

from sah_core.benchmark import Benchmark, Example
from sah_core.errors import MissingLibraryError
from sah_core.requests import Likelihood
from sah_core.testing.conformance import CheckSkipped

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


class WordTokenizer:
    """A tokenizer of words and signs, for checks without a model."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return a token per word and sign."""
        found = re.findall(r"\w+|[^\w\s]", text)
        return {"input_ids": [zlib.crc32(token.encode()) for token in found]}


def tasks_of(benchmark: Benchmark) -> tuple[str, ...]:
    """The tasks, of which there must be one."""
    tasks = tuple(benchmark.tasks())
    if not tasks:
        fail(benchmark, "tasks() names none: name at least one")
    return tasks


def first_examples(benchmark: Benchmark, task: str) -> list[Example]:
    """The first examples of a task, made anew."""
    made = []
    for example in benchmark.examples(task, WordTokenizer(), SEED):
        made.append(example)
        if len(made) == MOST_EXAMPLES:
            break
    return made


def all_examples(benchmark: Benchmark) -> Iterator[tuple[str, list[Example]]]:
    """Each task with its first examples."""
    for task in tasks_of(benchmark):
        yield task, first_examples(benchmark, task)


def as_bytes(examples: Iterable[Example]) -> bytes:
    """Examples as text that is equal only for equal ones."""
    return b"\n".join(
        json.dumps(attrs.asdict(example), sort_keys=True, ensure_ascii=False).encode()
        for example in examples
    )


def fail(benchmark: Benchmark, message: str) -> NoReturn:
    """Say what is wrong and what to change."""
    raise AssertionError(f"{benchmark.name}: {message}")


def require_plain(benchmark: Benchmark, what: str, value: object) -> None:
    """Fail unless a value can be written as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        fail(benchmark, f"{what} is no plain data ({error}): use None for what has no value")


def is_excepted(benchmark: Benchmark, task: str, what: str) -> bool:
    """Whether the benchmark lists a reason why a task cannot meet something."""
    return f"{task}/{what}" in benchmark.exceptions or f"*/{what}" in benchmark.exceptions


def scores_of(benchmark: Benchmark, example: Example, prediction: str | None) -> dict[str, float]:
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
