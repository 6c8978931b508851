"""Tables: the rows of one task, wherever they lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from sah_core.benchmark import DataSource
from sah_core.errors import DataError, short_repr
from sah_core.hashing import file_sha256

from . import hub
from .files import READERS, Row, count_rows, rows_of

LOCK = "sah-data.json"
"""Beside fetched data: from which commit each file came, and its hash."""

_DIGEST_LETTERS = 16


@attrs.frozen(kw_only=True, slots=False)
class Table:
    """The rows of one task.

    Attributes:
        owner: Benchmark and task, for errors.
        source: What they are.
    """

    owner: str
    source: DataSource

    def __len__(self) -> int:
        raise NotImplementedError

    def rows_at(self, indexes: Sequence[int]) -> Iterator[Row]:
        """Yield the rows at ascending positions."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """Yield all rows, one in memory at a time."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """Where they lie, in words."""
        raise NotImplementedError

    @property
    def revision(self) -> str:
        """What identifies the content."""
        raise NotImplementedError

    def checked(self) -> Iterator[Row]:
        """Yield all rows, each with all columns.

        Raises:
            DataError: There is no row, or one lacks a column.
        """
        number = -1
        for number, row in enumerate(self.rows()):
            self.check(row, number)
            yield row
        if number < 0:
            raise DataError(self.owner, self.place, f"it holds no rows: expected {self._expected}")

    def check(self, row: Row, number: int) -> None:
        """Make sure that a row has all columns.

        Raises:
            DataError: It lacks one.
        """
        missing = [name for name in self.source.columns if name not in row]
        if missing:
            raise DataError(
                self.owner,
                self.place,
                f"row {number} has no column {' and no '.join(map(repr, missing))}: "
                f"expected {self._expected}; it has {short_repr([*row])}",
            )

    @property
    def _expected(self) -> str:
        return f"rows with the columns {', '.join(self.source.columns)}"


@attrs.frozen(kw_only=True, slots=False)
class LocalTable(Table):
    """Rows in local files, one after another."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return sum(count_rows(path, self.owner) for path in self.files)

    @property
    def place(self) -> str:
        """The first file."""
        return str(self.files[0])

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all files."""
        for path in self.files:
            yield from rows_of(path, self.owner, self.source.nested)

    def rows_at(self, indexes: Sequence[int]) -> Iterator[Row]:
        """Read the files up to the last of the positions."""
        wanted = iter(indexes)
        index = next(wanted, None)
        for number, row in enumerate(self.rows()):
            if index is None:
                return
            if number == index:
                self.check(row, number)
                yield row
                index = next(wanted, None)

    @property
    def revision(self) -> str:
        """The commit from which the files were fetched, or else the hash of their content."""
        digests = [file_sha256(path) for path in self.files]
        fetched = fetched_from(self.files[0]) if len(self.files) == 1 else None
        if fetched and fetched["sha256"] == digests[0]:
            return f"{fetched['hub']}@{fetched['revision']}"
        return f"sha256:{'+'.join(digest[:_DIGEST_LETTERS] for digest in digests)}"


@attrs.frozen(kw_only=True, slots=False)
class HubTable(Table):
    """Rows of a data set of the hub."""

    @cached_property
    def commit(self) -> str:
        """The commit that is read."""
        return hub.commit_of(self.source, self.owner)

    @cached_property
    def _data(self) -> Any:
        return hub.load(self.source, self.commit, self.owner)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def place(self) -> str:
        """The data set and the commit."""
        return f"hub data set {self.source.hub} at {self.commit}"

    def rows(self) -> Iterator[Row]:
        """Yield the rows, from the disk."""
        return iter(self._data)

    def rows_at(self, indexes: Sequence[int]) -> Iterator[Row]:
        """Read those rows alone."""
        for index in indexes:
            row = self._data[index]
            self.check(row, index)
            yield row

    @property
    def revision(self) -> str:
        """The data set and the commit."""
        return f"{self.source.hub}@{self.commit}"

    def save(self, folder: Path) -> Path:
        """Write the rows to a parquet file as `find` looks for it, and note the commit beside it.

        Raises:
            DataError: They cannot be loaded, or lack a column.
        """
        for _ in self.checked():
            pass
        path = folder / fetched_name(self.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        self._data.to_parquet(temporary)
        os.replace(temporary, path)
        _note(folder, path, self)
        return path


def find(source: DataSource, owner: str, folders: Sequence[Path]) -> LocalTable:
    """Return the table of a source in the first folder that has it.

    A folder may be laid out as the hub has it, as ``sah-bench data fetch`` writes it, or simply
    with one file per task.

    Raises:
        DataError: None has.
    """
    patterns = _patterns(source)
    for folder in folders:
        for pattern in patterns:
            for suffix in READERS:
                if pattern.endswith(suffix):
                    files = sorted(folder.glob(pattern))
                else:
                    files = sorted(folder.glob(pattern + suffix))
                if files:
                    return LocalTable(owner=owner, source=source, files=tuple(files))
    shown = ", ".join(f"{pattern}.*" for pattern in patterns if "*" not in pattern)
    raise DataError(
        owner,
        str(folders[-1]),
        f"no file with its rows: looked for {shown} as {', '.join(READERS)} there and in "
        f"{folders[0].name}/. expected rows with the columns {', '.join(source.columns)}",
    )


def _patterns(source: DataSource) -> list[str]:
    split = source.split
    config = source.config
    inner = (source.files or "").rpartition("::")[2]
    stems = [inner.rpartition(".")[0]] if inner else []
    if config is None:
        name = source.hub.rpartition("/")[2]
        stems += [split, f"{split}-*", f"{split}/*", f"data/{split}", f"data/{split}-*"]
        stems += ["data", name]
    else:
        stems += [f"{config}/{split}", f"{config}/{split}-*", f"{config}/{split}/*"]
        stems += [config, f"{config}-{split}", f"{config}_{split}", f"data/{config}"]
    return list(dict.fromkeys(stems))


def fetched_name(source: DataSource) -> str:
    """Return the name of the parquet file of fetched rows, below the benchmark's folder."""
    if source.config is None:
        return f"{source.split}.parquet"
    return f"{source.config}/{source.split}.parquet"


def fetched_from(path: Path) -> dict[str, Any] | None:
    """Return what the lock file says of a fetched file; None if there is none."""
    for folder in (path.parent, path.parent.parent):
        try:
            noted = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = noted.get("files", {}).get(path.relative_to(folder).as_posix())
        return found if isinstance(found, dict) else None
    return None


def _note(folder: Path, path: Path, table: HubTable) -> None:
    lock = folder / LOCK
    noted = json.loads(lock.read_text(encoding="utf-8")) if lock.exists() else {"files": {}}
    source = table.source
    noted["files"][path.relative_to(folder).as_posix()] = {
        "hub": source.hub,
        "config": source.config,
        "split": source.split,
        "revision": table.commit,
        "rows": len(table),
        "sha256": file_sha256(path),
    }
    temporary = lock.with_suffix(".part")
    temporary.write_text(json.dumps(noted, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, lock)
