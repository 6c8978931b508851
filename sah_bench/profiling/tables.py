"""The tables of a profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..layout import table as fitted
from .report import Setting
from .rows import CAPTURED, COLD, EAGER, GRAPH, WALL, DecodeRow, Outcome, Row

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

TABLE_WIDTH = 140
"""Columns of a table that no terminal shows."""


def show(setting: Setting, rows: Sequence[Outcome], title: str) -> None:
    """Print the tables.

    Args:
        setting: Where the numbers come from.
        rows: Attention calls, or whole decode steps.
        title: What the decode steps are.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(TABLE_WIDTH, console.width)
    print_setting(setting, console)
    calls = [row for row in rows if isinstance(row, Row)]
    steps = [row for row in rows if isinstance(row, DecodeRow)]
    if calls:
        print_rows(calls, console, gpu=setting.device.type == "cuda")
    if steps:
        print_decode(steps, title, console)


def print_setting(setting: Setting, console: Console) -> None:
    """Say where the numbers come from."""
    plain = setting.to_plain()
    versions = ", ".join(f"{name} {value}" for name, value in plain["versions"].items() if value)
    bandwidth = setting.copy.bandwidth / 1e9
    console.print(f"{setting.card}; {versions}; {plain['date']}", markup=False, soft_wrap=True)
    console.print(
        f"copy bandwidth {bandwidth:.1f} GB/s (read + write); {setting.rounds} rounds",
        markup=False,
        soft_wrap=True,
    )


def print_rows(rows: Iterable[Row], console: Console, *, gpu: bool) -> None:
    """Print one table per shape, then what the columns mean."""
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        by_shape.setdefault(str(row.shape), []).append(row)
    for title, group in by_shape.items():
        shown = [row for row in group if not is_absent(row)]
        console.print()
        console.print(
            table(title, columns(shown, gpu), [row.saving for row in shown], console.width)
        )
        absent = [row.name.removeprefix("dense: ") for row in group if is_absent(row)]
        if absent:
            line = f"refused by torch: {'; '.join(absent)}"
            console.print(line, markup=False, soft_wrap=True, style="dim")
        print_reasons(shown, console)
    console.print()
    console.print(
        "speed-up: against the fastest dense form of the same kind of time; MB: bytes that must "
        "be read (selection + attention); floor: MB over the copy bandwidth; limit: floor over "
        f"{'cold (else graph) time' if gpu else 'time'}; peak: memory taken during a call"
        f"{'' if gpu else ' by tensors'}.",
        style="dim",
    )
    if gpu:
        console.print(
            "graph: GPU time under CUDA-graph replay, back to back, median; cold: the same with "
            "the L2 cache swept before every call; wall: eager calls, minimum.",
            style="dim",
        )
    else:
        console.print("wall: eager calls, minimum over interleaved rounds.", style="dim")


def is_absent(row: Row) -> bool:
    """Whether this is a dense form that torch does not offer for the call."""
    return row.pipeline is None and row.status == "refused"


def ran(row: Outcome) -> str:
    """The backends that ran, and in place of which."""
    return f"{row.backend} for {row.requested}" if row.fallback else row.backend


def columns(rows: Sequence[Row], gpu: bool) -> dict[str, list[str]]:
    """The texts of a table by column."""
    found = {"form": [row.name for row in rows], "backend": [ran(row) for row in rows]}
    kinds = {GRAPH: "graph µs", COLD: "cold µs", WALL: "wall µs"} if gpu else {WALL: "wall µs"}
    for kind, header in kinds.items():
        if kind == COLD and not any(COLD in row.times for row in rows):
            continue
        found[header] = [status_or(row, scaled(row.seconds(kind), 1e6, ".1f")) for row in rows]
        if gpu and kind == WALL:
            continue
        speedup = [f"{row.speedup(kind):.2f}x" if row.speedup(kind) else "-" for row in rows]
        found["cold speed-up" if kind == COLD else "speed-up"] = speedup
    found["MB"] = [
        scaled(None if row.traffic is None else row.traffic.total, 1e-6, ".2f") for row in rows
    ]
    found["floor µs"] = [scaled(row.floor, 1e6, ".1f") for row in rows]
    found["limit"] = [scaled(row.fraction, 1, ".0%") for row in rows]
    found["peak MB"] = [scaled(row.peak, 1e-6, ".1f") for row in rows]
    found["density"] = [scaled(row.density, 1, ".4f") for row in rows]
    found["saving"] = [row.saving for row in rows]
    return found


def status_or(row: Outcome, text: str) -> str:
    """A number, or the word that says why there is none."""
    return text if row.status == "ok" else row.status


def scaled(value: float | None, factor: float, form: str) -> str:
    """A number as text, a dash if there is none."""
    return "-" if value is None else format(value * factor, form)


def table(
    title: str, texts: dict[str, list[str]], savings: Sequence[str], width: int
) -> RenderableType:
    """A table whose first column folds; simulated savings are marked by colour too."""
    styles = {"baseline": "dim", "simulated": "yellow"}
    return fitted(
        texts,
        width=width,
        texts=[next(iter(texts))],
        left=("backend", "saving"),
        styles=[styles.get(saving, "") for saving in savings],
        title=title,
        is_compact=True,
    )


def print_reasons(rows: Sequence[Outcome], console: Console) -> None:
    """Say below a table what did not run, and what ran in its place."""
    for row in rows:
        name = row.name if row.requested == "torch" else f"{row.name} on {row.requested}"
        style = "red" if row.status in ("failed", "out of memory") else "dim"
        lines = []
        if row.status != "ok":
            lines.append(f"{row.status}: {name}: {row.reason}")
        if row.fallback:
            lines.append(f"fallback: {name}: {row.fallback}")
        if row.no_graph:
            lines.append(f"no graph: {name}: {row.no_graph}")
        for line in lines:
            console.print(line, markup=False, soft_wrap=True, style=style)


def print_decode(rows: Sequence[DecodeRow], title: str, console: Console) -> None:
    """Print the table of whole decode steps."""
    texts = {"pipeline": [row.name for row in rows], "backend": [ran(row) for row in rows]}
    for kind in (CAPTURED, EAGER):
        texts[f"{kind} tok/s"] = [
            status_or(row, scaled(row.tokens_per_second(kind), 1, ".1f")) for row in rows
        ]
        texts[f"{kind} x"] = [scaled(row.speedup(kind), 1, ".2f") for row in rows]
    texts["GB"] = [scaled(row.step_bytes, 1e-9, ".2f") for row in rows]
    texts["floor tok/s"] = [scaled(row.floor_tokens_per_second, 1, ".1f") for row in rows]
    texts["peak MB"] = [scaled(row.peak, 1e-6, ".1f") for row in rows]
    texts["density"] = [scaled(row.density, 1, ".4f") for row in rows]
    texts["saving"] = [row.saving for row in rows]
    console.print()
    console.print(table(title, texts, [row.saving for row in rows], console.width))
    print_reasons(rows, console)
    console.print()
    console.print(
        "tok/s: tokens of all sequences per second, median of rounds; x: against the fastest dense "
        "form of the same kind; fixed length: a graph of one step whose length does not grow; GB: "
        "weights, selection and attended keys and values that a step must read; floor: what the "
        "copy bandwidth allows.",
        style="dim",
    )
