"""The plot of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Setting
from .rows import CAPTURED, EAGER, GRAPH, WALL, DecodeRow, Outcome, Row
from .tables import ran

PLOT_NAME = "profile.png"
COLOURS = {"baseline": "0.6", "realised": "tab:blue", "simulated": "tab:orange"}
NO_MATPLOTLIB = "no plot: matplotlib is not installed (pip install 'sparse-attention-hub[report]')"


def plot(folder: Path, setting: Setting, rows: Sequence[Outcome]) -> str:
    """Draw the profile.

    Returns:
        A line that says where the plot is, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    groups: dict[str, list[Outcome]] = {}
    for row in rows:
        if row.status == "ok" and row.times:  # what could not be timed is no bar of 0
            groups.setdefault(str(getattr(row, "shape", "")), []).append(row)
    height = sum(1.2 + 0.3 * len(group) for group in groups.values()) + 0.8
    figure = Figure(figsize=(11, max(2.0, height)), layout="constrained")
    figure.suptitle(title_of(setting), fontsize=9)
    ratios = [1.2 + 0.3 * len(group) for group in groups.values()]
    axes = figure.subplots(
        max(1, len(groups)), squeeze=False, gridspec_kw={"height_ratios": ratios or [1]}
    )
    for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=False):
        draw_group(axis, name, group)
    path = folder / PLOT_NAME
    figure.savefig(path, dpi=120)
    return f"plot: {path}"


def title_of(setting: Setting) -> str:
    """The line above the plot."""
    plain = setting.to_plain()
    return f"{setting.card}, torch {plain['versions']['torch']}, {plain['date'][:10]}"


def draw_group(axis: Any, title: str, rows: Sequence[Outcome]) -> None:
    """Horizontal bars, a mark where the floor is."""
    labels, values, floors, colours = [], [], [], []
    for row in rows:
        kind, value = "", 0.0
        if isinstance(row, Row):
            kind = GRAPH if GRAPH in row.times else WALL
            value = scaled_or_zero(row.seconds(kind), 1e6)
            floors.append(scaled_or_zero(row.floor, 1e6))
        elif isinstance(row, DecodeRow):
            kind = CAPTURED if CAPTURED in row.times else EAGER
            value = scaled_or_zero(row.tokens_per_second(kind), 1)
            floors.append(scaled_or_zero(row.floor_tokens_per_second, 1))
        labels.append(f"{row.name} [{ran(row)}, {kind}, {row.saving}]")
        values.append(value)
        colours.append(COLOURS[row.saving])
    places = list(range(len(rows)))
    axis.margins(x=0.12)
    bars = axis.barh(places, values, color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axis.plot(floors, places, "|", color="black", markersize=9, label="floor")
    axis.set_yticks(places, labels, fontsize=7)
    axis.invert_yaxis()
    times = all(isinstance(row, Row) for row in rows)
    axis.set_xscale("log" if times else "linear")
    axis.set_xlabel("µs per call" if times else "tokens per second", fontsize=8)
    axis.set_title(title, fontsize=8, loc="left")
    axis.legend(fontsize=7)


def scaled_or_zero(value: float | None, factor: float) -> float:
    """A number for a bar."""
    return 0.0 if value is None else value * factor
