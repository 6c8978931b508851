"""Whole decode steps of a model, dense and with pipelines, eager and captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from sah_core import Pipeline, compat, registry
from sah_core.attention import Session, check_layers

from .attention import release
from .forms import Probe
from .made_up import MadeUpContext, load, make_context, weights_read
from .rows import CAPTURED, EAGER, NOT_RUN, DecodeRow, note
from .steps import Steps, now
from .timing import Copy, Times
from .traffic import Traffic

DENSE = "dense: the model's own attention"
BY_ROWS = "dense: group as rows"
FIXED = "fixed length"
NO_CUDA = "CUDA graphs need a CUDA device"


@attrs.frozen(kw_only=True)
class DecodePlan:
    """What to measure.

    Attributes:
        model: A model by name; None takes ``shape``.
        shape: A key of `MODEL_SHAPES`: random weights.
        layers: Layers to keep of the shape, None for all.
        pipelines: Each as it was written and as it was understood.
        backends: Names to ask for.
        context: Cached tokens.
        batch: Sequences.
        new_tokens: Steps of a round.
        device: Where.
        dtype: Of the weights.
        rounds: Rounds that count.
        warmup: Rounds before them.
    """

    model: str | None
    shape: str | None
    layers: int | None
    pipelines: tuple[tuple[str, Pipeline], ...]
    backends: tuple[str, ...]
    context: int
    batch: int
    new_tokens: int
    device: torch.device
    dtype: str
    rounds: int
    warmup: int

    def measure(self, copy: Copy, begin: Callable[[str], None]) -> list[DecodeRow]:
        """Measure dense and every pipeline on every backend.

        Args:
            copy: The bandwidth of the device.
            begin: Told what is being done.
        """
        return measure_decode(self, copy, begin)

    def to_plain(self) -> dict[str, Any]:
        """What was measured, for JSON."""
        return {
            "kind": "decode",
            "model": self.model,
            "shape": self.shape,
            "layers": self.layers,
            "context": self.context,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        name = self.model or f"{self.shape} (random weights)"
        cut = "" if self.layers is None else f", {self.layers} layers"
        return (
            f"{name}{cut}: {self.context} tokens of context, batch {self.batch}, "
            f"{self.new_tokens} steps, {self.dtype}"
        )


@torch.no_grad()
def measure_decode(plan: DecodePlan, copy: Copy, begin: Callable[[str], None]) -> list[DecodeRow]:
    """Measure dense and every pipeline on every backend.

    Args:
        plan: What to measure.
        copy: The bandwidth of the device.
        begin: Told what is being done.
    """
    begin(f"loading {plan.model or plan.shape}")
    adapter = load(plan)
    for _, pipeline in plan.pipelines:
        check_layers(pipeline, len(compat.layer_types(adapter.model)))
    begin("filling the cache")
    context = make_context(adapter, plan)
    weights = weights_read(adapter.model)
    planned = planned_rows(plan)
    loops: list[tuple[DecodeRow, Steps]] = []
    for row, pipeline in planned:
        row.bandwidth, row.weight_bytes = copy.bandwidth, weights
        begin(f"measuring {row.name} on {row.requested}")
        try:
            loops.append((row, eager_steps(row, pipeline, adapter, plan, context)))
        except Exception as error:  # one pipeline must not take the others down
            note(row, error)
            release(plan.device)
    time_eager(loops, plan)
    alive = {id(row) for row, _ in loops}
    loops.clear()
    for row, pipeline in planned:
        if id(row) in alive:
            release(plan.device)
            begin(f"measuring {row.name} on {row.requested}, captured")
            time_captured(row, pipeline, adapter, plan, context)
    begin("measuring dense, graphs of a fixed length")
    rows = [row for row, _ in planned]
    for row in rows[:2]:
        release(plan.device)
        rows.insert(2, time_fixed(row, adapter, plan, context))
    compare_with_dense(rows)
    return rows


def planned_rows(plan: DecodePlan) -> list[tuple[DecodeRow, Pipeline]]:
    """The rows of a plan, dense ones first, each with the pipeline that it measures."""
    found = [
        (DecodeRow(name=name, pipeline="dense", batch=plan.batch), Pipeline.dense())
        for name in (DENSE, BY_ROWS)
    ]
    for text, pipeline in plan.pipelines:
        named = plan.backends if pipeline.backend == "auto" else (pipeline.backend,)
        for backend in () if pipeline.is_dense else named:
            chosen = attrs.evolve(pipeline, backend=backend)
            row = DecodeRow(
                name=text,
                pipeline=chosen.text,
                batch=plan.batch,
                requested=backend,
                backend=backend,
                saving=NOT_RUN,
            )
            found.append((row, chosen))
    return found


def compare_with_dense(rows: Sequence[DecodeRow]) -> None:
    """Note in every row the seconds of the fastest dense one."""
    for kind in (EAGER, CAPTURED):
        known = [row.seconds(kind) for row in rows if row.pipeline == "dense"]
        found = [seconds for seconds in known if seconds is not None]
        for row in rows if found else ():
            row.dense[kind] = min(found)


def time_fixed(row: DecodeRow, adapter: Any, plan: DecodePlan, context: MadeUpContext) -> DecodeRow:
    """A dense row again, as a graph of one step whose length does not grow."""
    fixed = attrs.evolve(row, name=f"{row.name}, {FIXED}", times={}, no_graph="", dense={})
    if plan.device.type != "cuda":
        fixed.no_graph = NO_CUDA
        return fixed
    try:
        timer = Steps(adapter, plan, context, session_of(row, Pipeline.dense(), adapter))
        replay = timer.fixed_graph()
        fixed.times[CAPTURED] = Times(tuple(replay() for _ in range(plan.rounds)))
    except Exception as error:  # whatever a capture raises, the other numbers stand
        fixed.no_graph = f"{type(error).__name__}: {error}"
    finally:
        compat.restore_cache(context.cache, context.base)
    return fixed


def session_of(row: DecodeRow, pipeline: Pipeline, adapter: Any) -> Session | None:
    """What runs the attention of a row; None is the model's own."""
    if row.name == DENSE:
        return None
    return Session(pipeline, compat.layer_types(adapter.model))


def eager_steps(
    row: DecodeRow, pipeline: Pipeline, adapter: Any, plan: DecodePlan, context: MadeUpContext
) -> Steps:
    """Prepare the eager loop of a pipeline and fill in what needs no clock."""
    session = session_of(row, pipeline, adapter)
    steps = Steps(adapter, plan, context, session)
    if session is None or pipeline.is_dense:
        row.backend = "torch" if session is None else "sdpa"
        cached = [(k, v) for _, k, v in compat.cached_tensors(context.cache)]
        total = sum(t.numel() * t.element_size() for pair in cached for t in pair)
        row.traffic, row.density = Traffic(0, total, total), 1.0
    else:
        probe = Probe(session)
        watched = Session(pipeline, session.layer_types, observers=[probe])
        watched.layers, watched.request_state = session.layers, session.request_state
        steps.run(1, watched)
        row.traffic, row.density, row.saving = probe.traffic, probe.density, probe.saving
        # layers that the pipeline leaves dense run on other backends, which save nothing
        used = watched.backends_used
        row.backend = ", ".join(sorted(used or probe.backends))
        if used:
            real = all(registry.backends[name].realised for name in used)
            row.saving = "realised" if real else "simulated"
        for fallback in watched.fallbacks:
            row.fallback = f"{fallback.requested} refuses: {fallback.reason}"
    steps.run(1)
    row.peak = peak_of(steps, plan)
    return steps


def peak_of(steps: Steps, plan: DecodePlan) -> int | None:
    """Bytes taken at most by a step; not known on the CPU."""
    if plan.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    steps.run(1)
    return int(torch.cuda.max_memory_allocated(plan.device) - before)


def time_eager(loops: Sequence[tuple[DecodeRow, Steps]], plan: DecodePlan) -> None:
    """Time the eager loops in interleaved rounds."""
    seconds: dict[int, list[float]] = {}
    for round_ in range(plan.warmup + plan.rounds):
        for index, (_, steps) in enumerate(loops):
            taken = steps.run(plan.new_tokens if round_ >= plan.warmup else 1)
            if round_ >= plan.warmup:
                seconds.setdefault(index, []).append(taken)
    for index, taken_ in seconds.items():
        loops[index][0].times[EAGER] = Times(tuple(taken_))


def time_captured(
    row: DecodeRow, pipeline: Pipeline, adapter: Any, plan: DecodePlan, context: MadeUpContext
) -> None:
    """Time steps that the adapter replays from a CUDA graph; the row says why if there are none."""
    capture = getattr(adapter, "capture_decode", None)
    if plan.device.type != "cuda":
        row.no_graph = NO_CUDA
        return
    if row.name == BY_ROWS:
        row.no_graph = f"see '{row.name}, {FIXED}'"
        return
    if capture is None:
        row.no_graph = "the adapter captures no decode steps"
        return
    compat.restore_cache(context.cache, context.base)
    context.states.clear()
    taken = inspect.signature(capture).parameters
    names = [name for name in ("room", "max_new_tokens") if name in taken]
    room = dict.fromkeys(names, plan.new_tokens + 2)
    try:
        decoder = capture(context, pipeline, **room)
        decoder.step()
        each = max(1, plan.new_tokens // plan.rounds)
        seconds = []
        for _ in range(max(1, plan.new_tokens // each)):
            begin = now(plan.device)
            for _ in range(each):
                decoder.step()
            seconds.append((now(plan.device) - begin) / each)
        row.times[CAPTURED] = Times(tuple(seconds))
    except Exception as error:  # whatever a capture raises, eager numbers stand
        row.no_graph = f"{type(error).__name__}: {error}"
    finally:
        context.states.clear()
        compat.restore_cache(context.cache, context.base)
