"""``sah-bench verify``: check installed plugins against expected results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..options import debug_option, plugin_names, plugin_option

if TYPE_CHECKING:
    from sah_core.testing.golden import CaseResult
    from sah_core.testing.golden_metrics import FileResult

_FIRST = 5
"""How many cases that differ are shown per file."""

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON in place of lines: an object a result."
)


@click.group()
@plugin_option
@debug_option
def verify() -> None:
    """Check plugins against expected results."""


@verify.command("maskers")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="Only this backend, not all that can run here; may be repeated.",
    shell_complete=plugin_names("backends"),
)
@click.option("--device", default="cpu", help="Where the cases run.")
@json_option
@plugin_option
@debug_option
def maskers(paths: tuple[str, ...], backends: tuple[str, ...], device: str, as_json: bool) -> None:
    """Check maskers and backends on golden cases.

    PATH is a safetensors file, or a folder that holds some. One line per file and backend: passed,
    failed or skipped, with the reason. The exit code is 1 if any failed.
    """
    from sah_core.testing.golden import run_maskers

    totals: Counter[str] = Counter()
    results = run_maskers(paths, backends or None, device)
    if as_json:
        _print_json(results)
    for result in results:
        totals[result.status] += 1
        status = click.style(result.status.ljust(7), fg=_COLOURS[result.status])
        line = f"{status}  {result.case}  {result.backend}"
        click.echo(f"{line}  {result.reason}" if result.reason else line)
    click.echo(", ".join(f"{totals[status]} {status}" for status in _COLOURS))
    if totals["failed"]:
        raise click.exceptions.Exit(1)


@verify.command("metrics")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-v", "--verbose", is_flag=True, help="Show the first cases that differ.")
@json_option
@plugin_option
@debug_option
def metrics(paths: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """Check metrics on golden cases.

    PATH is a JSON file, or a folder that holds some. One line per file: passed, failed or skipped,
    with how many cases and the reason. The exit code is 1 if any failed.
    """
    from sah_core.testing.golden_metrics import run_metrics

    totals: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    results = run_metrics(paths)
    if as_json:
        _print_json(results)
    for result in results:
        totals[result.status] += 1
        for outcome in ("passed", "failed", "accepted", "skipped"):
            cases[outcome] += getattr(result, outcome)
        status = click.style(result.status.ljust(7), fg=_COLOURS[result.status])
        click.echo(f"{status}  {result.path.name}  {_cases_text(result)}")
        for difference in result.differences[:_FIRST] if verbose else ():
            click.echo(f"         {difference}")
    files = ", ".join(f"{totals[status]} {status}" for status in _COLOURS)
    counted = [outcome for outcome in cases if cases[outcome]]
    counts = ", ".join(f"{cases[outcome]} {outcome}" for outcome in counted)
    click.echo(f"files: {files}. cases: {counts}.")
    if totals["failed"]:
        raise click.exceptions.Exit(1)


def _print_json(results: Iterable[CaseResult] | Iterable[FileResult]) -> NoReturn:
    """Print all results and end the command, with 1 if any failed."""
    import attrs

    listed: list[dict[str, Any]] = [
        {**attrs.asdict(result), "path": str(result.path)} for result in results
    ]
    click.echo(json.dumps(listed, indent=2))
    raise click.exceptions.Exit(int(any(one["status"] == "failed" for one in listed)))


def _cases_text(result: FileResult) -> str:
    """How many cases went how, and why some were not simply passed."""
    total = result.passed + result.failed + result.accepted + result.skipped
    parts = [f"{result.passed} of {total} cases"]
    parts += [
        f"{count} {word}"
        for word, count in (("failed", result.failed), ("skipped", result.skipped))
        if count
    ]
    if result.accepted:
        parts.append(f"{result.accepted} differ for a listed reason")
    text = ", ".join(parts)
    return f"{text}: {'; '.join(result.reasons)}" if result.reasons else text
