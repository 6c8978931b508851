"""Metrics of single attention calls, and dense attention by its definition to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from .hookspecs import hookimpl
from .inputs import Inputs
from .mask import Mask
from .metric import Metric
from .parameters import param
from .weights import attention_weights, chunks, dense_logits

__all__ = ["AttentionMetric", "dense_logits", "dense_output", "dense_weights"]

PIECE = 2**22
"""Logits computed at once: query rows are taken in pieces of this many numbers, so that memory does
not grow with rows x keys."""
FETCH = 4096
"""Values that wait on the device before they are fetched together."""
DIGITS = 6
"""Significant digits of what is kept."""


def dense_weights(inputs: Inputs, *, sinks: bool = True) -> Tensor:
    """Weights of dense attention in float32 ``(batch, heads, query_len, key_len)``; the arguments
    are those of `attention_weights`.
    """
    weights, _ = attention_weights(inputs, sinks=sinks)
    return weights


def dense_output(inputs: Inputs) -> Tensor:
    """Dense attention in float32 ``(batch, query_len, heads, value_dim)``."""
    batch, heads, query_len, key_len = inputs.shape
    weights, _ = attention_weights(inputs)
    flat = weights.view(batch, inputs.kv_heads, inputs.group * query_len, key_len)
    output = flat.new_zeros(*flat.shape[:3], inputs.value.shape[3])
    for begin, end in chunks(inputs.value, flat.dtype):
        output += flat[..., begin:end] @ inputs.value[:, :, begin:end].to(flat.dtype)
    return output.view(batch, heads, query_len, -1).transpose(1, 2)


@attrs.define
class _Layer:
    """What the calls of one layer add up to."""

    total: float = 0.0
    rows: int = 0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, total: float, rows: int, low: float, high: float) -> None:
        self.total, self.rows = self.total + total, self.rows + rows
        self.low, self.high = min(self.low, low), max(self.high, high)


@attrs.define
class _Log:
    """What a metric keeps of a sample.

    Attributes:
        layers: Sums by layer.
        records: Single calls, at most as many as the cap allows.
        dropped: Calls beyond the cap.
        waiting: Calls whose numbers are still on the device: layer, phase, step and the numbers.
        step: Forward passes before the present one.
        first_row: Query rows of these passes.
        rows: Query rows of the present pass.
        layer: The layer that was called last; -1 before the first pass.
    """

    layers: dict[int, _Layer] = attrs.field(factory=dict)
    records: list[dict[str, Any]] = attrs.field(factory=list)
    dropped: int = 0
    waiting: list[tuple[int, str, int, Tensor]] = attrs.field(factory=list)
    step: int = -1
    first_row: int = 0
    rows: int = 0
    layer: int = -1

    def enter(self, inputs: Inputs) -> None:
        """Count forward passes: one begins where the layers begin again."""
        if self.step < 0 or inputs.layer <= self.layer:
            self.step += 1
            self.first_row += self.rows
            self.rows = inputs.query_len
        self.layer = inputs.layer

    def fetch(self, cap: int) -> None:
        """Bring the numbers of the waiting calls to the host, all at once."""
        if not self.waiting:
            return
        device = self.waiting[0][3].device
        numbers = torch.stack([call[3].to(device) for call in self.waiting]).tolist()
        for (layer, phase, step, _), (total, rows, low, high) in zip(
            self.waiting, numbers, strict=True
        ):
            if not rows:
                continue
            self.layers.setdefault(layer, _Layer()).add(total, int(rows), low, high)
            if len(self.records) >= cap:
                self.dropped += 1
                continue
            self.records.append(
                {
                    "layer": layer,
                    "phase": phase,
                    "step": step,
                    "rows": int(rows),
                    "value": _rounded(total / rows),
                    "min": _rounded(low),
                    "max": _rounded(high),
                }
            )
        self.waiting.clear()


@attrs.frozen(kw_only=True, eq=False)
class AttentionMetric(Metric):
    """Base of metrics that compare the attention of a call with dense attention.

    A subclass has a ``name``, the ``value_of_full`` mask, and `measure`. Each call that is looked
    at gives one record: layer, phase, step (forward passes of the sample before it), the query rows
    that were measured, and the mean, least and greatest value. A layer that stays dense counts with
    ``value_of_full``, without being measured; query rows that may attend nothing (padding) do not
    count.

    The result has ``mean``, ``min`` and ``max`` over layers and rows, the mean per layer
    (``layers``), the number of ``rows`` (of all layers), and of the records kept and ``dropped``.
    """

    value_of_full: ClassVar[float]

    every: int = param(
        1,
        minimum=1,
        unit="query rows",
        help="measure each n-th query row of a sample; in decoding, each n-th step",
    )
    cap: int = param(1000, minimum=0, unit="records", help="most records kept per sample")
    _log: _Log = attrs.field(init=False, factory=_Log, repr=False)

    def measure(self, inputs: Inputs, mask: Mask, output: Tensor) -> Tensor:
        """The values of some query rows.

        Args:
            inputs: The call, for these rows.
            mask: What was selected for them.
            output: What attention gave them, ``(batch, query_len, heads, value_dim)``.

        Returns:
            float32 ``(batch, heads, query_len)``; ``(batch, 1, query_len)`` for a value of all
            heads together.
        """
        raise NotImplementedError

    @hookimpl
    def sah_attention_computed(self, inputs: Inputs, mask: Mask, output: Tensor) -> None:
        """Measure the chosen rows of a call; nothing waits for the device."""
        log = self._log
        log.enter(inputs)
        begin, end = -log.first_row % self.every, inputs.query_len
        if begin >= end:
            return
        if self.every > 1:
            inputs = inputs.rows(begin, end, self.every)
            mask = mask.rows(begin, end, self.every)
            output = output[:, begin : end : self.every]
        numbers = self._numbers(inputs, mask, output)
        log.waiting.append((inputs.layer, inputs.phase, log.step, numbers))
        if len(log.waiting) >= FETCH:
            log.fetch(self.cap)

    def reset(self) -> None:
        """Forget everything: a sample begins."""
        object.__setattr__(self, "_log", _Log())

    def result(self) -> dict[str, Any]:
        """Mean, extremes and means per layer of the sample."""
        self._log.fetch(self.cap)
        layers = self._log.layers
        return {
            **_summary({str(layer): layers[layer] for layer in sorted(layers)}),
            "records": len(self._log.records),
            "dropped": self._log.dropped,
        }

    def records(self) -> Sequence[Mapping[str, Any]]:
        """The calls that were measured, in order, up to the cap."""
        self._log.fetch(self.cap)
        return self._log.records

    @staticmethod
    def combine(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Result of a run from those of its samples; every query row counts the same."""
        layers: dict[str, _Layer] = {}
        for result in results:
            rows = result["rows"] // max(1, len(result["layers"]))
            for layer, mean in result["layers"].items():
                kept = layers.setdefault(layer, _Layer())
                kept.add(mean * rows, rows, result["min"], result["max"])
        return {
            **_summary(dict(sorted(layers.items(), key=lambda item: int(item[0])))),
            "records": sum(result["records"] for result in results),
            "dropped": sum(result["dropped"] for result in results),
        }

    def _numbers(self, inputs: Inputs, mask: Mask, output: Tensor) -> Tensor:
        """Sum over rows of the mean over heads, number of rows, least and greatest value."""
        counts = inputs.allowed.counts > 0
        valid = counts.any(1, keepdim=True).expand(inputs.batch, 1, inputs.query_len)
        if mask.is_full:
            rows = valid.sum().float()
            full = torch.full_like(rows, self.value_of_full)
            return torch.stack([rows * full, rows, full, full])
        values = torch.cat(
            [
                self.measure(inputs.rows(b, e), mask.rows(b, e), output[:, b:e])
                for b, e in _pieces(inputs)
            ],
            dim=-1,
        )
        total = torch.where(valid, values.mean(1, keepdim=True), 0.0).sum()
        low = torch.where(valid, values, float("inf")).amin()
        high = torch.where(valid, values, float("-inf")).amax()
        return torch.stack([total, valid.sum().float(), low, high])


def _pieces(inputs: Inputs) -> Iterator[tuple[int, int]]:
    """Runs of query rows whose logits are computed together."""
    batch, heads, query_len, key_len = inputs.shape
    size = max(1, PIECE // max(1, batch * heads * key_len))
    for begin in range(0, query_len, size):
        yield begin, min(query_len, begin + size)


def _summary(layers: Mapping[str, _Layer]) -> dict[str, Any]:
    used = {name: layer for name, layer in layers.items() if layer.rows}
    rows = sum(layer.rows for layer in used.values())
    total = sum(layer.total for layer in used.values())
    return {
        "mean": _rounded(total / rows) if rows else None,
        "min": _rounded(min(layer.low for layer in used.values())) if rows else None,
        "max": _rounded(max(layer.high for layer in used.values())) if rows else None,
        "layers": {name: _rounded(layer.total / layer.rows) for name, layer in used.items()},
        "rows": rows,
    }


def _rounded(number: float) -> float:
    """The digits that mean something, so that files stay small."""
    return float(f"{number:.{DIGITS}g}")
