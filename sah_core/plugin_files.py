"""Plugins in a file of their own, without a package: one hook implementation per kind."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import PluginConflictError, PluginFileError, nearest_names, one_line
from .hookspecs import PROJECT
from .kind import Carrier, Kind, PluginEntry

__all__ = ["FILE_PREFIX", "load"]

_MARK = f"{PROJECT}_impl"

FILE_PREFIX = "sah_plugin_file_"
"""Begin of the names of the modules that files become."""


def load(path: Path, kinds: Sequence[Kind[Any]]) -> tuple[PluginEntry, ...]:
    """Imports a file and registers what its hooks return; all of it or, on an error, nothing.

    Args:
        path: a Python file.
        kinds: where to register.

    Raises:
        PluginFileError: the file cannot be read or imported, or has no hook.
        PluginConflictError: a name is taken.
    """
    module = _imported(path)
    try:
        plugins = _plugins(module, path, kinds)
    except PluginFileError:
        sys.modules.pop(module.__name__, None)
        raise
    done: list[tuple[Kind[Any], str]] = []
    try:
        for kind, name, carrier in plugins:
            _register(kind, name, carrier, path)
            done.append((kind, name))
    except (PluginConflictError, PluginFileError):
        for kind, name in done:
            kind.unregister(name, path.name)
        sys.modules.pop(module.__name__, None)
        raise
    return tuple(kind.entry_of(name, path.name) for kind, name in done)


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "there is no such file"
        raise PluginFileError(str(path), reason)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"{FILE_PREFIX}{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginFileError(str(path), "it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that classes in it can be pickled and their source found
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # foreign code raises what it likes
        del sys.modules[name]
        text = one_line(f"{type(error).__name__}: {error}")
        raise PluginFileError(str(path), f"it cannot be imported: {text}") from error
    return module


def _plugins(
    module: ModuleType, path: Path, kinds: Sequence[Kind[Any]]
) -> list[tuple[Kind[Any], str, Carrier]]:
    hooks = {kind.hook: kind for kind in kinds}
    marked = [name for name, value in vars(module).items() if hasattr(value, _MARK)]
    for name in marked:
        if name not in hooks:
            nearest = nearest_names(name, hooks)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise PluginFileError(str(path), f"it implements the unknown hook {name!r}{hint}")
    if not marked:
        bare = [name for name in hooks if hasattr(module, name)]
        reason = f"{bare[0]} lacks @hookimpl" if bare else "no function in it carries @hookimpl"
        raise PluginFileError(str(path), f"it has no plugin: {reason}")
    plugins = []
    for name in marked:
        try:
            value = getattr(module, name)()
        except Exception as error:  # foreign code raises what it likes
            text = one_line(f"{type(error).__name__}: {error}")
            raise PluginFileError(str(path), f"its hook {name} fails: {text}") from error
        misfit = hooks[name].misfit(value)
        if misfit:
            raise PluginFileError(str(path), misfit)
        own = getattr(value, "name", None)
        carrier = Carrier(name, getattr(module, name))
        plugins.append((hooks[name], own if isinstance(own, str) else _name_of(path), carrier))
    return plugins


def _name_of(path: Path) -> str:
    """The name of a plugin that has none, such as a function that finds a model."""
    return path.stem.lower().replace("_", "-")


def _register(kind: Kind[Any], name: str, carrier: Carrier, path: Path) -> None:
    taken = [e.distribution for e in kind.entries() if e.name == name and e.is_usable]
    if taken:
        raise PluginConflictError(kind.singular, name, (*sorted(taken), path.name), str(path))
    try:
        kind.register(name, carrier, distribution=path.name, entry_point=str(path))
    except ValueError as error:
        raise PluginFileError(str(path), str(error)) from error
