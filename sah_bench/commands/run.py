"""``sah-bench run``: models x pipelines x benchmarks, ending in a table."""

from __future__ import annotations

from typing import Any

import click

from ..options import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    PIPELINE_HELP,
    debug_option,
    plugin_names,
    plugin_option,
)


@click.command()
@click.argument("experiment", required=False, type=click.Path())
@click.option(
    "--model", "models", multiple=True, help=MODEL_HELP, shell_complete=plugin_names("models")
)
@click.option("--pipeline", "pipelines", multiple=True, help=PIPELINE_HELP)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    help="Such as 'niah(lengths=[1024])'.",
    shell_complete=plugin_names("benchmarks"),
)
@click.option(
    "--task", "--tasks", "tasks", multiple=True, help="Only these, such as 'niah_*'; else all."
)
@click.option("--data-dir", help="Folder with the data of benchmarks, in place of the hub.")
@click.option("--limit", type=int, help="Examples per task, spread over it; else all.")
@click.option(
    "--max-context-length",
    type=int,
    help="The most tokens of a prompt; else those that the model takes.",
)
@click.option(
    "--max-new-tokens", type=int, help="Tokens of an answer; else what each benchmark prescribes."
)
@click.option("--seed", type=int, help="Seed of the examples; 0 if not given.")
@click.option("--dtype", help=DTYPE_HELP)
@click.option("--device", help=DEVICE_HELP)
@click.option(
    "--backend",
    help="For pipelines that name none; auto if not given.",
    shell_complete=plugin_names("backends"),
)
@click.option(
    "--adapter",
    help="What runs the models; hf if not given.",
    shell_complete=plugin_names("adapters"),
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Such as 'output-error(every=8)'; density if not given.",
    shell_complete=plugin_names("metrics"),
)
@click.option("--timed-samples", type=int, help="Samples per cell that are timed; 8 if not given.")
@click.option("--output", type=click.Path(file_okay=True), help="Folder; results if not given.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="BENCHMARK.PARAM=VALUE",
    help="Another value for a parameter of a benchmark, such as niah.samples=2.",
)
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
    again; cells that are done are not run again. --model, --pipeline, --benchmark, --task, --metric
    and --set may be repeated.
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
