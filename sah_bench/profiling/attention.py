"""Attention calls: every dense form and every pipeline on every backend, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch

from sah_core import Pipeline
from sah_core.errors import SahError, one_line

from .forms import DenseForm, PipelineForm, Probe, dense_forms
from .rows import COLD, GRAPH, NOT_RUN, WALL, Row, note
from .shapes import Call, Shape
from .timing import (
    GRAPH_CALLS,
    Copy,
    Sweep,
    graph_of,
    graph_timer,
    interleaved,
    peak_memory,
    wall_timer,
)
from .traffic import Traffic


@attrs.frozen(kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        pipelines: Each as it was written and as it was understood.
        backends: Names to ask for.
        shapes: The sizes.
        device: Where.
        rounds: Rounds that count.
        warmup: Rounds before them.
        cold: On a GPU, also with a swept L2 cache.
    """

    pipelines: tuple[tuple[str, Pipeline], ...]
    backends: tuple[str, ...]
    shapes: tuple[Shape, ...]
    device: torch.device
    rounds: int
    warmup: int
    cold: bool = True

    def to_plain(self) -> dict[str, Any]:
        """What was measured, for JSON."""
        return {"kind": "attention"}

    def measure(self, copy: Copy, begin: Callable[[str], None]) -> Iterator[Row]:
        """Measure shape by shape.

        Args:
            copy: The bandwidth of the device.
            begin: Told what is being done.

        Yields:
            The rows of a shape, once it is done.
        """
        for shape in self.shapes:
            begin(f"measuring {shape}")
            try:
                rows = measure_shape(self, shape, copy)
            except Exception as error:  # running out of memory shows as whatever torch raises
                rows = [Row(shape=shape, name="all forms")]
                note(rows[0], error)
            yield from rows
            release(self.device)


@torch.no_grad()
def measure_shape(plan: Plan, shape: Shape, copy: Copy) -> list[Row]:
    """Measure every form at one shape."""
    call = Call.random(shape, plan.device)
    sweep = Sweep(plan.device) if plan.device.type == "cuda" and plan.cold else None
    rows: list[Row] = []
    timers: dict[tuple[int, str], Callable[[], object]] = {}
    for make, row in candidates(plan, shape, call):
        row.bandwidth = copy.bandwidth
        rows.append(row)
        try:
            form = make()
            describe(row, form, shape, plan.device)
            found = timers_of(row, form, plan.device, sweep)
        except Exception as error:  # a form that fails must not take the others down
            note(row, error)
            release(plan.device)
            continue
        timers |= {(len(rows) - 1, kind): timer for kind, timer in found.items()}
    for (index, kind), times in interleaved(timers, plan.rounds, plan.warmup).items():
        rows[index].times[kind] = times
    compare(rows)
    return rows


def candidates(
    plan: Plan, shape: Shape, call: Call
) -> Iterator[tuple[Callable[[], DenseForm | PipelineForm], Row]]:
    """What can be tried at a shape, each with its row; nothing is built yet."""
    for form in dense_forms(call, shape):

        def ready(form: DenseForm = form) -> DenseForm:
            return form

        yield ready, Row(shape=shape, name=form.name)
    for text, pipeline in plan.pipelines:
        # a backend that the pipeline names is the only one to ask
        named = plan.backends if pipeline.backend == "auto" else (pipeline.backend,)
        for backend in ("auto",) if pipeline.is_dense else named:
            row = Row(
                shape=shape,
                name=text,
                pipeline=pipeline.text,
                requested=backend,
                backend=backend,
                saving=NOT_RUN,
            )

            def build(
                text: str = text, pipeline: Pipeline = pipeline, backend: str = backend
            ) -> PipelineForm:
                return PipelineForm(text, pipeline, backend, call)

            yield build, row


def describe(row: Row, form: DenseForm | PipelineForm, shape: Shape, device: torch.device) -> None:
    """Fill in what needs no clock."""
    form.eager()
    row.peak = peak_memory(form.eager, device)
    if isinstance(form, DenseForm):
        row.traffic = Traffic(0, shape.kv_bytes, shape.kv_bytes)
        row.density = 1.0
        return
    found: Probe = form.probe()
    row.backend = ", ".join(sorted(found.backends))
    row.fallback, row.saving = found.fallback, found.saving
    row.traffic, row.density = found.traffic, found.density


def timers_of(
    row: Row, form: DenseForm | PipelineForm, device: torch.device, sweep: Sweep | None
) -> dict[str, Callable[[], float]]:
    """The timers of a form by kind of time."""
    timers = {WALL: wall_timer(form.eager, device)}
    if device.type != "cuda":
        return timers
    try:
        timers[GRAPH] = graph_timer(graph_of(form.captured, GRAPH_CALLS), GRAPH_CALLS)
        if sweep is not None:
            timers[COLD] = sweep.timer(form.captured)
    except (SahError, RuntimeError) as error:  # the wall time stands all the same
        row.no_graph = one_line(str(error))
    return timers


def compare(rows: Sequence[Row]) -> None:
    """Note the fastest dense form in every row of a shape."""
    for kind in (GRAPH, COLD, WALL):
        dense = [row.seconds(kind) for row in rows if row.pipeline is None]
        known = [seconds for seconds in dense if seconds is not None]
        for row in rows if known else ():
            row.dense[kind] = min(known)


def release(device: torch.device) -> None:
    """Give memory back before the next form."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
