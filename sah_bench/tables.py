"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .results import CellResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 120
"""Columns of a table that no terminal shows."""


def console() -> Console:
    """The console for tables on standard output, wide enough where that is no terminal."""
    from rich.console import Console

    plain = Console(highlight=False)
    if plain.is_terminal:
        return plain
    return Console(highlight=False, width=max(PIPED_WIDTH, plain.width))


def results_table(results: Sequence[CellResult]) -> Table:
    """One row per cell; the text of pipelines is folded, never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    scores = {result.main_score for result in results}
    score_header = f"{next(iter(scores))} %" if len(scores) == 1 else "score %"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("benchmark", overflow="fold")
    table.add_column("pipeline", overflow="fold", ratio=1)
    for name in (score_header, "density", "prefill s", "decode s", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("saving", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for result in results:
        score = number(result.score, ".1f")
        if len(scores) > 1:
            score = f"{result.main_score} {score}"
        cells = (
            result.model,
            f"{result.benchmark} {result.task}",
            result.pipeline,
            score,
            number(result.density, ".4f"),
            number(result.prefill_seconds, ".2f"),
            number(result.decode_seconds, ".2f"),
            str(result.samples),
            result.saving,
            result.status,
        )
        # Text, because the brackets of a pipeline would be read as markup.
        style = "red" if result.status == "failed" else ""
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def print_results(results: Sequence[CellResult], output: Any, console: Console) -> None:
    """Print the table, what failed and why, and where the results lie."""
    console.print(results_table(results))
    console.print(
        "prefill s: mean time to read one context, which its questions share; "
        "decode s: mean time per question, its answer included; n: questions.",
        style="dim",
    )
    for result in results:
        if result.status == "failed":
            place = f"{result.model}, {result.benchmark} {result.task}, {result.pipeline}"
            line = f"failed: {place}: {result.message}"
            if not result.bad_input:
                line += f" (traceback: {result.folder / 'error.json'})"
            console.print(line, markup=False, soft_wrap=True, style="red")
    console.print(f"results: {output}", markup=False, soft_wrap=True)


def number(value: float | None, form: str) -> str:
    """A number as text, a dash if there is none."""
    return "-" if value is None else format(value, form)
