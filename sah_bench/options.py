"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

MODEL_HELP = "Alias, hub id, folder or GGUF file."
PIPELINE_HELP = "Such as 'sink(128) | local(128)'."
DEVICE_HELP = "Such as cpu or cuda:0; CUDA if there is one."
DTYPE_HELP = "Of the weights: float32, bfloat16, float16 or auto; float32 on a CPU, else bfloat16."

DEBUG = "sah_bench.debug"
"""Key in ``ctx.meta`` under which the whole command line knows that tracebacks are wanted."""

PLUGIN_FILES = "sah_bench.plugin_files"
"""Key in ``ctx.meta`` for the plugin files that stand before the subcommand, not loaded yet."""

STRICT = "sah_bench.strict"
"""Key in ``ctx.meta`` for ``--strict-plugins`` before the subcommand."""


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


def debug_option(function: F) -> F:
    """Add ``--debug``, before or after the name of the subcommand."""
    option = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember,
        help="Show tracebacks of errors.",
    )
    return option(function)


def _load_or_remember(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    if not value or ctx.resilient_parsing:
        return
    if ctx.parent is None:
        # what loading raises is shown as one line only once the group runs
        ctx.meta[PLUGIN_FILES] = value
        return
    load_plugin_files(value)


def load_plugin_files(paths: tuple[str, ...]) -> None:
    """Load plugins from files, so that the rest of the command finds them by name."""
    from sah_core import registry

    for path in paths:
        registry.load_file(path)


def _refuse_or_remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    if ctx.parent is None:
        ctx.meta[STRICT] = True
        return
    refuse_unusable_plugins()


def refuse_unusable_plugins() -> None:
    """Import all plugins, those of files that were loaded included.

    Raises:
        UnusablePluginsError: If any is broken, in conflict or incompatible.
    """
    from sah_core import registry
    from sah_core.errors import UnusablePluginsError

    found = registry.problems()
    if found:
        raise UnusablePluginsError(tuple((p.kind, p.id, p.state, p.reason) for p in found))


def plugin_names(*plurals: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What completes the names of plugins of some kinds, of all if none is named.

    Names come from metadata: a tab imports no plugin.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        from sah_core import registry

        kinds = [kind for kind in registry.kinds() if not plurals or kind.plural in plurals]
        names = {name for kind in kinds for name in kind.names()}
        return sorted(name for name in names if name.startswith(incomplete))

    return complete


def kind_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What completes the kinds of plugins."""
    from sah_core import registry

    return [kind.plural for kind in registry.kinds() if kind.plural.startswith(incomplete)]


def plugin_option(function: F) -> F:
    """Add ``--plugin FILE.py`` and ``--strict-plugins``, before or after the name of the
    subcommand.
    """
    strict = click.option(
        "--strict-plugins",
        is_flag=True,
        expose_value=False,
        callback=_refuse_or_remember,
        help="Import all plugins and stop if any is broken, in conflict or incompatible.",
    )
    files = click.option(
        "--plugin",
        "plugin_files",
        multiple=True,
        metavar="FILE.py",
        expose_value=False,
        is_eager=True,
        callback=_load_or_remember,
        help="Load plugins from a file without a package; may be repeated.",
    )
    return files(strict(function))
