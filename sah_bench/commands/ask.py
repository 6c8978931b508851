"""``sah-bench ask``: questions about a text, answered by pipelines side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from sah_core.errors import one_line

from ..layout import number
from ..options import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    PIPELINE_HELP,
    debug_option,
    plugin_names,
    plugin_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sah_core.pipeline import Pipeline

    from ..asking import Answer, Plan

NARROWEST = 30
"""Columns that an answer needs beside others; with less they stand below one another."""
_FACTS = 16


@click.command()
@click.option("--model", required=True, help=MODEL_HELP, shell_complete=plugin_names("models"))
@click.option("--context", help="File with the text; - reads standard input.")
@click.option("--text", help="The text itself.")
@click.option("--question", "questions", multiple=True, help="What to ask; may be repeated.")
@click.option("--pipeline", "pipelines", multiple=True, help=f"{PIPELINE_HELP} May be repeated.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, help="The most tokens of an answer."
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Use the chat template or not; used if the model has one.",
)
@click.option("--system", help="System message, for chat templates.")
@click.option(
    "--answer-prefix", default="", help="Start of the answer, put into the model's mouth."
)
@click.option(
    "--max-context-length", type=click.IntRange(min=1), help="Tokens of context to keep; else all."
)
@click.option(
    "--truncation",
    type=click.Choice(["none", "middle", "head"]),
    help="What a longer context keeps: its two ends (middle, if not given), its start (head), or "
    "it is refused (none).",
)
@click.option(
    "--generation",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of transformers' generate, such as temperature=0.7; may be repeated. A "
    "temperature, top_p or top_k asks for sampling.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of sampled answers.")
@click.option(
    "--backend",
    default="auto",
    help="For pipelines that name none.",
    shell_complete=plugin_names("backends"),
)
@click.option("--dtype", help=DTYPE_HELP)
@click.option("--device", help=DEVICE_HELP)
@click.option(
    "--adapter", default="hf", help="What runs the model.", shell_complete=plugin_names("adapters")
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@plugin_option
@debug_option
def ask(as_json: bool, no_progress: bool, **options: Any) -> None:
    """Ask questions about a text and compare the answers of pipelines with the dense one.

    The text is read once, densely, for all pipelines whose prefill is dense. Times are of answers
    without observers; density and output error come from a second pass.
    """
    from ..asking import Asking

    plan = _plan(**options)
    with _progress(enabled=not no_progress) as tell:
        answers = Asking(plan, tell).run()
    if as_json:
        click.echo(json.dumps(_plain(plan, answers), indent=2, ensure_ascii=False))
    else:
        from ..tables import console

        print_answers(plan.request.question_list, answers, console())
    failed = [answer for row in answers for answer in row if answer.error]
    for message in dict.fromkeys(f"{a.pipeline}: {a.error}" for a in failed):
        click.echo(f"error: {message}", err=True)
    if failed:
        raise click.exceptions.Exit(2 if all(answer.bad_input for answer in failed) else 1)


def _plan(
    *,
    model: str,
    context: str | None,
    text: str | None,
    questions: tuple[str, ...],
    pipelines: tuple[str, ...],
    backend: str,
    generation: tuple[str, ...],
    max_new_tokens: int,
    max_context_length: int | None,
    **options: Any,
) -> Plan:
    from sah_core import Request, registry

    from ..asking import Plan

    if not questions:
        raise click.UsageError("no question: give at least one --question")
    for kind, name in ((registry.adapters, options["adapter"]), (registry.backends, backend)):
        if name != "auto":
            kind.entry(name)
    wanted = _pipelines(pipelines, backend)
    settings = _generation(generation)
    request = Request(
        context=_context(context, text),
        questions=list(questions),
        chat=options.pop("chat"),
        system=options.pop("system"),
        answer_prefix=options.pop("answer_prefix"),
        truncation=options.pop("truncation"),
    )
    length = {} if max_context_length is None else {"max_context_length": max_context_length}
    return Plan(
        model=model,
        request=request,
        pipelines=wanted,
        request_kwargs=length,
        generation={**settings, "max_new_tokens": max_new_tokens},
        **options,
    )


def _context(path: str | None, text: str | None) -> str:
    """The text, from a file, standard input or the command line."""
    if (path is None) == (text is None):
        problem = "no text" if path is None else "two texts"
        raise click.UsageError(f"{problem}: give --context FILE, --context - or --text TEXT")
    if path is not None:
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"it is no UTF-8 text ({error.args[-1]})"
            raise click.UsageError(f"--context {path!r} cannot be read: {reason}") from error
    if text is None or not text.strip():
        raise click.UsageError(f"the text is empty ({'--text' if path is None else path})")
    return text


def _pipelines(texts: tuple[str, ...], backend: str) -> tuple[Pipeline, ...]:
    """The pipelines beside `dense`, each once, with the text as it was written for a label."""
    from sah_core.pipeline import Pipeline

    found: dict[str, Pipeline] = {}
    for text in texts:
        pipeline = attrs.evolve(Pipeline.parse(text), name=" ".join(text.split()))
        if not pipeline.is_dense and pipeline.backend == "auto" and backend != "auto":
            pipeline = attrs.evolve(pipeline, backend=backend)
        pipeline.check_artifacts()
        if not pipeline.is_dense:
            found.setdefault(pipeline.text, pipeline)
    return tuple(found.values())


def _generation(settings: tuple[str, ...]) -> dict[str, Any]:
    """Generation arguments from texts such as ``temperature=0.7``; the values are YAML."""
    import yaml

    found = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip():
            raise click.UsageError(
                f"--generation {setting!r}: expected name=value, such as temperature=0.7"
            )
        if name.strip() in ("max_new_tokens", "max_length"):
            raise click.UsageError(f"--generation {name.strip()}: give --max-new-tokens")
        found[name.strip()] = value
    if _asks_to_sample(found):
        found.setdefault("do_sample", True)
    return found


def _asks_to_sample(generation: Mapping[str, Any]) -> bool:
    """Whether somebody who says this means sampling: not with a temperature of 0, nor with
    contrastive search, which reads ``top_k`` too.
    """
    if generation.get("temperature") == 0 or generation.get("penalty_alpha"):
        return False
    return any(generation.get(name) is not None for name in ("temperature", "top_p", "top_k"))


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; one after the other where there is no terminal."""
    if not enabled:
        yield lambda what: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status("starting") as status:
            yield lambda what: status.update(escape(what))
    else:
        yield lambda what: click.echo(f"{what} ...", err=True)


def print_answers(
    questions: Sequence[str], answers: Sequence[Sequence[Answer]], console: Console
) -> None:
    """Print the answers to each question side by side, or one below the other if it is narrow."""
    is_wide = console.width >= _FACTS + len(answers[0]) * NARROWEST
    for question, row in zip(questions, answers, strict=True):
        console.print(f"\nquestion: {question}", markup=False, style="bold")
        if is_wide:
            console.print(answers_table(row))
        else:
            _print_stacked(row, console)
    notes = [
        "density: selected over allowed keys. output error: distance of the attention outputs from "
        "dense attention on the same query, key and value, mean over layers and rows. both are of "
        "a second, observed pass; times are of a pass without observers.",
        "first token: seconds from the whole prompt to the first new token, the prefill included.",
    ]
    if any(not answer.observed_alike for row in answers for answer in row):
        notes.append("(*) the observed pass gave other tokens than the timed one.")
    for note in notes:
        console.print(note, style="dim")


def answers_table(answers: Sequence[Answer]) -> Table:
    """A column per pipeline: the answer, and what was measured."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("", width=_FACTS - 2, style="dim")
    for answer in answers:
        table.add_column(Text(answer.pipeline), overflow="fold", ratio=1)
    table.add_row("answer", *(_answer_text(answer) for answer in answers))
    table.add_row()
    for name, show in _ROWS.items():
        table.add_row(name, *(Text("" if answer.error else show(answer)) for answer in answers))
    return table


def _print_stacked(answers: Sequence[Answer], console: Console) -> None:
    """The answers below one another, then what was measured of each."""
    from rich.padding import Padding
    from rich.text import Text

    from ..layout import table

    for answer in answers:
        console.print(Text(f"\n{answer.pipeline}", style="bold"))
        console.print(Padding(_answer_text(answer), (0, 0, 0, 2)))
        if not answer.error and answer.difference is not None:
            line = Text(f"differs {_difference(answer)}", style="dim")
            console.print(Padding(line, (0, 0, 0, 2)))
    measured = [answer for answer in answers if not answer.error]
    if not measured:
        return
    columns = {
        name: [show(answer) for answer in measured]
        for name, show in _ROWS.items()
        if name != "differs"
    }
    labels = {"pipeline": [answer.pipeline for answer in measured]}
    console.print()
    console.print(
        table({**labels, **columns}, width=console.width, texts=["pipeline"], left=["saving"])
    )


def _answer_text(answer: Answer) -> Text:
    """All answers of a pipeline to a question, or why there is none."""
    from rich.text import Text

    if answer.error:
        return Text(f"error: {answer.error}", style="red")
    texts = (answer.text, *answer.others)
    return Text("\n\n".join(text.strip("\n") or "(nothing)" for text in texts))


def _difference(answer: Answer) -> str:
    found = answer.difference
    if found is None:
        return "-" if answer.pipeline == "dense" else "nowhere"
    dense, here = (f"“{part}”" if part else "it ends" for part in (found.dense, found.here))
    after = f", after “{found.before}”" if found.before else ""
    return one_line(f"at token {found.token}{after}: dense {dense}, here {here}")


_ROWS: dict[str, Callable[[Answer], str]] = {
    "density": lambda a: number(a.density, ".4f"),
    "output error": lambda a: number(a.output_error, ".4f"),
    "first token": lambda a: f"{number(a.seconds_to_first_token, '.2f')} s",
    "tokens per s": lambda a: number(a.tokens_per_second, ".1f"),
    "new tokens": lambda a: f"{a.new_tokens}, {a.finished}{'' if a.observed_alike else ' (*)'}",
    "saving": lambda a: a.saving,
    "differs": _difference,
}


def _generation_of(plan: Plan) -> dict[str, Any]:
    """The generation options, with the content of the code that they name."""
    from sah_core import registry

    identify = getattr(registry.adapters[plan.adapter], "generation_identity", dict)
    return dict(identify(plan.generation))


def _plain(plan: Plan, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Everything as JSON-able data."""
    return {
        "model": plan.model,
        "context_tokens": answers[0][0].context_tokens,
        "generation": _generation_of(plan),
        "seed": plan.seed,
        "questions": [
            {
                "question": question,
                "answers": [attrs.asdict(answer) for answer in row],
            }
            for question, row in zip(plan.request.question_list, answers, strict=True)
        ],
    }
