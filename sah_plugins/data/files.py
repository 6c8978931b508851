"""Reads rows from parquet, JSON Lines, JSON and CSV files, one at a time."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from sah_core.errors import DataError, one_line

Row = dict[str, Any]

_BATCH = 16
_CHUNK = 1 << 20
_SPACE_AND_MARKS = " \t\r\n,"


def rows_of(path: Path, owner: str, nested: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file; the file is never in memory as a whole.

    Args:
        path: The file; its suffix says how to read it.
        owner: The benchmark and task, for errors.
        nested: Columns that hold lists or mappings, which a CSV file has as JSON text.

    Raises:
        DataError: The file cannot be read as what its suffix says.
    """
    if path.suffix == ".csv":
        return _csv_rows(path, owner, nested)
    return READERS[path.suffix](path, owner)


def _parquet_rows(path: Path, owner: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        _unreadable(owner, path, "parquet", error)


def _json_line_rows(path: Path, owner: str) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _mapping(json.loads(line), f"line {number}", path, owner)
    except (OSError, ValueError) as error:
        _unreadable(owner, path, "JSON Lines", error)


def _json_rows(path: Path, owner: str) -> Iterator[Row]:
    """The objects of a JSON array, or of a file that has one after another."""
    decoder, number = json.JSONDecoder(), 0
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK).lstrip(_SPACE_AND_MARKS).removeprefix("[")
            while True:
                text = text.lstrip(_SPACE_AND_MARKS)
                if text.startswith("]"):
                    return
                try:
                    value, end = decoder.raw_decode(text) if text else (None, 0)
                except ValueError:
                    end = 0
                    # Twice as much each time, so that a long object is not scanned too often.
                    more = file.read(max(_CHUNK, len(text)))
                    if not more:
                        raise
                    text += more
                    continue
                if end == 0:
                    text = file.read(_CHUNK)
                    if not text:
                        return
                    continue
                yield _mapping(value, f"item {number}", path, owner)
                number, text = number + 1, text[end:]
    except (OSError, ValueError) as error:
        _unreadable(owner, path, "JSON", error)


def _csv_rows(path: Path, owner: str, nested: Sequence[str]) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name in nested:
                    text = row.get(name)
                    row[name] = json.loads(text) if text else None
                yield row
    except (OSError, ValueError, csv.Error) as error:
        _unreadable(owner, path, "CSV", error)
    finally:
        csv.field_size_limit(limit)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_line_rows,
    ".json": _json_rows,
    ".csv": lambda path, owner: _csv_rows(path, owner, ()),
}
"""By suffix; in this order where a folder has several."""


def count_rows(path: Path, owner: str) -> int:
    """Return how many rows a file has.

    Raises:
        DataError: The file cannot be read.
    """
    return _counted(path, owner, *_version(path))


def _version(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _counted(path: Path, owner: str, size: int, changed: int) -> int:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except (OSError, pyarrow.ArrowException) as error:
            _unreadable(owner, path, "parquet", error)
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in rows_of(path, owner))


def _mapping(value: object, where: str, path: Path, owner: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(owner, str(path), f"{where} is no mapping: expected one row, by column")
    return value


def _unreadable(owner: str, path: Path, form: str, error: Exception) -> NoReturn:
    raise DataError(
        owner, str(path), f"cannot be read as {form}: {one_line(str(error))}"
    ) from error
