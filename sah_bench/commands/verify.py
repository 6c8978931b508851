"""``sah-bench verify``: check installed plugins against expected results."""

from __future__ import annotations

from collections import Counter

import click

from ..options import debug_option

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.group()
@debug_option
def verify() -> None:
    """Check plugins against expected results."""


@verify.command("maskers")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--backend", "backends", multiple=True, help="Only this backend; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Where the cases run.")
@debug_option
def maskers(paths: tuple[str, ...], backends: tuple[str, ...], device: str) -> None:
    """Check maskers and backends on golden cases: files, or folders that hold some.

    One line per file and backend: passed, failed or skipped, with the reason. The exit code is 1 if
    any failed.
    """
    from sah_core.testing.golden import run_maskers

    totals: Counter[str] = Counter()
    for result in run_maskers(paths, backends or None, device):
        totals[result.status] += 1
        status = click.style(result.status.ljust(7), fg=_COLOURS[result.status])
        line = f"{status}  {result.case}  {result.backend}"
        click.echo(f"{line}  {result.reason}" if result.reason else line)
    click.echo(", ".join(f"{totals[status]} {status}" for status in _COLOURS))
    if totals["failed"]:
        raise click.exceptions.Exit(1)
