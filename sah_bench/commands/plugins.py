"""``sah-bench plugins``: what is installed, from package metadata, and what one plugin takes."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from sah_core import registry
from sah_core.errors import (
    PluginFileError,
    SahError,
    UnknownPluginError,
    UnsupportedError,
    nearest_names,
)
from sah_core.registry import Kind, PluginEntry

from ..layout import noted
from ..options import debug_option, kind_names, plugin_names, plugin_option

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark
    from sah_core.masker import Masker
    from sah_core.testing import CheckResult

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}
_STEP_NAME = re.compile(r"[\w.:-]+")


@click.group()
@plugin_option
@debug_option
def plugins() -> None:
    """List the plugins that are installed, describe or check one."""


@plugins.command("list")
@click.argument("kind", required=False, shell_complete=kind_names)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Import every plugin and show which are broken.")
@plugin_option
@debug_option
def list_plugins(kind: str | None, as_json: bool, check: bool) -> None:
    """List all plugins, or those of one KIND such as maskers.

    States: ok; disabled by SAH_DISABLE_PLUGINS or SAH_LOAD_PLUGINS; conflict, where several
    distributions have one name; incompatible, where a distribution requires another version of this
    one; broken. Package metadata do not show what is broken, so a plugin that is shown as ok may
    still fail to import: --check imports each. With it the exit code is 1 unless all can be used.
    """
    chosen = registry.kinds() if kind is None else (_kind(kind),)
    entries = [entry for one in chosen for entry in one.entries()]
    if check:
        entries = [_checked(entry) for entry in entries]
    if as_json:
        click.echo(json.dumps([attrs.asdict(entry) for entry in entries], indent=2))
    else:
        _print_entries(entries)
        if entries and not check:
            click.echo("nothing was imported to tell these states. --check imports every plugin.")
    if check and any(entry.state not in ("ok", "disabled") for entry in entries):
        raise click.exceptions.Exit(1)


@plugins.command("show")
@click.argument("name", shell_complete=plugin_names())
@click.option(
    "--kind", help="The kind, where a name is of several kinds.", shell_complete=kind_names
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a JSON Schema.")
@plugin_option
@debug_option
def show_plugin(name: str, kind: str | None, as_json: bool) -> None:
    """Describe the plugin NAME: what it is, what it takes, its origin."""
    wanted = registry.kinds() if kind is None else (_kind(kind),)
    found = [one for one in wanted if _knows(one, name)]
    if not found:
        known = {known for one in wanted for known in one.names()}
        raise UnknownPluginError(
            "plugin" if kind is None else wanted[0].singular,
            name,
            nearest_names(name.rpartition(":")[2], known),
        )
    from ..descriptions import describe, description_lines

    facts: list[dict[str, Any]] = []
    barred: list[SahError] = []
    for one in found:
        try:
            facts.append(describe(one, name))
        except SahError as error:  # another kind may have one of this name that can be used
            barred.append(error)
    if not facts:
        raise barred[0]
    if as_json:
        click.echo(json.dumps(facts if len(facts) > 1 else facts[0], indent=2))
        return
    for number, fact in enumerate(facts):
        if number:
            click.echo()
        for line in description_lines(fact):
            click.echo(line)


@plugins.command("check")
@click.argument(
    "what",
    metavar="NAME|FILE.py|STEP",
    shell_complete=plugin_names("maskers", "benchmarks"),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
@debug_option
def check_plugin(what: str, as_json: bool) -> None:
    """Run the conformance checks over a masker or a benchmark.

    NAME is an installed one and FILE.py holds one that is not; both are checked as their
    classmethod example makes them. A STEP such as 'quest(heavy_size=8)', or a benchmark with
    parameters such as 'niah(samples=2)', is checked as it is written. A line per check says passed,
    failed or skipped, what is wrong and what to change. The exit code is 1 if any failed.
    """
    with tempfile.TemporaryDirectory(prefix="sah-example-") as folder:
        results = [(plugin, _checks(plugin)) for plugin in _instances(what, Path(folder))]
    if as_json:
        listed = [
            {_kind_of(plugin): plugin.name, **attrs.asdict(result)}
            for plugin, found in results
            for result in found
        ]
        click.echo(json.dumps(listed, indent=2))
    else:
        for plugin, found in results:
            _print_results(plugin, found)
    if any(result.failed for _, found in results for result in found):
        raise click.exceptions.Exit(1)


def _kind_of(plugin: Masker | Benchmark) -> str:
    from sah_core.benchmark import Benchmark

    return "benchmark" if isinstance(plugin, Benchmark) else "masker"


def _checks(plugin: Any) -> list[CheckResult]:
    from sah_core.testing import run_benchmark_checks, run_checks

    return run_benchmark_checks(plugin) if _kind_of(plugin) == "benchmark" else run_checks(plugin)


def _instances(what: str, folder: Path) -> list[Masker | Benchmark]:
    """The instances to check; files of examples go into the folder."""
    kinds: dict[str, Kind[Any]] = {"masker": registry.maskers, "benchmark": registry.benchmarks}
    is_path = "/" in what.partition("(")[0] or Path(what).is_file()
    if what.endswith(".py") or is_path:
        loaded = [entry for entry in registry.load_file(what) if entry.kind in kinds]
        if not loaded:
            raise PluginFileError(
                what, "it has no masker: no function sah_masker in it, nor sah_benchmark"
            )
        return [kinds[entry.kind][entry.id].example(folder) for entry in loaded]
    name = what.partition("(")[0].strip()
    is_benchmark = name in registry.benchmarks and name not in registry.maskers
    others = [one.singular for one in registry.kinds() if one.singular not in kinds]
    owner = next((one for one in others if _knows(_kind(one), name)), None)
    if owner is not None and not any(_knows(kind, name) for kind in kinds.values()):
        raise UnsupportedError(
            f"checking the {owner} {name!r}", "there are checks for maskers and benchmarks only"
        )
    if _STEP_NAME.fullmatch(what):
        return [kinds["benchmark" if is_benchmark else "masker"][what].example(folder)]
    if is_benchmark:
        from ..declarations import benchmark_of

        return [benchmark_of(what)]
    from sah_core.pipeline import Pipeline

    pipeline = Pipeline.parse(what)
    pipeline.check_artifacts()
    return list(pipeline.steps)


def _print_results(plugin: Masker | Benchmark, results: list[CheckResult]) -> None:
    from sah_core.parameters import to_plain
    from sah_core.pipeline_text import format_call

    click.echo(format_call(plugin.name, to_plain(plugin)))
    width = max(len(result.name) for result in results)
    for result in results:
        status = click.style(result.status.ljust(7), fg=_COLOURS[result.status])
        message = result.message.removeprefix(f"{plugin.name}: ")
        line = noted(f"  {result.status:<7}  {result.name.ljust(width)}", message, 11)
        click.echo(line.replace(result.status.ljust(7), status, 1))
    counts = Counter[str](result.status for result in results)
    click.echo(", ".join(f"{counts[status]} {status}" for status in _COLOURS))


def _kind(name: str) -> Kind[Any]:
    for kind in registry.kinds():
        if name in (kind.singular, kind.plural):
            return kind
    plurals = [kind.plural for kind in registry.kinds()]
    nearest = nearest_names(name, plurals)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise click.UsageError(
        f"no kind of plugin named {name!r}. {hint}the kinds are {', '.join(plurals)}."
    )


def _knows(kind: Kind[Any], name: str) -> bool:
    """Whether a plugin of the kind has the name, usable or not."""
    try:
        kind.entry(name)
    except UnknownPluginError:
        return False
    except SahError:
        return True
    return True


def _checked(entry: PluginEntry) -> PluginEntry:
    """The entry after an import; a conflict stays one, since the name alone leads nowhere."""
    checked = _kind(entry.kind).check(entry.id)
    if entry.state == "conflict" and checked.state != "broken":
        return attrs.evolve(entry, checked=checked.checked)
    return checked


def _print_entries(entries: list[PluginEntry]) -> None:
    rows = [
        (entry.name, entry.state, f"{entry.distribution} {entry.version}".strip(), entry.reason)
        for entry in entries
    ]
    if not rows:
        click.echo("no plugins found.")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    kind = ""
    for entry, row in zip(entries, rows, strict=True):
        if entry.kind != kind:
            kind = entry.kind
            click.echo(f"{_kind(kind).plural}")
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        click.echo(noted(f"  {'  '.join(cells)}", row[3], 6))
