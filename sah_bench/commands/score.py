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
    screen.print(_table(found, screen.width))
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


def _table(found: list[Rescored], width: int) -> Any:
    from ..layout import number, table

    columns = {
        "cell": [cell.label for cell in found],
        "score": [cell.score or "-" for cell in found],
        "old %": [number(cell.old, ".2f") for cell in found],
        "new %": [number(cell.new, ".2f") for cell in found],
        "changed": [str(cell.changed) for cell in found],
        "n": [str(cell.samples) for cell in found],
    }
    return table(columns, width=width, texts=["cell"], left=["score"])
