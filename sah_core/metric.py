"""Metrics: observers that add up a result, named and configured like maskers.

A metric is written in three equal forms:

    MetricCall.parse("output-error(every=8, cap=1000)")
    MetricCall.parse({"metric": "output-error", "every": 8, "cap": 1000})
    MetricCall.parse(OutputError(every=8, cap=1000))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from .errors import ParameterError
from .parameters import from_plain, specs, to_plain
from .pipeline_text import format_call, parse_call

if TYPE_CHECKING:
    from .registry import Registry

__all__ = ["Metric", "MetricCall"]


class Metric:
    """Base of metric plugins; a class with `reset` and `result` will do as well.

    A subclass implements observer hooks (`sah_core.hookspecs.ObserverSpec`). One with parameters is
    ``@attrs.frozen(kw_only=True, eq=False)``, declares them by `sah_core.param`, and keeps what it
    adds up in a mutable object of its own, ``attrs.field(init=False, factory=...)``. It may say how
    the results of samples make that of a run, in ``combine(results) -> dict``; numbers are averaged
    otherwise.
    """

    name: ClassVar[str]

    def reset(self) -> None:
        """Start from zero: a sample begins."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """What was added up since `reset`, as JSON-able data without NaN."""
        raise NotImplementedError

    def records(self) -> Sequence[Mapping[str, Any]]:
        """Single observations since `reset`, as JSON-able data; a run keeps each as a line."""
        return ()


@attrs.frozen
class MetricCall:
    """A metric by name, with its parameters; every cell of a run makes its own instance.

    Attributes:
        name: the registered name.
        parameters: every parameter, as plain data.
    """

    name: str
    parameters: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def parse(cls, source: object, registry: Registry | None = None) -> MetricCall:
        """Reads a metric in any of its forms.

        Args:
            source: a text such as ``output-error(every=8)``, of which one argument without a name
                is the first parameter; a mapping such as ``{"metric": "output-error", "every": 8}``
                or ``{"output-error": {"every": 8}}``; a metric; or a `MetricCall`.
            registry: where names are looked up; the global one by default.

        Raises:
            PipelineSyntaxError: a text does not parse.
            ParameterError: a parameter does not exist or its value is not allowed, or `source` is
                nothing of the above.
            UnknownPluginError: no metric has this name; likewise the other errors of
                ``registry.metrics[name]``.
        """
        if isinstance(source, MetricCall):
            return source
        metrics = _registry(registry).metrics
        if hasattr(source, "result") and not isinstance(source, type):
            return cls(metrics.name_of(type(source)), to_plain(source))
        name, arguments = _call(source, _registry(registry))
        return cls(name, to_plain(from_plain(metrics[name], arguments)))

    @property
    def text(self) -> str:
        """The canonical text, which names every parameter."""
        return format_call(self.name, self.parameters)

    def make(self, registry: Registry | None = None) -> Any:
        """A new instance, which has observed nothing."""
        return from_plain(_registry(registry).metrics[self.name], self.parameters)

    def __str__(self) -> str:
        return self.text


def _call(source: object, registry: Registry) -> tuple[str, dict[str, Any]]:
    """The name and the parameters that a text or a mapping means."""
    if isinstance(source, str):
        step = parse_call(source, "metric")
        if step.positional is attrs.NOTHING:
            return step.name, step.arguments
        declared = specs(registry.metrics[step.name])
        if not declared or declared[0].name in step.arguments:
            expected = f"{declared[0].name} only once" if declared else "no parameters at all"
            raise ParameterError(step.name, "argument 1", step.positional, expected)
        return step.name, {declared[0].name: step.positional, **step.arguments}
    if isinstance(source, Mapping) and isinstance(source.get("metric"), str):
        return source["metric"], {k: v for k, v in source.items() if k != "metric"}
    if isinstance(source, Mapping) and len(source) == 1:
        [(name, parameters)] = source.items()
        if isinstance(name, str) and isinstance(parameters, Mapping | None):
            return name, dict(parameters or {})
    raise ParameterError(
        "Metric",
        "metric",
        source,
        "a name, a text such as 'output-error(every=8)', or a mapping such as "
        "{output-error: {every: 8}}",
    )


def _registry(given: Registry | None) -> Registry:
    from .registry import registry

    return registry if given is None else given
