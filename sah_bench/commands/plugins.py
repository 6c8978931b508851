"""``sah-bench plugins``: what is installed, from package metadata, and what one plugin takes."""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
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
    one_line,
)
from sah_core.registry import Kind, PluginEntry

from ..layout import folded, noted
from ..options import debug_option, plugin_option

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark
    from sah_core.masker import Masker
    from sah_core.testing import CheckResult

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}
_STEP_NAME = re.compile(r"[\w.:-]+")
_PAPER = re.compile(r"arXiv:?\s*\d{4}\.\d{4,5}|doi:?\s*10\.\S+|https?://\S+", re.IGNORECASE)


@click.group()
@plugin_option
@debug_option
def plugins() -> None:
    """List the plugins that are installed, describe or check one."""


@plugins.command("list")
@click.argument("kind", required=False)
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
@click.argument("name")
@click.option("--kind", help="The kind, where a name is of several kinds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a JSON Schema.")
@plugin_option
@debug_option
def show_plugin(name: str, kind: str | None, as_json: bool) -> None:
    """Describe the plugin NAME: what it is, what it takes, its origin."""
    wanted = registry.kinds() if kind is None else (_kind(kind),)
    found = [one for one in wanted if _knows(one, name)]
    if not found:
        raise UnknownPluginError(
            "plugin" if kind is None else wanted[0].singular,
            name,
            nearest_names(name, {known for one in wanted for known in one.names()}),
        )
    facts = [_facts(one, name) for one in found]
    if as_json:
        click.echo(json.dumps(facts if len(facts) > 1 else facts[0], indent=2))
        return
    for number, fact in enumerate(facts):
        if number:
            click.echo()
        _print_facts(fact)


@plugins.command("check")
@click.argument("what", metavar="NAME|FILE.py|STEP")
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


def _facts(kind: Kind[Any], name: str) -> dict[str, Any]:
    from sah_core.parameters import json_schema, specs

    entry = kind.entry(name)
    plugin = kind[name]
    facts: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "entry_point": entry.entry_point,
        "id": entry.id,
        "summary": "" if isinstance(plugin, Mapping) else _summary(plugin),
        "description": _module_docstring(plugin, entry),
        "docstring": "" if isinstance(plugin, Mapping) else (inspect.getdoc(plugin) or "").strip(),
        "papers": _papers(_module_docstring(plugin, entry)),
        "parameters": [
            {
                "name": spec.name,
                "type": spec.type_name,
                "required": spec.required,
                "default": None if spec.required else spec.to_plain(spec.default),
                "allowed": spec.allowed,
                "unit": spec.unit,
                "help": spec.help,
                "search": spec.search.to_plain() if spec.search else None,
            }
            for spec in (specs(plugin) if isinstance(plugin, type) else ())
        ],
        "capabilities": _capabilities(plugin),
        "tasks": _tasks(plugin) if kind.singular == "benchmark" else [],
        "metrics": _metrics(plugin) if kind.singular == "scorer" else [],
    }
    if facts["parameters"]:
        facts["schema"] = json_schema(plugin)
    return facts


def _summary(plugin: Any) -> str:
    return (inspect.getdoc(plugin) or "").strip().partition("\n")[0]


def _module_docstring(plugin: Any, entry: PluginEntry) -> str:
    named = sys.modules.get(entry.entry_point.partition(":")[0])
    return (inspect.getdoc(named or inspect.getmodule(plugin)) or "").strip()


def _papers(text: str) -> list[str]:
    """The arXiv ids, DOIs and links that a docstring names."""
    return list(
        dict.fromkeys(" ".join(found.split()).rstrip(".,;)") for found in _PAPER.findall(text))
    )


def _capabilities(plugin: Any) -> list[str]:
    """What a masker declares about itself, in words; empty for other kinds."""
    declared = getattr(plugin, "capabilities", None)
    if declared is None or not attrs.has(type(declared)):
        return []
    words = []
    for field in attrs.fields(type(declared)):
        value = getattr(declared, field.name)
        if value is True:
            words.append(field.name.replace("_", " "))
        elif value:
            words.append(f"{field.name}: {', '.join(sorted(map(str, value)))}")
    return words


def _tasks(plugin: Any) -> list[dict[str, Any]]:
    """What a benchmark declares of its tasks, if it can be made without parameters."""
    from sah_core.parameters import specs

    from ..declarations import declared

    if any(spec.required for spec in specs(plugin)):
        return []
    benchmark = plugin()
    return [declared(benchmark, task) for task in benchmark.tasks()]


def _metrics(plugin: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "description": scorer.description,
            "source": scorer.source,
            "scale": scorer.scale,
            "higher_is_better": scorer.higher_is_better,
        }
        for name, scorer in plugin.items()
    ]


def _print_tasks(tasks: list[dict[str, Any]]) -> None:
    from ..declarations import data_lines, task_line

    click.echo()
    click.echo("Tasks:")
    for fact in tasks:
        click.echo(folded(f"  {task_line(fact)}", 6))
    lines = data_lines(tasks)
    if lines:
        click.echo()
        click.echo("Data:")
        for line in lines:
            click.echo(folded(f"  {line}", 6))


def _print_facts(facts: dict[str, Any]) -> None:
    origin = f"{facts['distribution']} {facts['version']}".strip()
    head = f"{facts['name']} ({facts['kind']}, {origin}, {facts['entry_point']})"
    click.echo(folded(head, 4))
    click.echo()
    click.echo(facts["description"] or facts["summary"] or "No description.")
    if facts["description"] and facts["docstring"]:
        click.echo()
        click.echo(facts["docstring"].partition("\n\nAttributes:")[0])
    if facts["papers"]:
        click.echo()
        click.echo(folded(f"Papers: {', '.join(facts['papers'])}.", 4))
    if facts["capabilities"]:
        click.echo()
        click.echo(folded(f"Declares: {'; '.join(facts['capabilities'])}.", 4))
    if facts["tasks"]:
        _print_tasks(facts["tasks"])
    for metric in facts["metrics"]:
        click.echo()
        line = f"{metric['name']}: {metric['description']}; after {metric['source']}"
        click.echo(folded(line, 4))
    click.echo()
    if not facts["parameters"]:
        click.echo("No parameters.")
        return
    click.echo("Parameters:")
    for parameter in facts["parameters"]:
        default = "required" if parameter["required"] else f"default {_text(parameter['default'])}"
        unit = f", in {parameter['unit']}" if parameter["unit"] else ""
        click.echo(f"  {parameter['name']} ({parameter['type']}{unit}, {default})")
        lines = [one_line(parameter["help"]), f"allowed: {parameter['allowed']}"]
        if parameter["search"]:
            lines.append(f"search: {_search_text(parameter['search'])}")
        for line in lines:
            click.echo(folded(f"      {line}", 8))


def _text(value: Any) -> str:
    return json.dumps(value)


def _search_text(search: dict[str, Any]) -> str:
    if search["kind"] == "choice":
        return f"one of {', '.join(_text(value) for value in search['values'])}"
    return f"{search['kind'].replace('_', ' ')} from {search['low']} to {search['high']}"
