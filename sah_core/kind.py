"""One kind of plugins: names, states, loading on first use."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import attrs
import pluggy

from . import hookspecs
from .errors import (
    BrokenPluginError,
    PluginConflictError,
    PluginDisabledError,
    UnknownPluginError,
    nearest_names,
)

__all__ = ["DISABLE_VARIABLE", "Kind", "PluginEntry"]

T = TypeVar("T")

DISABLE_VARIABLE = "SAH_DISABLE_PLUGINS"

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def normalised(distribution: str) -> str:
    """The one spelling under which package indexes know a distribution."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@attrs.frozen(kw_only=True)
class PluginEntry:
    """What is known about a plugin without importing it.

    Attributes:
        kind: the kind in the singular, such as ``masker``.
        name: the registered name.
        distribution: the distribution that ships it; ``local`` for one registered in this process.
        version: the distribution's version; empty for a local one.
        entry_point: the entry point's value; for a local plugin, what was registered.
        state: ``ok``, ``disabled``, ``conflict``, or after a check ``broken``.
        reason: why it is broken, on one line.
    """

    kind: str
    name: str
    distribution: str
    version: str
    entry_point: str
    state: str = "ok"
    reason: str = ""

    @property
    def id(self) -> str:
        """The name that no other distribution can take: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"


@attrs.define
class _Plugin:
    """An entry with the means to load it."""

    entry: PluginEntry
    load: Callable[[], object]
    value: Any = None


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
    ) -> None:
        self.singular = singular
        self.plural = f"{singular}s"
        self.group = f"{hookspecs.PROJECT}.{self.plural}"
        self.hook = f"{hookspecs.PROJECT}_{singular}"
        self._spec = spec
        self._find = find
        self._known: dict[str, list[_Plugin]] | None = None
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(spec)

    def __repr__(self) -> str:
        return f"<{self.plural}: {', '.join(self.names())}>"

    def __getitem__(self, name: str) -> T:
        """The plugin's class, imported on first use.

        Raises:
            UnknownPluginError: no plugin has this name.
            PluginDisabledError: ``SAH_DISABLE_PLUGINS`` names it.
            PluginConflictError: several distributions have it.
            BrokenPluginError: it cannot be loaded.
        """
        return self._value(self._choose(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(
            plugin.entry.state != "disabled" for plugin in self._matching(name)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> tuple[str, ...]:
        """The names that can be used, sorted; nothing is imported."""
        return tuple(sorted({e.name for e in self.entries() if e.state != "disabled"}))

    def entries(self) -> tuple[PluginEntry, ...]:
        """Every plugin found, disabled ones included, sorted; nothing is imported."""
        found = [plugin.entry for plugins in self._plugins().values() for plugin in plugins]
        return tuple(sorted(found, key=lambda entry: (entry.name, entry.distribution)))

    def entry(self, name: str) -> PluginEntry:
        """What is known about one plugin; raises as ``kind[name]`` does, but imports nothing."""
        return self._choose(name).entry

    def check(self, name: str) -> PluginEntry:
        """Imports one plugin and says how that went.

        Args:
            name: a registered name, or ``distribution:name``.

        Returns:
            Its entry: ``ok``, ``broken`` with the reason, ``conflict`` or ``disabled``.

        Raises:
            UnknownPluginError: no plugin has this name.
        """
        try:
            plugin = self._choose(name)
        except (PluginConflictError, PluginDisabledError):
            return self._matching(name)[0].entry
        try:
            self._value(plugin)
        except BrokenPluginError as error:
            return attrs.evolve(plugin.entry, state="broken", reason=error.reason)
        return plugin.entry

    def name_of(self, value: object) -> str:
        """The name by which ``kind[name]`` finds `value`: its own ``name``, qualified if need be.

        A class that is not registered keeps its own name.
        """
        name = str(getattr(value, "name", None) or getattr(value, "__name__", value))
        usable = [p for p in self._matching(name) if p.entry.state != "disabled"]
        for plugin in usable if len(usable) > 1 else ():
            try:
                if self._value(plugin) is value:
                    return plugin.entry.id
            except BrokenPluginError:
                continue
        return name

    def register(self, name: str, plugin: object, distribution: str = "local") -> None:
        """Adds a plugin of this process, without an entry point.

        Args:
            name: the name to register; lower-case letters, digits, hyphens and dots.
            plugin: the class itself (or the factory), or a module or instance with the hook.
            distribution: the name of its origin.

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
            entry_point=getattr(plugin, "__qualname__", None) or repr(plugin),
        )
        self._add(_Plugin(entry, lambda: self._carrier(plugin)))

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
            for point in self._find(self.group):
                entry = PluginEntry(
                    kind=self.singular,
                    name=point.name,
                    distribution=point.dist.name if point.dist else "unknown",
                    version=point.dist.version if point.dist else "",
                    entry_point=point.value,
                )
                self._add(_Plugin(entry, point.load))
        return self._known

    def _add(self, plugin: _Plugin) -> None:
        name = plugin.entry.name
        blocked = {part.strip() for part in os.environ.get(DISABLE_VARIABLE, "").split(",")}
        if name in blocked or plugin.entry.id in blocked:
            self._manager.set_blocked(plugin.entry.id)
        self._plugins().setdefault(name, []).append(plugin)
        self._mark(name)

    def _mark(self, name: str) -> None:
        """Brings the states of the plugins of one name up to date."""
        plugins = self._plugins()[name]
        blocked = [self._manager.is_blocked(plugin.entry.id) for plugin in plugins]
        usable_state = "conflict" if blocked.count(False) > 1 else "ok"
        for plugin, is_blocked in zip(plugins, blocked, strict=True):
            state = "disabled" if is_blocked else usable_state
            plugin.entry = attrs.evolve(plugin.entry, state=state)

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
        usable = [plugin for plugin in plugins if plugin.entry.state != "disabled"]
        if not usable:
            raise PluginDisabledError(self.singular, name)
        if len(usable) > 1:
            owners = tuple(sorted(plugin.entry.distribution for plugin in usable))
            raise PluginConflictError(self.singular, name, owners)
        return usable[0]

    def _value(self, plugin: _Plugin) -> T:
        if plugin.value is None:
            entry = plugin.entry
            try:
                plugin.value = self._load(plugin)
            except (Exception, SystemExit) as error:
                # Foreign code: whatever it raises, only this plugin is unusable.
                if self._manager.has_plugin(entry.id):
                    self._manager.unregister(name=entry.id)
                cause = str(error) if isinstance(error, _Unfit) else error
                raise BrokenPluginError(
                    entry.kind, entry.name, entry.distribution, entry.entry_point, cause
                ) from error
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
        if value is None:
            raise _Unfit(f"its hook {self.hook} returned None")
        own_name = getattr(value, "name", None)
        if isinstance(own_name, str) and own_name != plugin.entry.name:
            raise _Unfit(f"its class is named {own_name!r}: name it as it is registered")
        return cast(object, value)

    def _carrier(self, plugin: object) -> object:
        """The object that carries the hook: `plugin`, or one that returns `plugin` from it."""
        if hasattr(plugin, self.hook) or not callable(plugin):
            return plugin
        carrier = _Carrier()
        setattr(carrier, self.hook, hookspecs.hookimpl(lambda: plugin))
        return carrier


class _Carrier:
    """Stands in for the module of a plugin that was registered as a bare class."""


class _Unfit(Exception):
    """A plugin loads but is not what its kind asks for; the message says why."""
