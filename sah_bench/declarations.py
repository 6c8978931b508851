"""What benchmarks declare about their tasks, as plain data and as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sah_core import registry

if TYPE_CHECKING:
    from sah_core.benchmark import Benchmark, DataSource


def benchmark_of(text: str) -> Benchmark:
    """Return the benchmark that a name or a text such as ``niah(samples=2)`` means.

    Raises:
        SahError: There is none of this name, or it refuses the parameters.
    """
    from sah_core.parameters import from_plain

    from .benchmark_plans import benchmark_call
    from .values import Place

    place = Place("benchmark")
    name, parameters = benchmark_call(text, place)
    return from_plain(registry.benchmarks[name], parameters)


def declared(benchmark: Benchmark, task: str) -> dict[str, Any]:
    """Return what is declared of a task as plain data."""
    info = benchmark.info(task)
    protocol = benchmark.protocol_for(task)
    facts: dict[str, Any] = {"task": task, **protocol.to_plain()}
    generation = dict(benchmark.generation_for(task))
    if generation:
        facts["generation"] = generation
    if info is None:
        return facts
    facts |= {
        "metric": info.metric,
        "max_new_tokens": info.max_new_tokens,
        "official_max_new_tokens": info.official_max_new_tokens,
        "examples": info.examples,
        "licence": info.licence,
    }
    if info.source is not None:
        source = info.source
        facts["source"] = {
            "hub": source.hub,
            "config": source.config,
            "split": source.split,
            "files": source.files,
            "revision": source.revision,
            "columns": list(source.columns),
        }
    return facts


def task_line(facts: dict[str, Any]) -> str:
    """Return a task in one line: metric, size, token limits, protocol."""
    parts = []
    if "metric" in facts:
        parts.append(str(facts["metric"]))
        if facts["examples"] is not None:
            parts.append(f"{facts['examples']} examples")
        official, given = facts["official_max_new_tokens"], facts["max_new_tokens"]
        limit = "" if official in (None, given) else f" (officially {official})"
        parts.append(f"{given} new tokens{limit}")
    parts.append("chat template" if facts["chat"] else "no chat template")
    parts.append(f"truncation {facts['truncation']}")
    parts.append(f"answer prefix with the {facts['prefix']}")
    parts += [f"{name} {value}" for name, value in facts.get("generation", {}).items()]
    return f"{facts['task']}: {', '.join(parts)}"


def data_lines(facts: list[dict[str, Any]]) -> list[str]:
    """Return where the data of tasks comes from, one line for tasks that share an origin."""
    lines: dict[str, list[str]] = {}
    for fact in facts:
        line = _data_line(fact)
        if line:
            lines.setdefault(line, []).append(fact["task"])
    all_tasks = [fact["task"] for fact in facts]
    return [
        line if tasks == all_tasks else f"{_shortened(tasks)}: {line}"
        for line, tasks in lines.items()
    ]


def source_words(source: DataSource | None) -> str:
    """Return a source in words: data set, configuration, split, commit."""
    if source is None:
        return "generated"
    config = f" {source.config}" if source.config else ""
    commit = source.revision or "no commit pinned"
    return f"{source.hub}{config} {source.split} ({commit})"


def _data_line(fact: dict[str, Any]) -> str:
    source = fact.get("source")
    licence = f"licence: {fact['licence']}" if fact.get("licence") else ""
    if source is None:
        return licence
    commit = source["revision"] or "no commit pinned; the one at hand is recorded"
    columns = f"columns: {', '.join(source['columns'])}"
    return "; ".join(
        filter(None, [f"{source['hub']}, split {source['split']} ({commit})", columns, licence])
    )


def _shortened(tasks: list[str]) -> str:
    if len(tasks) <= 4:
        return ", ".join(tasks)
    return f"{', '.join(tasks[:3])} and {len(tasks) - 3} more"
