"""The registry: plugins by kind and name, found through entry points and loaded on first use.

Listing reads package metadata only. A plugin is imported when its name is first used; one that
fails to import raises an error that names it and leaves all others usable.

    from sah_core import registry

    registry.maskers.names()
    registry.maskers["quest"](heavy_size=0.05)
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from . import hookspecs
from .kind import DISABLE_VARIABLE, Kind, PluginEntry, normalised

if TYPE_CHECKING:
    from .backend import Backend
    from .benchmark import Benchmark
    from .masker import Masker
    from .scorer import Scorer

__all__ = ["DISABLE_VARIABLE", "Kind", "PluginEntry", "Registry", "registry"]

_log = logging.getLogger(__name__)


class Registry:
    """All plugins, by kind.

    Each registry discovers and loads for itself; `sah_core.registry` is the one that everything
    uses unless told otherwise.

    Attributes:
        maskers: classes of `Masker`.
        adapters: classes that answer requests with a model.
        backends: classes of `Backend`.
        benchmarks: classes of `Benchmark`.
        scorers: families of metrics, each a mapping from a metric's name to its `Scorer`.
        metrics: classes of observers with a result.
        models: functions that find the files of a model alias.
        objectives: what tuning runs optimise.
    """

    def __init__(self) -> None:
        self._points: importlib.metadata.EntryPoints | None = None
        self.maskers: Kind[type[Masker]] = self._kind("masker", hookspecs.MaskerSpec)
        self.adapters: Kind[type[Any]] = self._kind("adapter", hookspecs.AdapterSpec)
        self.backends: Kind[type[Backend]] = self._kind("backend", hookspecs.BackendSpec)
        self.benchmarks: Kind[type[Benchmark]] = self._kind("benchmark", hookspecs.BenchmarkSpec)
        self.scorers: Kind[Mapping[str, Scorer]] = self._kind("scorer", hookspecs.ScorerSpec)
        self.metrics: Kind[type[Any]] = self._kind("metric", hookspecs.MetricSpec)
        self.models: Kind[Callable[[], Any]] = self._kind("model", hookspecs.ModelSpec)
        self.objectives: Kind[Callable[..., Any]] = self._kind("objective", hookspecs.ObjectiveSpec)

    def __repr__(self) -> str:
        return f"<registry of {', '.join(kind.plural for kind in self.kinds())}>"

    def kinds(self) -> tuple[Kind[Any], ...]:
        """All kinds, in a fixed order."""
        return (
            self.maskers,
            self.adapters,
            self.backends,
            self.benchmarks,
            self.scorers,
            self.metrics,
            self.models,
            self.objectives,
        )

    def entries(self) -> tuple[PluginEntry, ...]:
        """Every plugin of every kind; nothing is imported."""
        return tuple(entry for kind in self.kinds() for entry in kind.entries())

    def _kind(self, singular: str, spec: type) -> Kind[Any]:
        return Kind(singular, spec, self._find)

    def _find(self, group: str) -> list[importlib.metadata.EntryPoint]:
        if self._points is None:
            self._points = _all_entry_points()
        return list(self._points.select(group=group))


def _all_entry_points() -> importlib.metadata.EntryPoints:
    try:
        return cast(importlib.metadata.EntryPoints, importlib.metadata.entry_points())
    except Exception:
        # One malformed entry_points.txt anywhere makes the function above raise.
        return importlib.metadata.EntryPoints(_readable_entry_points())


def _readable_entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = normalised(distribution.name or "")
        if name in seen:
            continue
        seen.add(name)
        try:
            yield from distribution.entry_points
        except Exception as error:
            _log.warning("the entry points of distribution %r are unreadable: %s", name, error)


registry = Registry()
