"""What is known of installed plugins from package metadata and the environment.

Nothing here imports a plugin.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import cast

import attrs

__all__ = [
    "DISABLE_VARIABLE",
    "DISTRIBUTION",
    "LOAD_VARIABLE",
    "TRACE_VARIABLE",
    "Setting",
    "all_entry_points",
    "missed_requirement",
    "normalised",
    "trace",
]

DISTRIBUTION = "sparse-attention-hub"

DISABLE_VARIABLE = "SAH_DISABLE_PLUGINS"
LOAD_VARIABLE = "SAH_LOAD_PLUGINS"
TRACE_VARIABLE = "SAH_TRACE_PLUGINS"

_log = logging.getLogger(__name__)


def normalised(distribution: str) -> str:
    """The one spelling under which package indexes know a distribution."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@attrs.frozen
class Setting:
    """Plugins that an environment variable names.

    Attributes:
        variable: the variable.
        items: plugin names, distribution names or ``distribution:name``; None if it is not set.
    """

    variable: str
    items: tuple[str, ...] | None

    @classmethod
    def read(cls, variable: str) -> Setting:
        """The variable as it is now: names between commas; an empty one names nothing."""
        text = os.environ.get(variable)
        if text is None:
            return cls(variable, None)
        return cls(variable, tuple(filter(None, (part.strip() for part in text.split(",")))))

    def names(self, name: str, distribution: str) -> bool:
        """Whether the variable names a plugin: alone, with its distribution, or by that alone."""
        return any(_names_plugin(item, name, normalised(distribution)) for item in self.items or ())


def _names_plugin(item: str, name: str, distribution: str) -> bool:
    owner, colon, bare = item.rpartition(":")
    if colon:
        return bare == name and normalised(owner) == distribution
    return item == name or normalised(item) == distribution


def missed_requirement(dist: importlib.metadata.Distribution) -> str:
    """Why a distribution does not go with the installed version of this project, in words.

    A plugin package says which versions it works with the usual way, by a dependency such as
    ``sparse-attention-hub>=0.1,<0.2``. pip does not keep it when either side is upgraded later, so
    it is looked at again here.

    Returns:
        The requirement and the installed version; empty if they go together, or nothing is
        required.
    """
    if normalised(dist.name) == DISTRIBUTION:
        return ""
    wanted = [line for line in dist.requires or () if _is_on_us(line)]
    if not wanted:
        return ""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        installed = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""
    for line in wanted:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(installed, prereleases=True):
            text = f"{requirement.name}{requirement.specifier}"
            return f"it requires {text}, but {installed} is installed"
    return ""


def _is_on_us(line: str) -> bool:
    match = re.match(r"\s*([A-Za-z0-9._-]+)", line)
    return match is not None and normalised(match[1]) == DISTRIBUTION


def trace(message: str) -> None:
    """Says one thing about a plugin on stderr, if ``SAH_TRACE_PLUGINS`` asks for it."""
    if os.environ.get(TRACE_VARIABLE, "0") not in ("", "0"):
        sys.stderr.write(f"sah plugins: {message}\n")


def all_entry_points() -> importlib.metadata.EntryPoints:
    """The entry points of everything that is installed; what is unreadable is left out."""
    try:
        return cast(importlib.metadata.EntryPoints, importlib.metadata.entry_points())
    except Exception:  # one malformed entry_points.txt anywhere raises, each flaw something else
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
        except Exception as error:  # as above; here it is known whose file it is
            _log.warning("the entry points of distribution %r are unreadable: %s", name, error)
