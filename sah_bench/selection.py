"""Which examples of a task are answered under a limit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sah_core.benchmark import Benchmark, Example, Tokenizer, spread
from sah_core.errors import DataError


class Selection:
    """The examples of a task under a limit, made one at a time.

    Args:
        benchmark: The benchmark.
        task: The task.
        tokenizer: The model's.
        seed: Of the examples, and of the spread.
        limit: The most examples; None for all.

    Attributes:
        count: How many there are; None until the last one is made, where only that tells.
        is_whole: Whether the task has no more than these; known once the last one is made.
    """

    def __init__(
        self, benchmark: Benchmark, task: str, tokenizer: Tokenizer, seed: int, limit: int | None
    ) -> None:
        self._benchmark, self._task, self._seed = benchmark, task, seed
        self._tokenizer, self._limit = tokenizer, limit
        self.is_whole = limit is None
        total = benchmark.count(task)
        if total is None and limit is not None and not benchmark.independent:
            # Only a task whose size is known can be sampled all over.
            total = sum(1 for _ in self._all())
        self._total = total
        self.count = total if limit is None or total is None else min(limit, total)

    def __iter__(self) -> Iterator[Example]:
        made = 0
        for example in self._chosen():
            made += 1
            yield example
        if not made:
            raise DataError(self._benchmark.name, f"task {self._task}", "it has no examples")
        self.count = made

    def _chosen(self) -> Iterator[Example]:
        limit, total = self._limit, self._total
        if limit is None or (total is not None and total <= limit):
            self.is_whole = True
            yield from self._all()
        elif self._benchmark.independent:
            examples = self._all()
            yield from islice(examples, limit)
            # One more shows whether there are more.
            self.is_whole = total is None and next(examples, None) is None
        else:
            yield from self._benchmark.examples_at(
                self._task, self._tokenizer, self._seed, spread(total or 0, limit, self._seed)
            )

    def _all(self) -> Iterator[Example]:
        return self._benchmark.examples(self._task, self._tokenizer, self._seed)
