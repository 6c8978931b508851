"""JSON and JSON Lines files that a kill at any moment leaves readable."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Lines:
    """The whole lines of a JSON Lines file, and where each ends."""

    path: Path
    rows: list[dict[str, Any]]
    ends: list[int]

    @classmethod
    def read(cls, path: Path) -> Lines:
        """Read the lines up to the first that is torn; none if there is no file."""
        lines = cls(path, [], [])
        if not path.exists():
            return lines
        end = 0
        for line in path.read_bytes().splitlines(keepends=True):
            row = _row(line)
            if row is None:  # torn, and so is everything after it
                break
            end += len(line)
            lines.rows.append(row)
            lines.ends.append(end)
        return lines

    def cut(self, count: int) -> list[dict[str, Any]]:
        """Shorten the file to its first lines, and return them."""
        size = self.ends[count - 1] if count else 0
        if self.path.exists():
            cut(self.path, size)
        return self.rows[:count]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file of samples; none if there is no such file."""
    return Lines.read(path).rows


def count_lines(path: Path) -> int:
    """The whole lines of a JSON Lines file; 0 if there is none."""
    return len(Lines.read(path).rows)


def replace_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file of samples in one step."""
    _replace(path, map(to_line, rows))


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if there is no such file or it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: readers see the old content or the new one.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    _replace(path, [(text + "\n").encode()])


def append_bytes(path: Path, text: bytes) -> None:
    """Write behind what a file holds; it is on the disk when this returns."""
    with path.open("ab") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def cut(path: Path, size: int) -> None:
    """Shorten a file; one that is short enough is left alone."""
    if path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def arrange_lines(path: Path, order: Sequence[str]) -> None:
    """Put lines with an id into the order of the ids; those of one id follow one another."""
    spans: dict[str, list[int]] = {}
    with path.open("rb") as file:
        begin = 0
        for line in file:
            span = spans.setdefault(json.loads(line)["id"], [begin, begin])
            span[1] = begin = begin + len(line)

        def pieces() -> Iterator[bytes]:
            for begin, end in (spans[sample_id] for sample_id in order if sample_id in spans):
                file.seek(begin)
                yield file.read(end - begin)

        _replace(path, pieces())


def _replace(path: Path, content: Iterable[bytes]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must leave no temporary file behind
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a JSON Lines file.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "id" in row else None
