"""The registry: plugins by kind and name, found through entry points and loaded on first use.

Listing reads package metadata only. A plugin is imported when its name is first used; one that
fails to import raises an error that names it and leaves all others usable.

    from sah_core import registry

    registry.maskers.names()
    registry.maskers["quest"](heavy_size=0.05)
    registry.load_file("my_masker.py")  # a plugin without a package

What the environment says, read when a kind is first looked at; items between commas are plugin
names, distribution names or ``distribution:name``:

* ``SAH_DISABLE_PLUGINS``: these are listed as disabled and cannot be used.
* ``SAH_LOAD_PLUGINS``: of the installed plugins only these can be used, and those of this project,
  which need not be named; the others are listed as disabled. Set but empty: no others. Plugins that
  a program registers or loads from a file are not concerned.
* ``SAH_TRACE_PLUGINS=1``: a line on stderr for every plugin that is loaded, with the time it took.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import fit, hookspecs
from .discovery import DISABLE_VARIABLE, LOAD_VARIABLE, Setting, all_entry_points
from .errors import PluginFileError
from .kind import Kind, PluginEntry

if TYPE_CHECKING:
    from .backend import Backend
    from .benchmark import Benchmark
    from .masker import Masker
    from .scorer import Scorer

__all__ = ["Kind", "PluginEntry", "Registry", "registry"]


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
        self._files: dict[Path, tuple[PluginEntry, ...]] = {}
        self.maskers: Kind[type[Masker]] = self._kind(
            "masker", hookspecs.MaskerSpec, fit.subclass_of("sah_core.masker.Masker", ("add_mask",))
        )
        self.adapters: Kind[type[Any]] = self._kind("adapter", hookspecs.AdapterSpec, fit.adapter)
        self.backends: Kind[type[Backend]] = self._kind(
            "backend",
            hookspecs.BackendSpec,
            fit.subclass_of("sah_core.backend.Backend", ("refuses", "attend")),
        )
        self.benchmarks: Kind[type[Benchmark]] = self._kind(
            "benchmark", hookspecs.BenchmarkSpec, fit.subclass_of("sah_core.benchmark.Benchmark")
        )
        self.scorers: Kind[Mapping[str, Scorer]] = self._kind(
            "scorer", hookspecs.ScorerSpec, fit.scorers
        )
        self.metrics: Kind[type[Any]] = self._kind("metric", hookspecs.MetricSpec, fit.metric)
        self.models: Kind[Callable[[], Any]] = self._kind("model", hookspecs.ModelSpec, fit.model)
        self.objectives: Kind[Callable[..., Any]] = self._kind(
            "objective", hookspecs.ObjectiveSpec, fit.function
        )

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

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were loaded, which another process must load to have the same plugins."""
        return tuple(self._files)

    def load_file(self, path: str | os.PathLike[str]) -> tuple[PluginEntry, ...]:
        """Loads plugins from a Python file that belongs to no package.

        The file implements hooks as the module of an entry point does, at most one per kind, and
        each plugin is named as its class is. Its distribution is the name of the file. Loading a
        file again does nothing.

        Args:
            path: the file.

        Returns:
            What was registered.

        Raises:
            PluginFileError: the file cannot be read or imported, or holds no plugin.
            PluginConflictError: a plugin that can be used has one of the names already.
        """
        from . import plugin_files

        full = Path(path).expanduser().resolve()
        if full not in self._files:
            self._files[full] = plugin_files.load(full, self.kinds())
        return self._files[full]

    def unload_file(self, path: str | os.PathLike[str]) -> None:
        """Takes out what `load_file` registered.

        Raises:
            PluginFileError: the file is not loaded.
        """
        full = Path(path).expanduser().resolve()
        if full not in self._files:
            raise PluginFileError(str(full), "it is not loaded, so that it cannot be taken out")
        kinds = {kind.singular: kind for kind in self.kinds()}
        for entry in self._files.pop(full):
            kinds[entry.kind].unregister(entry.name, entry.distribution)

    def unknown_settings(self) -> tuple[tuple[str, str], ...]:
        """Names in ``SAH_DISABLE_PLUGINS`` and ``SAH_LOAD_PLUGINS`` that fit no plugin."""
        settings = (Setting.read(DISABLE_VARIABLE), Setting.read(LOAD_VARIABLE))
        if not any(setting.items for setting in settings):
            return ()
        known = self.entries()
        return tuple(
            (setting.variable, item)
            for setting in settings
            for item in setting.items or ()
            if not any(
                Setting("", (item,)).names(entry.name, entry.distribution) for entry in known
            )
        )

    def problems(self) -> tuple[PluginEntry, ...]:
        """Every plugin that is broken, in conflict or incompatible; imports all that can be."""
        checked = [kind.check(entry.id) for kind in self.kinds() for entry in kind.entries()]
        marked = [entry for entry in self.entries() if entry.state == "conflict"]
        broken = [entry for entry in checked if entry.state in ("broken", "incompatible")]
        return (*broken, *marked)

    def _kind(self, singular: str, spec: type, fits: fit.Fit) -> Kind[Any]:
        return Kind(singular, spec, self._find, fits)

    def _find(self, group: str) -> list[importlib.metadata.EntryPoint]:
        if self._points is None:
            self._points = all_entry_points()
        return list(self._points.select(group=group))


registry = Registry()
