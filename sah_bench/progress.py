"""What a run shows while it works: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_SECONDS = 10.0
"""Time between two lines where there is no terminal."""


class Reporter(Protocol):
    """What a runner tells while it works."""

    def expect(self, samples: int | None) -> None:
        """So many samples are to be made in all, as far as is known by now."""

    def working_on(self, what: str) -> None:
        """The next samples belong to this cell; or something else takes time."""

    def advance(self) -> None:
        """One sample is done."""

    def note(self, text: str) -> None:
        """Something that the user should read."""


class Silent:
    """Shows notes only."""

    def expect(self, samples: int | None) -> None:
        """Ignore the number."""

    def working_on(self, what: str) -> None:
        """Ignore the cell."""

    def advance(self) -> None:
        """Ignore the sample."""

    def note(self, text: str) -> None:
        """Print the note."""
        click.echo(text, err=True)


class Lines(Silent):
    """Prints a line per cell that begins, at most one in ten seconds in between.

    Args:
        counted: What is counted, in the plural; empty where the text says it.
    """

    def __init__(self, counted: str = "samples") -> None:
        self._counted = f" {counted}" if counted else ""
        self._total: int | None = None
        self._done = 0
        self._what = ""
        self._start = self._last = time.monotonic()

    def expect(self, samples: int | None) -> None:
        """Take the number for the next lines."""
        self._total = samples

    def working_on(self, what: str) -> None:
        """Take the cell for the next lines."""
        new, self._what = what != self._what, what
        if new and (not self._done or time.monotonic() - self._last >= LINE_SECONDS):
            self._print()

    def advance(self) -> None:
        """Count, and print if the last line is old."""
        self._done += 1
        if time.monotonic() - self._last >= LINE_SECONDS or self._done == self._total:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        total = "" if self._total is None else f"/{self._total}"
        left = ""
        if self._done and self._total and self._total > self._done:
            left = f", about {duration(elapsed / self._done * (self._total - self._done))} left"
        click.echo(
            f"[{self._done}{total}{self._counted}, {duration(elapsed)}{left}] {self._what}",
            err=True,
        )


class Bar(Silent):
    """A rich progress bar with the time left and the current cell."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def expect(self, samples: int | None) -> None:
        """Set the length of the bar."""
        self._progress.update(self._task, total=samples)

    def working_on(self, what: str) -> None:
        """Set the text beside the bar."""
        from rich.markup import escape

        self._progress.update(self._task, description=escape(what))

    def advance(self) -> None:
        """Move the bar."""
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        """Print the note above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def reporter(enabled: bool = True, *, counted: str = "samples") -> AbstractContextManager[Reporter]:
    """The reporter that fits where standard error goes; ``counted`` as for `Lines`."""
    if not enabled:
        return _plain(Silent())
    return _bar() if sys.stderr.isatty() else _plain(Lines(counted))


@contextmanager
def _plain(chosen: Reporter) -> Iterator[Reporter]:
    yield chosen


@contextmanager
def _bar() -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Samples that share a prefill come in bursts: the speed is that of the last ten minutes.
    console = Console(stderr=True)
    with Progress(*columns, console=console, speed_estimate_period=600, transient=True) as bar:
        yield Bar(bar)


def duration(seconds: float) -> str:
    """Seconds as a short text: ``42 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
