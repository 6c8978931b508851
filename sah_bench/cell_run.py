"""Cells at work: which samples are missing, and what becomes of errors."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import attrs
import pluggy

from sah_core.benchmark import Example
from sah_core.errors import SahError, one_line
from sah_core.hookspecs import PROJECT, ObserverSpec
from sah_core.pipeline import Pipeline

from .benchmark_plans import BenchmarkPlan
from .store import Cell, Sample


@attrs.define(kw_only=True, eq=False)
class CellRun:
    """A cell at work.

    Attributes:
        pipeline: The pipeline of the cell.
        cell: Its folder.
        observers: Its own instances of the experiment's metrics, by name.
        error: Why it stopped; None while it works.
        done: Nothing is left to do.
    """

    pipeline: Pipeline
    cell: Cell
    observers: dict[str, Any] = attrs.field(factory=dict)
    error: dict[str, Any] | None = None
    done: bool = False
    _kept: set[str] = attrs.field(factory=set)
    _contexts: set[str] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        self._kept = self.cell.ids
        self._contexts = {record["context_id"] for record in self.cell.records}

    @property
    def is_pending(self) -> bool:
        """Whether samples may be missing."""
        return not self.done and self.error is None

    @property
    def prefills_itself(self) -> bool:
        """Whether its prefill is sparse, so that it cannot use the one that the others share."""
        return self.pipeline.prefills

    def missing(self, examples: Sequence[Example]) -> list[int]:
        """Which of the examples it has not answered yet."""
        return [i for i, example in enumerate(examples) if example.id not in self._kept]

    def knows(self, context_id: str) -> bool:
        """Whether it has answered a question about this context."""
        return context_id in self._contexts

    def to_time(self, missing: Sequence[int], samples: int) -> list[int]:
        """Which of the missing samples are answered without observers before they are observed.

        The first ones of a cell are; samples are kept in order, so that their number says where the
        cell stands. Nothing is done twice without observers.
        """
        return list(missing[: max(0, samples - len(self._kept))]) if self.observers else []

    def reset(self) -> None:
        """Start the observers from zero."""
        for observer in self.observers.values():
            observer.reset()

    def keep(self, sample: Sample) -> None:
        """Keep a sample."""
        self.cell.append(sample)
        self._kept.add(sample.id)
        self._contexts.add(sample.record["context_id"])

    def fail(self, error: Exception) -> None:
        """Stop for an error, which is recorded in the folder."""
        self.error = {
            "kind": "input" if isinstance(error, SahError) else "fault",
            "message": _message(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        self.cell.fail(self.error)

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of the observers."""
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(ObserverSpec)
        for observer in self.observers.values():
            manager.register(observer)
        getattr(manager.hook, hook)(**arguments)


@attrs.define(kw_only=True, eq=False)
class TaskRun:
    """One task of one benchmark on one model: its cells, one per pipeline.

    Attributes:
        plan: The benchmark.
        task: The task.
        cells: In the order of the pipelines.
        count: How many examples it has under the limit; None while that is not known.
        order: The ids of its examples, as they were made.
    """

    plan: BenchmarkPlan
    task: str
    cells: list[CellRun]
    count: int | None = None
    order: list[str] = attrs.field(factory=list)

    @property
    def pending(self) -> list[CellRun]:
        """The cells in which samples may be missing."""
        return [run for run in self.cells if run.is_pending]

    @property
    def label(self) -> str:
        """Benchmark and task in words."""
        return f"{self.plan.benchmark.name} {self.task}"


class failing:
    """Records an error in the cells that it concerns, and goes on."""

    def __init__(self, runs: Sequence[CellRun]) -> None:
        self._runs = runs

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        # Foreign code runs inside: whatever it raises is a fault of the cell, an interrupt is none.
        if not isinstance(error, Exception):
            return False
        for run in self._runs:
            if run.is_pending:
                run.fail(error)
        return True


def _message(error: Exception) -> str:
    text = one_line(str(error))
    if isinstance(error, SahError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
