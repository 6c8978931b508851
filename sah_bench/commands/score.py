"""``sah-bench score``: scores computed again from finished results, without the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import debug_option, plugin_option

if TYPE_CHECKING:
    from ..rescoring import Rescored


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option("--metric", help="Another metric than the benchmark's own, such as longbench_qa_f1.")
@click.option("--write", is_flag=True, help="Keep the new scores in place of the old ones.")
@plugin_option
@debug_option
def score(results: tuple[str, ...], metric: str | None, write: bool) -> None:
    """Score finished results again, after a metric was mended or with another METRIC.

    RESULTS are folders that a run wrote. Predictions, references and facts of the samples are all
    that it takes: neither model nor data. Old and new scores are shown side by side; only --write
    changes files, and metrics.json then says so. The exit code is 1 if a cell cannot be scored.
    """
    from ..rescoring import cell_folders, rescore
    from ..tables import console

    found = list(rescore(cell_folders(results), metric))
    screen = console()
    screen.print(_table(found))
    for cell in found:
        if cell.problem:
            screen.print(
                f"not scored: {cell.label}: {cell.problem}",
                markup=False,
                soft_wrap=True,
                style="red",
            )
    if write:
        written = [cell for cell in found if not cell.problem and cell.metrics is not None]
        for cell in written:
            cell.write()
        click.echo(f"{len(written)} of {len(found)} cells written.")
    if any(cell.problem for cell in found):
        raise click.exceptions.Exit(1)


def _table(found: list[Rescored]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("cell", overflow="fold", ratio=1)
    for name in ("score", "old %", "new %", "changed", "n"):
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for cell in found:
        texts = (
            cell.label,
            cell.score or "-",
            _number(cell.old),
            _number(cell.new),
            str(cell.changed),
            str(cell.samples),
        )
        table.add_row(*(Text(text) for text in texts))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
