"""What one plugin is: where it comes from, what it takes, what it declares."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from sah_core.errors import one_line
from sah_core.kind import Kind, PluginEntry

from .layout import folded

_PAPER = re.compile(r"arXiv:?\s*\d{4}\.\d{4,5}|doi:?\s*10\.\S+|https?://\S+", re.IGNORECASE)


def describe(kind: Kind[Any], name: str) -> dict[str, Any]:
    """What is known about a plugin, as plain data; imports it.

    Raises:
        SahError: It cannot be used.
    """
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


def description_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A description as text, folded to the terminal."""
    origin = f"{facts['distribution']} {facts['version']}".strip()
    head = f"{facts['name']} ({facts['kind']}, {origin}, {facts['entry_point']})"
    yield folded(head, 4)
    yield ""
    yield facts["description"] or facts["summary"] or "No description."
    if facts["description"] and facts["docstring"]:
        yield ""
        yield facts["docstring"].partition("\n\nAttributes:")[0]
    if facts["papers"]:
        yield ""
        yield folded(f"Papers: {', '.join(facts['papers'])}.", 4)
    if facts["capabilities"]:
        yield ""
        yield folded(f"Declares: {'; '.join(facts['capabilities'])}.", 4)
    if facts["tasks"]:
        yield from _task_lines(facts["tasks"])
    for metric in facts["metrics"]:
        yield ""
        line = f"{metric['name']}: {metric['description']}; after {metric['source']}"
        yield folded(line, 4)
    yield ""
    if not facts["parameters"]:
        yield "No parameters."
        return
    yield "Parameters:"
    for parameter in facts["parameters"]:
        default = "required" if parameter["required"] else f"default {_text(parameter['default'])}"
        unit = f", in {parameter['unit']}" if parameter["unit"] else ""
        yield f"  {parameter['name']} ({parameter['type']}{unit}, {default})"
        lines = [one_line(parameter["help"]), f"allowed: {parameter['allowed']}"]
        if parameter["search"]:
            lines.append(f"search: {_search_text(parameter['search'])}")
        for line in lines:
            yield folded(f"      {line}", 8)


def _task_lines(tasks: list[dict[str, Any]]) -> Iterator[str]:
    from .declarations import data_lines, task_line

    yield ""
    yield "Tasks:"
    for fact in tasks:
        yield folded(f"  {task_line(fact)}", 6)
    lines = data_lines(tasks)
    if lines:
        yield ""
        yield "Data:"
        for line in lines:
            yield folded(f"  {line}", 6)


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

    from .declarations import declared

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


def _text(value: Any) -> str:
    return json.dumps(value)


def _search_text(search: dict[str, Any]) -> str:
    if search["kind"] == "choice":
        return f"one of {', '.join(_text(value) for value in search['values'])}"
    return f"{search['kind'].replace('_', ' ')} from {search['low']} to {search['high']}"
