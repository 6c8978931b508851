"""One kind of plugins: names, states, loading on first use."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import attrs
import pluggy

from . import hookspecs
from .discovery import (
    DISABLE_VARIABLE,
    DISTRIBUTION,
    LOAD_VARIABLE,
    Setting,
    missed_requirement,
    normalised,
    trace,
)
from .errors import (
    BrokenPluginError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginDisabledError,
    SahError,
    UnknownPluginError,
    nearest_names,
)
from .fit import Fit

__all__ = ["Carrier", "Kind", "PluginEntry"]

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@attrs.frozen(kw_only=True)
class PluginEntry:
    """What is known about a plugin without importing it.

    Attributes:
        kind: the kind in the singular, such as ``masker``.
        name: the registered name.
        distribution: the distribution that ships it; ``local`` for one registered in this process,
            the file's name for one that `Registry.load_file` loaded.
        version: the distribution's version; empty without one.
        entry_point: the entry point's value; for a local plugin, what was registered; the file's
            path for one from a file.
        state: ``ok``, ``disabled``, ``conflict``, ``incompatible``, or after a check ``broken``.
        reason: why it is not ok, on one line.
        checked: whether it was imported; otherwise ``ok`` is what the metadata say.
    """

    kind: str
    name: str
    distribution: str
    version: str
    entry_point: str
    state: str = "ok"
    reason: str = ""
    checked: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether its name alone or its `id` leads to it, as far as was checked."""
        return self.state in ("ok", "conflict")

    @property
    def id(self) -> str:
        """The name that no other distribution can take: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"


@attrs.define
class _Plugin:
    """An entry with the means to load it."""

    entry: PluginEntry
    load: Callable[[], object]
    barred: tuple[str, str] = ("", "")
    value: Any = None

    @property
    def is_usable(self) -> bool:
        """Whether nothing known without importing it speaks against it."""
        return not self.barred[0]


class Kind(Generic[T]):
    """The plugins of one kind, by name.

    ``kind[name]`` is what the plugin's hook returns: a class, as a rule. A name that several
    distributions register is chosen by ``distribution:name``.
    """

    def __init__(
        self,
        singular: str,
        spec: type,
        find: Callable[[str], list[importlib.metadata.EntryPoint]],
        fit: Fit,
    ) -> None:
        self.singular = singular
        self.plural = f"{singular}s"
        self.group = f"{hookspecs.PROJECT}.{self.plural}"
        self.hook = f"{hookspecs.PROJECT}_{singular}"
        self._spec = spec
        self._find = find
        self._fit = fit
        self._known: dict[str, list[_Plugin]] | None = None
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(spec)

    def __repr__(self) -> str:
        return f"<{self.plural}: {', '.join(self.names())}>"

    def __getitem__(self, name: str) -> T:
        """The plugin's class, imported on first use.

        Raises:
            UnknownPluginError: no plugin has this name.
            PluginDisabledError: ``SAH_DISABLE_PLUGINS`` names it, or ``SAH_LOAD_PLUGINS`` is set
                and does not.
            IncompatiblePluginError: its distribution requires another version of this project.
            PluginConflictError: several distributions have it.
            BrokenPluginError: it cannot be loaded.
        """
        return self._value(self._choose(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(plugin.is_usable for plugin in self._matching(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> tuple[str, ...]:
        """The names that can be used, sorted; nothing is imported."""
        return tuple(sorted({entry.name for entry in self.entries() if entry.is_usable}))

    def entries(self) -> tuple[PluginEntry, ...]:
        """Every plugin found, disabled ones included, sorted; nothing is imported."""
        found = [plugin.entry for plugins in self._plugins().values() for plugin in plugins]
        return tuple(sorted(found, key=lambda entry: (entry.name, entry.distribution)))

    def entry(self, name: str) -> PluginEntry:
        """What is known about one plugin; raises as ``kind[name]`` does, but imports nothing."""
        return self._choose(name).entry

    def entry_of(self, name: str, distribution: str) -> PluginEntry:
        """What is known about the plugin of one distribution, whatever its state.

        Raises:
            UnknownPluginError: if there is none.
        """
        found = self._matching(f"{distribution}:{name}")
        if not found:
            raise UnknownPluginError(self.singular, f"{distribution}:{name}")
        return found[0].entry

    def check(self, name: str) -> PluginEntry:
        """Imports one plugin and says how that went.

        Args:
            name: a registered name, or ``distribution:name``.

        Returns:
            Its entry with its state, and the reason if it is not ``ok``.

        Raises:
            UnknownPluginError: no plugin has this name.
        """
        try:
            plugin = self._choose(name)
        except (PluginConflictError, PluginDisabledError, IncompatiblePluginError):
            return self._matching(name)[0].entry
        try:
            self._value(plugin)
        except BrokenPluginError as error:
            return attrs.evolve(plugin.entry, state="broken", reason=error.reason, checked=True)
        return attrs.evolve(plugin.entry, checked=True)

    def name_of(self, value: object) -> str:
        """The name by which ``kind[name]`` finds `value`: its own ``name``, qualified if need be.

        A class that is not registered keeps its own name.
        """
        name = str(getattr(value, "name", None) or getattr(value, "__name__", value))
        usable = [p for p in self._matching(name) if p.is_usable]
        for plugin in usable if len(usable) > 1 else ():
            try:
                if self._value(plugin) is value:
                    return plugin.entry.id
            except BrokenPluginError:
                continue
        return name

    def misfit(self, value: object) -> str:
        """Why what a hook returned is no plugin of this kind; empty if it is one."""
        reason = "None" if value is None else self._fit(value)
        return f"its hook {self.hook} returned {reason}" if reason else ""

    def register(
        self,
        name: str,
        plugin: object,
        distribution: str = "local",
        entry_point: str | None = None,
    ) -> None:
        """Adds a plugin of this process, without an entry point.

        ``SAH_LOAD_PLUGINS`` does not keep it out; ``SAH_DISABLE_PLUGINS`` does.

        Args:
            name: the name to register; lower-case letters, digits, hyphens and dots.
            plugin: the class itself (or the factory), or a module or instance with the hook.
            distribution: the name of its origin.
            entry_point: what `PluginEntry.entry_point` shows; the plugin's own name by default.

        Raises:
            ValueError: if `name` is no such name.
            PluginConflictError: if the same origin already has a plugin of this name.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no plugin name: use lower-case letters, digits, hyphens and dots"
            )
        if self._matching(f"{distribution}:{name}"):
            raise PluginConflictError(self.singular, name, (distribution,))
        entry = PluginEntry(
            kind=self.singular,
            name=name,
            distribution=distribution,
            version="",
            entry_point=entry_point or getattr(plugin, "__qualname__", None) or repr(plugin),
        )
        barred = _disabled(name, distribution)
        self._add(_Plugin(entry, lambda: self._carrier(plugin), barred))

    def unregister(self, name: str, distribution: str = "local") -> None:
        """Takes out a plugin that `register` added.

        Raises:
            UnknownPluginError: if there is none.
        """
        found = self._matching(f"{distribution}:{name}")
        if not found:
            raise UnknownPluginError(self.singular, f"{distribution}:{name}")
        [plugin] = found
        if self._manager.has_plugin(plugin.entry.id):
            self._manager.unregister(name=plugin.entry.id)
        self._plugins()[name].remove(plugin)
        self._mark(name)

    def _plugins(self) -> dict[str, list[_Plugin]]:
        if self._known is None:
            self._known = {}
            missed = functools.cache(missed_requirement)
            for point in self._find(self.group):
                entry = PluginEntry(
                    kind=self.singular,
                    name=point.name,
                    distribution=point.dist.name if point.dist else "unknown",
                    version=point.dist.version if point.dist else "",
                    entry_point=point.value,
                )
                barred = _disabled(entry.name, entry.distribution, installed=True)
                reason = "" if barred[0] or point.dist is None else missed(point.dist)
                if reason:
                    barred = ("incompatible", reason)
                self._add(_Plugin(entry, point.load, barred))
        return self._known

    def _add(self, plugin: _Plugin) -> None:
        name = plugin.entry.name
        if not plugin.is_usable:
            self._manager.set_blocked(plugin.entry.id)
        self._plugins().setdefault(name, []).append(plugin)
        self._mark(name)

    def _mark(self, name: str) -> None:
        """Brings the states of the plugins of one name up to date."""
        plugins = self._plugins()[name]
        usable = [plugin for plugin in plugins if plugin.is_usable]
        for plugin in plugins:
            state, reason = plugin.barred
            others = [p.entry.distribution for p in usable if p is not plugin]
            if plugin.is_usable and others:
                state = "conflict"
                owners = " and ".join(repr(owner) for owner in sorted(others))
                reason = f"{owners} has this name too: write {plugin.entry.id!r}"
            plugin.entry = attrs.evolve(plugin.entry, state=state or "ok", reason=reason)

    def _matching(self, name: str) -> list[_Plugin]:
        distribution, colon, bare = name.rpartition(":")
        plugins = self._plugins().get(bare, [])
        if not colon:
            return list(plugins)
        wanted = normalised(distribution)
        return [p for p in plugins if normalised(p.entry.distribution) == wanted]

    def _choose(self, name: str) -> _Plugin:
        plugins = self._matching(name) if isinstance(name, str) else []
        if not plugins:
            bare = str(name).rpartition(":")[2]
            raise UnknownPluginError(self.singular, name, nearest_names(bare, self.names()))
        usable = [plugin for plugin in plugins if plugin.is_usable]
        if not usable:
            raise self._barred(plugins, name)
        if len(usable) > 1:
            owners = tuple(sorted(plugin.entry.distribution for plugin in usable))
            raise PluginConflictError(self.singular, name, owners)
        return usable[0]

    def _barred(self, plugins: list[_Plugin], name: str) -> SahError:
        """The error that says why none of the plugins of a name can be used."""
        for plugin in plugins:
            entry = plugin.entry
            if entry.state == "incompatible":
                return IncompatiblePluginError(
                    entry.kind, entry.name, entry.distribution, entry.version, entry.reason
                )
        return PluginDisabledError(self.singular, name, plugins[0].entry.reason)

    def _value(self, plugin: _Plugin) -> T:
        if plugin.value is None:
            entry = plugin.entry
            origin = f"{entry.kind} {entry.id} ({entry.entry_point})"
            begin = time.perf_counter()
            try:
                plugin.value = self._load(plugin)
                trace(f"loaded {origin} in {1000 * (time.perf_counter() - begin):.1f} ms")
            except (Exception, SystemExit) as error:
                # Foreign code: whatever it raises, only this plugin is unusable.
                if self._manager.has_plugin(entry.id):
                    self._manager.unregister(name=entry.id)
                cause = str(error) if isinstance(error, _Unfit) else error
                broken = BrokenPluginError(
                    entry.kind, entry.name, entry.distribution, entry.entry_point, cause
                )
                trace(f"{origin} is broken: {broken.reason}")
                raise broken from error
        return cast(T, plugin.value)

    def _load(self, plugin: _Plugin) -> object:
        loaded = plugin.load()
        if isinstance(loaded, type):
            raise _Unfit(f"the entry point names the class {loaded.__name__}, not its module")
        self._manager.register(loaded, plugin.entry.id)
        self._manager.check_pending()
        caller = getattr(self._manager.hook, self.hook)
        if not any(impl.plugin is loaded for impl in caller.get_hookimpls()):
            raise _Unfit(f"it does not implement the hook {self.hook}")
        others = [other for other in self._manager.get_plugins() if other is not loaded]
        value = self._manager.subset_hook_caller(self.hook, others)()
        misfit = self.misfit(value)
        if misfit:
            raise _Unfit(misfit)
        own_name = getattr(value, "name", None)
        if isinstance(own_name, str) and own_name != plugin.entry.name:
            raise _Unfit(f"its class is named {own_name!r}: name it as it is registered")
        return cast(object, value)

    def _carrier(self, plugin: object) -> object:
        """The object that carries the hook: `plugin`, or one that returns `plugin` from it."""
        if hasattr(plugin, self.hook) or not callable(plugin):
            return plugin
        return Carrier(self.hook, hookspecs.hookimpl(lambda: plugin))


def _disabled(name: str, distribution: str, *, installed: bool = False) -> tuple[str, str]:
    """``disabled`` and why, if the environment keeps a plugin out; else two empty texts."""
    if Setting.read(DISABLE_VARIABLE).names(name, distribution):
        return "disabled", f"{DISABLE_VARIABLE} names it"
    wanted = Setting.read(LOAD_VARIABLE)
    if installed and wanted.items is not None and normalised(distribution) != DISTRIBUTION:
        if wanted.names(name, distribution):
            return "", ""
        return "disabled", f"{LOAD_VARIABLE} does not name it"
    return "", ""


class Carrier:
    """Stands in for the module of a plugin that has none, or shares it with other kinds."""

    def __init__(self, hook: str, implementation: Callable[[], object]) -> None:
        setattr(self, hook, implementation)


class _Unfit(Exception):
    """A plugin loads but is not what its kind asks for; the message says why."""
