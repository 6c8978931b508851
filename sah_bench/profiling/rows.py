"""What was found out about one form, and how it went."""

from __future__ import annotations

import traceback
from typing import Any

import attrs
import torch

from sah_core.errors import SahError, one_line

from .shapes import Shape
from .timing import Times
from .traffic import Traffic

GRAPH, COLD, WALL = "graph", "cold", "wall"
EAGER, CAPTURED = "eager", "captured"


NOT_RUN = "-"
"""The saving of a pipeline that did not run."""


@attrs.define(kw_only=True)
class Outcome:
    """One form, measured or not.

    Attributes:
        name: The dense form, or the pipeline as it was written.
        pipeline: The pipeline's canonical text, None for a dense form of torch.
        requested: The backend that was asked for; ``torch`` for what runs without the hub.
        backend: The backends that ran.
        fallback: Why the one asked for did not run.
        saving: ``baseline``, ``realised`` or ``simulated``; `NOT_RUN` while there is no number.
        status: ``ok``, ``refused``, ``out of memory`` or ``failed``.
        reason: Why it is not ok.
        detail: The traceback of a failure.
        times: Seconds by kind of time.
        no_graph: Why there is no time under graph replay.
        traffic: Bytes that attention must move.
        peak: Bytes taken at most during a call, beyond what was there before.
        density: Selected over allowed pairs.
        dense: Seconds of the fastest dense form, by kind of time.
        bandwidth: Bytes per second of a large copy.
    """

    name: str
    pipeline: str | None = None
    requested: str = "torch"
    backend: str = "torch"
    fallback: str = ""
    saving: str = "baseline"
    status: str = "ok"
    reason: str = ""
    detail: str = ""
    times: dict[str, Times] = attrs.field(factory=dict)
    no_graph: str = ""
    traffic: Traffic | None = None
    peak: int | None = None
    density: float | None = None
    dense: dict[str, float] = attrs.field(factory=dict)
    bandwidth: float = 0.0

    def seconds(self, kind: str) -> float | None:
        """The time of a kind: the minimum of wall times of a call, else the median."""
        times = self.times.get(kind)
        if times is None:
            return None
        return times.least if kind == WALL else times.median

    def speedup(self, kind: str) -> float | None:
        """How many times faster than dense."""
        seconds, dense = self.seconds(kind), self.dense.get(kind)
        return dense / seconds if seconds and dense else None

    def to_plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        traffic = self.traffic
        return {
            "name": self.name,
            "pipeline": self.pipeline,
            "backend_requested": self.requested,
            "backend": self.backend,
            "fallback": self.fallback,
            "saving": self.saving,
            "status": self.status,
            "reason": self.reason,
            "traceback": self.detail,
            "times": {kind: times.to_plain() for kind, times in self.times.items()},
            "no_graph": self.no_graph,
            "speedup": {kind: self.speedup(kind) for kind in self.times},
            "bytes": traffic and {**attrs.asdict(traffic), "total": traffic.total},
            "peak_bytes": self.peak,
            "density": self.density,
        }


@attrs.define(kw_only=True)
class Row(Outcome):
    """One form at one shape.

    Attributes:
        shape: The sizes.
    """

    shape: Shape

    @property
    def floor(self) -> float | None:
        """Seconds that moving the bytes takes at the bandwidth of a copy."""
        return self.traffic.total / self.bandwidth if self.traffic and self.bandwidth else None

    @property
    def limit_kind(self) -> str:
        """The time that the floor is compared with: from memory, where that was measured."""
        return next((kind for kind in (COLD, GRAPH, WALL) if kind in self.times), WALL)

    @property
    def fraction(self) -> float | None:
        """Floor over time."""
        seconds = self.seconds(self.limit_kind)
        return self.floor / seconds if self.floor is not None and seconds else None

    def to_plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "shape": attrs.asdict(self.shape),
            **super().to_plain(),
            "floor_us": None if self.floor is None else 1e6 * self.floor,
            "limit_fraction": self.fraction,
            "limit_of": self.limit_kind,
        }


@attrs.define(kw_only=True)
class DecodeRow(Outcome):
    """One pipeline on a whole model; times are those of a step.

    Attributes:
        batch: Tokens of a step.
        weight_bytes: Bytes of the weights that a step reads.
    """

    batch: int
    weight_bytes: int = 0

    def tokens_per_second(self, kind: str) -> float | None:
        """Tokens of all sequences, by the median round."""
        seconds = self.seconds(kind)
        return self.batch / seconds if seconds else None

    @property
    def step_bytes(self) -> int | None:
        """Bytes that a step must read."""
        return None if self.traffic is None else self.traffic.total + self.weight_bytes

    @property
    def floor_tokens_per_second(self) -> float | None:
        """Tokens per second if nothing but these bytes took time."""
        if self.step_bytes is None or not self.bandwidth:
            return None
        return self.batch * self.bandwidth / self.step_bytes

    def to_plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **super().to_plain(),
            "tokens_per_second": {kind: self.tokens_per_second(kind) for kind in self.times},
            "weight_bytes": self.weight_bytes,
            "step_bytes": self.step_bytes,
            "floor_tokens_per_second": self.floor_tokens_per_second,
        }


def note(row: Outcome, error: Exception) -> None:
    """Say in a row why there is no number."""
    row.status, row.reason = verdict(error, dense=row.pipeline is None)
    if row.status == "failed":
        row.detail = "".join(traceback.format_exception(error))


def verdict(error: Exception, *, dense: bool = False) -> tuple[str, str]:
    """Status and one-line reason of an error.

    Args:
        error: What was raised.
        dense: It comes from a kernel of torch, which says no by a RuntimeError.
    """
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory", text
    if isinstance(error, SahError):
        return "refused", text
    if dense and isinstance(error, RuntimeError):
        return "refused", text
    return "failed", f"{type(error).__name__}: {text}"
