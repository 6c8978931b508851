"""``sah-bench data``: what the data of benchmarks is, an offline copy of it, a check."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sah_core import registry
from sah_core.errors import DataError, RequestError, nearest_names, one_line

from ..layout import folded
from ..options import debug_option, plugin_names, plugin_option

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark

_COLOURS = {"ok": "green", "failed": "red"}


@click.group()
@plugin_option
@debug_option
def data() -> None:
    """List the data of benchmarks, prepare an offline copy, or check one."""


@data.command("list")
@click.argument(
    "benchmarks", nargs=-1, metavar="[BENCHMARK...]", shell_complete=plugin_names("benchmarks")
)
@click.option("--task", "--tasks", "tasks", multiple=True, help="Only these, such as '*_e'.")
@plugin_option
@debug_option
def list_data(benchmarks: tuple[str, ...], tasks: tuple[str, ...]) -> None:
    """Show where data comes from, how much it is and its licence.

    One entry per task. Nothing is fetched or looked for.
    """
    from ..declarations import source_words

    for benchmark, task in _chosen(benchmarks, tasks):
        info = benchmark.info(task)
        if info is None:
            click.echo(f"{benchmark.name} {task}: nothing is declared")
            continue
        count = f", {info.examples} examples" if info.examples is not None else ""
        licence = f", {info.licence}" if info.licence else ""
        line = f"{benchmark.name} {task}: {source_words(info.source)}{count}{licence}"
        click.echo(folded(line, 4))


@data.command("fetch")
@click.argument(
    "benchmarks",
    nargs=-1,
    required=True,
    metavar="BENCHMARK...",
    shell_complete=plugin_names("benchmarks"),
)
@click.option("--data-dir", required=True, help="Folder to copy to; --data-dir of a run takes it.")
@click.option("--task", "--tasks", "tasks", multiple=True, help="Only these, such as '*_e'.")
@plugin_option
@debug_option
def fetch(benchmarks: tuple[str, ...], data_dir: str, tasks: tuple[str, ...]) -> None:
    """Copy data from the hub into a folder, for runs without a network.

    One parquet file per task; sah-data.json beside them says from which commit each came.
    """
    folder = Path(data_dir).expanduser()
    failed = False
    for benchmark, task in _chosen(benchmarks, tasks):
        try:
            path = benchmark.fetch_data(task, folder)
        except DataError as error:
            failed = True
            _line("failed", benchmark, task, str(error))
            continue
        _line("ok", benchmark, task, "generated, nothing to fetch" if path is None else str(path))
    if failed:
        raise click.exceptions.Exit(1)


@data.command("verify")
@click.argument(
    "benchmarks",
    nargs=-1,
    required=True,
    metavar="BENCHMARK...",
    shell_complete=plugin_names("benchmarks"),
)
@click.option("--data-dir", help="Folder with the data; by default the hub.")
@click.option("--task", "--tasks", "tasks", multiple=True, help="Only these, such as '*_e'.")
@plugin_option
@debug_option
def verify(benchmarks: tuple[str, ...], data_dir: str | None, tasks: tuple[str, ...]) -> None:
    """Read data once and check its columns and numbers of rows.

    One line per task. The exit code is 1 if anything is missing or not what it should be.
    """
    totals: Counter[str] = Counter()
    for benchmark, task in _chosen(benchmarks, tasks, data_dir):
        status, text = _verified(benchmark, task)
        totals[status] += 1
        _line(status, benchmark, task, text)
    click.echo(", ".join(f"{totals[status]} {status}" for status in _COLOURS))
    if totals["failed"]:
        raise click.exceptions.Exit(1)


def _verified(benchmark: Benchmark, task: str) -> tuple[str, str]:
    try:
        found = benchmark.data_of(task)
    except DataError as error:
        return "failed", str(error)
    if found is None:
        return "ok", "generated, nothing to check"
    text = f"{found['rows']} rows, {found['revision']}, {found['place']}"
    expected = found.get("expected")
    if expected is not None and expected != found["rows"]:
        return "failed", f"{text}: officially {expected} rows"
    return "ok", text


def _chosen(
    texts: tuple[str, ...], patterns: tuple[str, ...], data_dir: str | None = None
) -> Iterator[tuple[Benchmark, str]]:
    """Yield the tasks of the named benchmarks, all by default, that fit a pattern."""
    from ..declarations import benchmark_of

    found = 0
    known: list[str] = []
    for text in texts or registry.benchmarks.names():
        benchmark = _reading(benchmark_of(text), data_dir)
        for task in benchmark.tasks():
            known.append(task)
            if not patterns or any(fnmatch.fnmatchcase(task, pattern) for pattern in patterns):
                found += 1
                yield benchmark, task
    if not found:
        asked = " or ".join(map(repr, patterns))
        nearest = nearest_names(patterns[0], known) if patterns else ()
        hint = f" did you mean {nearest[0]!r}?" if nearest else ""
        raise RequestError(f"no task fits {asked}.{hint} see 'sah-bench data list'.")


def _reading(benchmark: Benchmark, data_dir: str | None) -> Benchmark:
    """The benchmark with a folder of data, if it reads one and has none."""
    import attrs

    from sah_core.parameters import specs

    reads = any(spec.name == "data_dir" for spec in specs(type(benchmark)))
    if data_dir is None or not reads or getattr(benchmark, "data_dir", None) is not None:
        return benchmark
    changes: dict[str, Any] = {"data_dir": data_dir}
    changed: Benchmark = attrs.evolve(benchmark, **changes)  # type: ignore[misc]
    return changed


def _line(status: str, benchmark: Benchmark, task: str, text: str) -> None:
    shown = click.style(status.ljust(6), fg=_COLOURS[status])
    owner = f"{benchmark.name} {task}"
    click.echo(f"{shown}  {owner}: {one_line(text).removeprefix(f'{owner}: ')}")
