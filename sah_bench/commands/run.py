"""``sah-bench run``: models x pipelines x benchmarks, ending in a table."""

from __future__ import annotations

from typing import Any

import click

from ..options import debug_option, plugin_option


@click.command()
@click.argument("experiment", required=False, type=click.Path())
@click.option("--model", "models", multiple=True, help="Alias, hub id, folder or GGUF file.")
@click.option("--pipeline", "pipelines", multiple=True, help="Such as 'sink(128) | local(128)'.")
@click.option("--benchmark", "benchmarks", multiple=True, help="Such as 'niah(lengths=[1024])'.")
@click.option("--task", "--tasks", "tasks", multiple=True, help="Only these, such as 'niah_*'.")
@click.option("--data-dir", help="Folder with the data of benchmarks, in place of the hub.")
@click.option("--limit", type=int, help="Examples per task, spread over it.")
@click.option("--max-context-length", type=int, help="The most tokens of a prompt.")
@click.option("--max-new-tokens", type=int, help="Tokens of an answer, for all benchmarks.")
@click.option("--seed", type=int, help="Seed of the examples.")
@click.option("--dtype", help="Of the weights: float32, bfloat16, float16 or auto.")
@click.option("--device", help="Such as cpu or cuda:0.")
@click.option("--backend", help="For pipelines that name none.")
@click.option("--adapter", help="What runs the models; hf if not given.")
@click.option("--metric", "metrics", multiple=True, help="Such as 'output-error(every=8)'.")
@click.option("--timed-samples", type=int, help="Samples per cell that are timed; 8 if not given.")
@click.option("--output", type=click.Path(file_okay=True), help="Folder; results if not given.")
@click.option("--set", "settings", multiple=True, metavar="BENCHMARK.PARAM=VALUE")
@click.option("--dry-run", is_flag=True, help="Show what would run and what is there already.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@click.option("--rerun-failed", is_flag=True, help="Try cells again that failed before.")
@plugin_option
@debug_option
def run(
    experiment: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    no_progress: bool,
    rerun_failed: bool,
    **flags: Any,
) -> None:
    """Run an EXPERIMENT file, or what the flags say, and compare the results.

    A flag replaces what the file says. A killed run goes on at the next sample when it is started
    again; cells that are done are not run again.
    """
    from ..documents import load_document
    from ..experiment import resolve

    given = {key: _listed(value) for key, value in flags.items()}
    document = None if experiment is None else load_document(experiment)
    resolved = resolve(
        document,
        path=experiment or "",
        flags=given,
        settings=settings,
        check_output=not dry_run,
    )
    if dry_run:
        _print_plan(resolved)
        return
    from ..progress import reporter
    from ..runner import exit_code, run_experiment
    from ..tables import console, print_results

    with reporter(enabled=not no_progress) as shown:
        results = run_experiment(resolved, shown, rerun_failed=rerun_failed)
    print_results(results, resolved.output, console())
    code = exit_code(results)
    if code == 2:
        for message in dict.fromkeys(r.message for r in results if r.status == "failed"):
            click.echo(f"error: {message}", err=True)
    raise click.exceptions.Exit(code)


def _listed(value: Any) -> Any:
    """A flag that may be repeated as a list; None if it was not given."""
    if isinstance(value, tuple):
        return list(value) or None
    return value


def _print_plan(experiment: Any) -> None:
    from ..plan import planned_cells

    cells = planned_cells(experiment)
    for cell in cells:
        click.echo(f"{cell.state}  {cell.model}  {cell.benchmark} {cell.task}  {cell.pipeline}")
    done = sum(cell.is_done for cell in cells)
    click.echo(f"{len(cells)} cells, {done} done. results: {experiment.output}")
