"""Checks of the scores that a benchmark gives."""

from __future__ import annotations

import json
import math

import attrs

from sah_core.benchmark import Benchmark, ScoredExample

from .samples import (
    PREDICTIONS,
    TOLERANCE,
    all_examples,
    fail,
    is_excepted,
    require_plain,
    scores_of,
)


def check_gold(benchmark: Benchmark) -> None:
    """The right answer scores 100, unless the benchmark lists the reason why not."""
    _check_main_score(benchmark, "gold", None, 100.0)


def check_empty(benchmark: Benchmark) -> None:
    """No answer scores 0, unless the benchmark lists the reason why not."""
    _check_main_score(benchmark, "empty", "", 0.0)


def _check_main_score(benchmark: Benchmark, what: str, answer: str | None, expected: float) -> None:
    for task, examples in all_examples(benchmark):
        if is_excepted(benchmark, task, what) or is_excepted(benchmark, task, "references"):
            continue
        for example in examples:
            score = scores_of(benchmark, example, answer)[benchmark.main_score]
            if not math.isclose(score, expected, abs_tol=TOLERANCE):
                fail(
                    benchmark,
                    f"{task} {example.id}: {what} scores {score}, expected {expected}: mend the "
                    f"score, or give the reason in exceptions[{f'{task}/{what}'!r}]",
                )


def check_score_range(benchmark: Benchmark) -> None:
    """Whatever is answered, scores are numbers from 0 to 100, the main score among them."""
    for task, examples in all_examples(benchmark):
        if is_excepted(benchmark, task, "references"):
            continue
        for example in examples[:5]:
            for prediction in (*PREDICTIONS, None):
                scores = scores_of(benchmark, example, prediction)
                where = f"{task} {example.id}: the scores of {prediction!r} are {scores}"
                if benchmark.main_score not in scores:
                    fail(benchmark, f"{where}: {benchmark.main_score!r} is missing")
                for name, score in scores.items():
                    # This also finds NaN.
                    most = math.inf if name in benchmark.units else 100.0 + TOLERANCE
                    if isinstance(score, bool) or not 0.0 <= score <= most:
                        fail(benchmark, f"{where}: expected percentages from 0 to 100")


def check_score_without_context(benchmark: Benchmark) -> None:
    """A score depends on what results keep: everything but the context."""
    for task, examples in all_examples(benchmark):
        if is_excepted(benchmark, task, "references"):
            continue
        for example in examples[:5]:
            kept = example.without_context()
            facts = json.loads(json.dumps(dict(example.facts)))
            kept = attrs.evolve(kept, facts=facts, max_new_tokens=1)
            for prediction in (*PREDICTIONS[:4], None):
                if scores_of(benchmark, kept, prediction) != scores_of(
                    benchmark, example, prediction
                ):
                    fail(benchmark, f"{task} {example.id}: it scores otherwise without context")


def check_aggregate(benchmark: Benchmark) -> None:
    """Metrics of any number of samples are plain data without NaN, means within 0 to 100."""
    require_plain(benchmark, "aggregate() of nothing", benchmark.aggregate([]))
    for task, examples in all_examples(benchmark):
        if is_excepted(benchmark, task, "references"):
            continue
        samples = [
            ScoredExample.of(example, scores_of(benchmark, example, None if index % 2 else "no"))
            for index, example in enumerate(examples)
        ]
        for some in (samples, samples[:1]):
            metrics = benchmark.aggregate(some)
            require_plain(benchmark, f"{task}: aggregate()", metrics)
            if metrics["n"] != len(some) or metrics["tasks"].keys() != {task}:
                fail(benchmark, f"{task}: aggregate() counts {metrics['n']} of {len(some)}")
            score = metrics["scores"].get(benchmark.main_score)
            if score is None or not 0.0 <= score <= 100.0 + TOLERANCE:
                fail(benchmark, f"{task}: aggregate() gives {benchmark.main_score} = {score}")
        summary = benchmark.summary({task: benchmark.aggregate(samples)})
        require_plain(benchmark, f"{task}: summary()", summary)
