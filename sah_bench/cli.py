"""The command line: subcommands that load on first use, and one place where errors become text.

Nothing heavy is imported here: ``sah-bench --help`` costs Python, click and this file.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any

import click

from .options import (
    DEBUG,
    PLUGIN_FILES,
    STRICT,
    debug_option,
    load_plugin_files,
    plugin_option,
    refuse_unusable_plugins,
)

COMMANDS = {
    "run": ("run", "Run models x pipelines x benchmarks and compare them."),
    "ask": ("ask", "Ask questions about a text; answers of pipelines side by side."),
    "plugins": ("plugins", "List the plugins that are installed, describe or check one."),
    "verify": ("verify", "Check plugins against expected results."),
    "data": ("data", "List, fetch or check the data of benchmarks."),
    "score": ("score", "Score finished results again, without the model."),
    "export": ("export", "Write predictions as the leaderboard of a benchmark takes them."),
    "profile": ("profile", "Measure time, bytes and memory of pipelines beside dense attention."),
    "artifacts": ("artifacts", "Make, convert or look into the files that methods learn offline."),
    "env": ("env", "Show versions, devices and where models come from."),
}
"""Name of a subcommand: its module under `sah_bench.commands`, and the line that ``--help`` shows.

The line stands here because click imports every subcommand to ask it for its help.
"""

_PLUGIN_SETTINGS = ("SAH_DISABLE_PLUGINS", "SAH_LOAD_PLUGINS")

_RESUMED = ("run",)
"""The subcommands that go on where they were interrupted."""

_SEVERAL = re.compile(r"\(Did you mean one of: (.*)\?\)$")

FAULT = 1
BAD_INPUT = 2
INTERRUPTED = 130


class BadUsage(click.ClickException):
    """A command line that click cannot read, said on one line."""

    exit_code = BAD_INPUT

    def __init__(self, error: click.UsageError) -> None:
        message = " ".join(error.format_message().split()).rstrip(".")
        message = _SEVERAL.sub(r"Did you mean one of \1?", message)
        command = error.ctx.command_path if error.ctx else "sah-bench"
        stop = "" if message.endswith("?") else "."
        super().__init__(f"{message}{stop} see '{command} --help'.")

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


@contextmanager
def _usage_on_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise BadUsage(error) from error


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; None if there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"sah_bench.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown name gets the nearest ones as a hint."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" did you mean {nearest[0]!r}?" if nearest else ""
            known = ", ".join(COMMANDS)
            ctx.fail(f"no command named {args[0]!r}.{hint} the commands are {known}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments of the group itself."""
        with _usage_on_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; whatever it raises becomes one line and an exit code."""
        try:
            with _usage_on_one_line():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            note = "interrupted."
            if ctx.invoked_subcommand in _RESUMED:
                note += " finished samples are kept: the same command goes on from there."
            click.echo(f"\n{note}", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:  # the outermost place: a fault is one line and an exit code
            if ctx.meta.get(DEBUG):
                raise
            ctx.exit(_report(error))


def _report(error: Exception) -> int:
    """Print an error on one line and return the exit code that it means."""
    from sah_core.errors import SahError, one_line

    if isinstance(error, SahError):
        click.echo(f"error: {one_line(str(error))}", err=True)
        return BAD_INPUT
    text = one_line(f"{type(error).__name__}: {error}").rstrip(": ")
    click.echo(f"error: {text}. run it with --debug for the traceback.", err=True)
    return FAULT


class EachOnce(logging.Handler):
    """Shows a warning once, however many samples and layers it comes from."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line to standard error, wherever that leads by now: a bar may stand there."""
        text = self.format(record)
        if text not in self._shown:
            self._shown.add(text)
            sys.stderr.write(f"{text}\n")


def _show_each_warning_once(ctx: click.Context) -> None:
    handler, root = EachOnce(), logging.getLogger()
    root.addHandler(handler)
    ctx.call_on_close(lambda: root.removeHandler(handler))


def _warn_of_unknown_settings() -> None:
    """Say which names in the environment fit no plugin: a slip there would go unnoticed."""
    if not any(os.environ.get(variable) for variable in _PLUGIN_SETTINGS):
        return
    from sah_core import registry

    for variable, item in registry.unknown_settings():
        click.echo(f"warning: {variable} names {item!r}, which fits no plugin.", err=True)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="sparse-attention-hub", message="sah-bench %(version)s")
@plugin_option
@debug_option
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compare sparse-attention methods on language models and benchmarks."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    _show_each_warning_once(ctx)
    load_plugin_files(ctx.meta.get(PLUGIN_FILES, ()))
    _warn_of_unknown_settings()
    if ctx.meta.get(STRICT):
        refuse_unusable_plugins()
