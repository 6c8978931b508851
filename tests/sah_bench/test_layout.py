"""Tables and lines at the width of a terminal."""

import io
import itertools
import subprocess
import sys

import pytest
from rich.console import Console

from sah_bench.layout import folded, noted, table

pytestmark = pytest.mark.unit

LONG = "sink(128) | local(128) | oracle-top-k(heavy_size=0.05)"
COLUMNS = {
    "pipeline": ["dense", LONG],
    "accuracy %": ["100.0", "87.5"],
    "density": ["1.0000", "0.1129"],
    "output-error": ["0.0000", "0.0617"],
    "saving": ["none", "realised"],
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(width, columns=COLUMNS, **options):
    console = Console(width=width, highlight=False)
    shown = table(columns, width=width, texts=["pipeline"], left=["saving"], **options)
    with console.capture() as captured:
        console.print(shown)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_text_stands_beside_its_numbers_where_there_is_room():
    lines = [line.split() for line in printed(90, title="tiny, niah")]
    assert lines == [
        ["tiny,", "niah"],
        ["pipeline", "accuracy", "%", "density", "output-error", "saving"],
        ["─" * 90],
        ["dense", "100.0", "1.0000", "0.0000", "none"],
        ["sink(128)", "|", "local(128)", "|", "87.5", "0.1129", "0.0617", "realised"],
        ["oracle-top-k(heavy_size=0.05)"],
    ]


def test_a_text_stands_above_its_numbers_where_it_would_be_squeezed():
    assert printed(60, title="tiny, niah") == [
        "tiny, niah",
        "  accuracy %  density  output-error  saving",
        "─" * 60,
        "dense",
        "       100.0   1.0000        0.0000  none",
        LONG,
        "        87.5   0.1129        0.0617  realised",
    ]


def test_numbers_take_several_lines_where_one_is_too_short():
    assert printed(30) == [
        "    accuracy %   density",
        "  output-error  saving",
        "─" * 30,
        "dense",
        "         100.0    1.0000",
        "        0.0000  none",
        "sink(128) | local(128) |",
        "oracle-top-k(heavy_size=0.05)",
        "          87.5    0.1129",
        "        0.0617  realised",
    ]


@pytest.mark.parametrize("width", [20, 40, 55, 80, 120])
@pytest.mark.parametrize("is_compact", [False, True])
def test_no_line_is_too_long_and_no_number_is_cut(width, is_compact):
    lines = printed(width, is_compact=is_compact)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for cell in itertools.chain(*list(COLUMNS.values())[1:]):
        assert cell in words


def test_a_row_without_texts_belongs_to_the_one_above():
    columns = {"pipeline": [LONG, ""], "figure": ["mean", "best"], "": ["1.0", "2.0"]}
    shown = printed(30, columns)
    assert shown[-2:] == ["    mean  1.0", "    best  2.0"]


def test_a_line_is_whole_where_there_is_no_terminal(monkeypatch):
    line = "  failed  name  " + "word " * 40
    assert folded(line, 4) == line
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    lines = folded(line, 4).splitlines()
    assert lines[0].startswith("  failed  name  word")
    assert all(line.startswith("    word") for line in lines[1:])
    assert max(map(len, lines)) <= 40


def test_a_note_stands_behind_a_line_or_below_it(monkeypatch):
    note = "it requires another version of this"
    assert noted("  old  incompatible", note, 6) == f"  old  incompatible  {note}"
    assert noted("  sink  ok  ", "", 6) == "  sink  ok"
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    assert noted("  old  incompatible", note, 6).splitlines() == [
        "  old  incompatible",
        "      it requires another",
        "      version of this",
    ]
    assert noted("  sink  ok  ", "", 6) == "  sink  ok"


@pytest.mark.integration
def test_the_layout_is_imported_without_rich():
    code = "import sys, sah_bench.layout; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
