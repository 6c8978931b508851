"""Checks of the examples that a benchmark makes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator

from sah_core.benchmark import Benchmark
from sah_core.testing.conformance import CheckSkipped

from .samples import (
    MOST_EXAMPLES,
    SEED,
    WordTokenizer,
    all_examples,
    as_bytes,
    fail,
    first_examples,
    is_excepted,
    tasks_of,
)

_MOST_TURNS = 8


def check_unique_ids(benchmark: Benchmark) -> None:
    """Ids are unique in a task; an id of a context stands for one text."""
    for task, examples in all_examples(benchmark):
        if not examples:
            fail(benchmark, f"{task} has no examples")
        seen: set[str] = set()
        contexts: dict[str, str] = {}
        for example in examples:
            if not example.id or example.id in seen:
                fail(benchmark, f"{task}: id {example.id!r} is empty or used twice")
            seen.add(example.id)
            if contexts.setdefault(example.context_id, example.context) != example.context:
                fail(benchmark, f"{task}: context_id {example.context_id!r} stands for two texts")
            if example.task != task:
                fail(benchmark, f"{task} {example.id}: its task is {example.task!r}")


def check_reproducible(benchmark: Benchmark) -> None:
    """Equal parameters and seed give equal bytes, in any order and in a copy."""
    tasks = tasks_of(benchmark)
    first = {task: as_bytes(first_examples(benchmark, task)) for task in tasks}
    copy = pickle.loads(pickle.dumps(benchmark))
    for task in reversed(tasks):
        if as_bytes(first_examples(copy, task)) != first[task]:
            fail(benchmark, f"{task}: a second time, other examples: the seed must decide all")
        if as_bytes(first_examples(benchmark.for_task(task), task)) != first[task]:
            fail(benchmark, f"{task}: for_task() changes the examples")


def check_streaming(benchmark: Benchmark) -> None:
    """Examples come from an iterator, not in a list."""
    for task in tasks_of(benchmark):
        examples = benchmark.examples(task, WordTokenizer(), SEED)
        if not isinstance(examples, Iterator):
            fail(benchmark, f"examples({task!r}) is a {type(examples).__name__}: yield one by one")
        other = benchmark.examples(task, WordTokenizer(), SEED)
        if next(examples) != next(other):
            fail(benchmark, f"{task}: two iterators at once disturb each other")


def check_positions(benchmark: Benchmark) -> None:
    """The declared number of examples is right, and single ones are those of the whole."""
    for task, examples in all_examples(benchmark):
        count = benchmark.count(task)
        if count is not None and len(examples) < MOST_EXAMPLES and count != len(examples):
            fail(benchmark, f"{task}: count() says {count}, examples() yields {len(examples)}")
        wanted = sorted({0, len(examples) // 2, len(examples) - 1})
        chosen = benchmark.examples_at(task, WordTokenizer(), SEED, wanted)
        if as_bytes(chosen) != as_bytes(examples[index] for index in wanted):
            fail(benchmark, f"{task}: examples_at({wanted}) differs from examples() there")


def check_prompts(benchmark: Benchmark) -> None:
    """Every example has something to answer, room for it, and facts that are plain data."""
    for task, examples in all_examples(benchmark):
        in_question = benchmark.protocol_for(task).prefix == "user"
        for example in examples:
            where = f"{task} {example.id}"
            asked = example.question + (example.answer_prefix if in_question else "")
            if not asked.strip():
                fail(benchmark, f"{where}: the question is empty: move its cue there")
            room = example.max_new_tokens
            if not isinstance(room, int) or room < (example.predicted is None):
                fail(benchmark, f"{where}: max_new_tokens is {example.max_new_tokens!r}")
            facts = dict(example.facts)
            if json.loads(json.dumps(facts, allow_nan=False)) != facts:
                fail(benchmark, f"{where}: its facts change when they are written as JSON")


def check_references(benchmark: Benchmark) -> None:
    """Every example has at least one reference, and all are texts."""
    for task, examples in all_examples(benchmark):
        if is_excepted(benchmark, task, "references"):
            continue
        for example in examples:
            if example.predicted is not None:
                continue
            if not example.references or not all(isinstance(r, str) for r in example.references):
                fail(benchmark, f"{task} {example.id}: references are {example.references!r}")


def check_token_limits(benchmark: Benchmark) -> None:
    """Prompt and answer fit the length for which a task is made."""
    limited = 0
    for task in tasks_of(benchmark):
        info = benchmark.info(task)
        if info is None or info.length is None:
            continue
        limited += 1
        for example in first_examples(benchmark, task):
            prompt = example.context + example.question + example.answer_prefix
            tokens = len(WordTokenizer()(prompt, add_special_tokens=False)["input_ids"])
            if tokens + example.max_new_tokens > info.length:
                fail(
                    benchmark,
                    f"{task} {example.id}: {tokens} tokens and an answer of "
                    f"{example.max_new_tokens} exceed {info.length}",
                )
    if not limited:
        raise CheckSkipped(f"{benchmark.name} has no task of a given length")


def check_follow_up(benchmark: Benchmark) -> None:
    """A chain of questions ends, and its examples have ids of their own."""
    for task, examples in all_examples(benchmark):
        example, ids = examples[0], {examples[0].id}
        for _ in range(_MOST_TURNS):
            further = benchmark.follow_up(example, "It follows.")
            if further is None:
                break
            if further.id in ids or not further.question.strip():
                fail(
                    benchmark, f"{task}: a follow-up repeats the id {further.id!r} or asks nothing"
                )
            ids.add(further.id)
            example = further
        else:
            fail(benchmark, f"{task}: follow_up() does not end within {_MOST_TURNS} turns")
