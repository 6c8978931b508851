"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .layout import number, table
from .results import PERCENT, CellResult, summaries

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_WIDTH = 120
"""Columns of a table that no terminal shows."""

_TEXTS = ("model", "benchmark", "pipeline")

_BESIDE = 4
"""The most figures that stand beside one another; more of them are a row each."""


def console() -> Console:
    """The console for tables on standard output, wide enough where that is no terminal."""
    from rich.console import Console

    plain = Console(highlight=False)
    if plain.is_terminal:
        return plain
    return Console(highlight=False, width=max(PIPED_WIDTH, plain.width))


def results_table(results: Sequence[CellResult], width: int = PIPED_WIDTH) -> RenderableType:
    """One row per cell; the text of pipelines is folded or stands above its numbers, never cut.

    A model or benchmark that all rows share stands above the table.
    """
    columns = _columns(results)
    shared = [columns.pop(name)[0] for name in ("model", "benchmark") if _is_shared(columns[name])]
    return table(
        columns,
        width=width,
        texts=[name for name in _TEXTS if name in columns],
        left=("saving", "status"),
        styles=["red" if result.status == "failed" else "" for result in results],
        title=", ".join(shared),
    )


def summary_table(results: Sequence[CellResult], width: int = PIPED_WIDTH) -> RenderableType | None:
    """Figures over several tasks, such as category means; None where no benchmark has any.

    A few figures are a column each, many are a row each.
    """
    found = summaries(results)
    figures = {
        header(name, figure["unit"]): (name, figure["unit"])
        for one in found
        for name, figure in one["figures"].items()
    }
    if not figures:
        return None
    rows: list[dict[str, str]] = []
    for one in found:
        place = {name: str(one[name]) for name in _TEXTS}
        cells = {text: _figure(one["figures"].get(n), unit) for text, (n, unit) in figures.items()}
        if len(figures) <= _BESIDE:
            rows.append({**place, **cells})
            continue
        for text, cell in cells.items():
            rows.append({**place, "figure": text, "": cell})
            place = dict.fromkeys(_TEXTS, "")  # once is enough
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return table(columns, width=width, texts=_TEXTS, left=["figure"])


def header(name: str, unit: str) -> str:
    """The head of a column of scores: ``accuracy %``, ``loss (nats per token)``."""
    return f"{name} %" if unit == PERCENT else f"{name} ({unit})"


def _figure(figure: Mapping[str, Any] | None, unit: str) -> str:
    if figure is None or figure["unit"] != unit:
        return "-"
    return _score(figure["value"], unit)


def _score(value: float | None, unit: str) -> str:
    return number(value, ".1f" if unit == PERCENT else "g")


def _columns(results: Sequence[CellResult]) -> dict[str, list[str]]:
    """The texts of the table by column."""
    scores = [_score(result.score, result.unit) for result in results]
    heads = [header(result.main_score, result.unit) for result in results]
    head = heads[0] if len({*heads}) == 1 else "score"
    if head == "score":
        all_percent = all(result.unit == PERCENT for result in results)
        names = [result.main_score for result in results] if all_percent else heads
        scores = [f"{name} {score}" for name, score in zip(names, scores, strict=True)]
        head += " %" if all_percent else ""
    return {
        "model": [result.model for result in results],
        "benchmark": [f"{result.benchmark} {result.task}" for result in results],
        "pipeline": [result.pipeline for result in results],
        head: scores,
        "density": [number(result.density, ".4f") for result in results],
        **{
            name: [number(result.observed.get(name), ".4f") for result in results]
            for name in dict.fromkeys(name for result in results for name in result.observed)
        },
        "prefill s": [number(result.prefill_seconds, ".2f") for result in results],
        "decode s": [number(result.decode_seconds, ".2f") for result in results],
        "n": [str(result.samples) for result in results],
        "saving": [result.saving for result in results],
        "status": [result.status for result in results],
    }


def _is_shared(texts: Sequence[str]) -> bool:
    return len(set(texts)) == 1


def print_results(results: Sequence[CellResult], output: Any, console: Console) -> None:
    """Print the table, what failed and why, and where the results lie."""
    console.print(results_table(results, console.width))
    summary = summary_table(results, console.width)
    if summary is not None:
        console.print(summary)
    console.print(
        "prefill s: mean time to read one context, which its questions share; "
        "decode s: mean time per question, its answer included; n: questions."
        + _timed_note(results),
        style="dim",
    )
    for result in results:
        if result.differing:
            console.print(
                f"{_place(result)}: {result.differing} of {result.timed} timed answers differ from "
                "the observed ones (same_tokens in timings.jsonl).",
                markup=False,
                soft_wrap=True,
                style="yellow",
            )
    for result in results:
        rows = result.metrics.get("overflow_rows", 0)
        if rows:
            console.print(
                f"{_place(result)}: {rows} rows (of all layers and heads) wanted more keys than "
                "max_size gives them.",
                markup=False,
                soft_wrap=True,
                style="yellow",
            )
    for result in results:
        if result.status == "failed":
            line = f"failed: {_place(result)}: {result.message}"
            if not result.bad_input:
                line += f" (traceback: {result.folder / 'error.json'})"
            console.print(line, markup=False, soft_wrap=True, style="red")
    console.print(f"results: {output}", markup=False, soft_wrap=True)


def _place(result: CellResult) -> str:
    return f"{result.model}, {result.benchmark} {result.task}, {result.pipeline}"


def _timed_note(results: Sequence[CellResult]) -> str:
    """How many answers the seconds are of, where it is not all of them."""
    parts = [result for result in results if result.timed < result.samples]
    if not parts:
        return ""
    least, most = min(r.timed for r in parts), max(r.timed for r in parts)
    count = f"{least}" if least == most else f"{least} to {most}"
    return f" seconds are of the first {count} questions, answered without observers."
