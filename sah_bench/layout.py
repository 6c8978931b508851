"""Tables for any width: rows whose text would be squeezed stand above their numbers."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LEAST = 30
"""Columns that the text of a row gets beside its numbers; with less it stands above them."""
_INDENT = "  "
_GAP = 2


def table(
    columns: Mapping[str, Sequence[str]],
    *,
    width: int,
    texts: Sequence[str],
    left: Sequence[str] = (),
    styles: Sequence[str] = (),
    title: str = "",
    is_compact: bool = False,
) -> RenderableType:
    """A table of texts and numbers, as wide as a terminal.

    Args:
        columns: The cells of every column by its head.
        width: Characters of a line.
        texts: Columns of long text, which is folded.
        left: Columns that begin at the left, as texts do.
        styles: Of every row; plain by default.
        title: Stands above the table.
        is_compact: Two blank characters between columns, not three.

    Returns:
        What a rich console prints.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(zip(*columns.values(), strict=True))
    each = list(styles) or [""] * len(rows)
    if _wanted(columns, texts, 2 if is_compact else 3) > width:
        return _stacked(columns, width=width, texts=texts, left=left, styles=each, title=title)
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0) if is_compact else (0, 1),
        title=Text(title) if title else None,
        title_justify="left",
    )
    for name in columns:
        if name in texts:
            made.add_column(name, overflow="fold", ratio=1 if name == texts[-1] else None)
        else:
            made.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for style, cells in zip(each, rows, strict=True):
        # Text, because the brackets of a pipeline would be read as markup.
        made.add_row(*(Text(cell, style=style) for cell in cells))
    return made


def number(value: float | None, form: str) -> str:
    """A number as the text of a cell, a dash if there is none."""
    return "-" if value is None else format(value, form)


def folded(line: str, hanging: int) -> str:
    """A line of prose, cut between words at the width of the terminal; whole where there is none,
    so that it can be searched.

    Args:
        line: The line.
        hanging: Blank characters before what is left for the next lines.
    """
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(
        line,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def noted(head: str, note: str, hanging: int) -> str:
    """A line with a note behind it, or below it where a terminal is too narrow for both.

    Args:
        head: The line.
        note: The note; may be empty.
        hanging: Blank characters before a note that stands below.
    """
    line = f"{head}  {note}".rstrip()
    if "\n" not in folded(line, 0):
        return line
    return f"{head.rstrip()}\n{folded(' ' * hanging + note, hanging)}"


def _wanted(columns: Mapping[str, Sequence[str]], texts: Sequence[str], gap: int) -> int:
    """The width from which on texts stand beside their numbers."""
    total = gap * (len(columns) - 1)
    for name, cells in columns.items():
        needed = _width(name, cells)
        total += min(needed, LEAST) if name in texts else needed
    return total


def _width(name: str, cells: Sequence[str]) -> int:
    return max(map(len, (name, *cells)))


def _stacked(
    columns: Mapping[str, Sequence[str]],
    *,
    width: int,
    texts: Sequence[str],
    left: Sequence[str],
    styles: Sequence[str],
    title: str,
) -> Text:
    """Per row a line of texts, and its numbers below, on as many lines as they need."""
    from rich.text import Text

    numbers = {name: cells for name, cells in columns.items() if name not in texts}
    names = list(numbers)
    sizes = {name: _width(name, cells) for name, cells in numbers.items()}
    per_line = next(
        (
            count
            for count in range(len(names), 1, -1)
            if _line_width(names, sizes, count) <= width - len(_INDENT)
        ),
        1,
    )

    def lines(cells: Mapping[str, str]) -> list[str]:
        made = []
        for begin in range(0, len(names), per_line):
            parts = []
            for place, name in enumerate(names[begin : begin + per_line]):
                room = max(sizes[other] for other in names[place::per_line])
                parts.append(cells[name].ljust(room) if name in left else cells[name].rjust(room))
            made.append((_INDENT + (" " * _GAP).join(parts)).rstrip())
        return made

    text = Text()
    if title:
        text.append(f"{title}\n", style="italic")
    text.append("\n".join([*lines({name: name for name in names}), "─" * width]), style="bold")
    for index, style in enumerate(styles):
        label = ", ".join(columns[name][index] for name in texts if columns[name][index])
        own = lines({name: numbers[name][index] for name in names})
        text.append("\n" + "\n".join([label, *own] if label else own), style=style)
    return text


def _line_width(names: Sequence[str], sizes: Mapping[str, int], count: int) -> int:
    """The width of lines with so many numbers each, which stand below one another."""
    rooms = [max(sizes[name] for name in names[place::count]) for place in range(count)]
    return sum(rooms) + _GAP * (count - 1)
