"""Benchmarks of outside data: what they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from sah_core.benchmark import Benchmark, DataSource, Example, Tokenizer
from sah_core.errors import DataError, ParameterError, nearest_names
from sah_core.parameters import param

from .files import Row
from .table import HubTable, Table, find


@attrs.frozen(kw_only=True, slots=False)
class TableBenchmark(Benchmark):
    """A benchmark whose examples are made of the rows of a data set.

    A subclass says what its tasks are in :meth:`info`, whose ``source`` must be given, and makes
    examples of a row in :meth:`row_examples`.
    """

    one_per_row: ClassVar[bool] = True
    """Whether every row makes exactly one example."""

    data_dir: str | None = param(
        None,
        type=str,
        help="folder with the rows, as parquet, JSON Lines, JSON or CSV; by default the hub",
        location=True,
    )
    hub_revision: str | None = param(
        None,
        type=str,
        help="commit of the data set on the hub; by default the benchmark's own, or the newest",
        location=True,
    )
    only: str | None = attrs.field(default=None, repr=False)
    """The one task that this instance is for; None for all."""

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the examples of one row, those of one context consecutively.

        Args:
            task: One of :meth:`tasks`.
            index: The position of the row in its table.
            row: The row, with all declared columns.
        """
        raise NotImplementedError

    def for_task(self, task: str) -> Self:
        """Return this benchmark for one task, identified by that task's data alone."""
        return attrs.evolve(self, only=task)

    def source(self, task: str) -> DataSource:
        """Return where the rows of ``task`` come from.

        Raises:
            ParameterError: There is no such task.
        """
        known = self.tasks()
        if task not in known:
            nearest = nearest_names(task, known)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ParameterError(self.name, "task", task, f"{hint}one of {', '.join(known)}")
        info = self.info(task)
        if info is None or info.source is None:
            raise NotImplementedError(f"{type(self).__name__} declares no source of {task}")
        if self.hub_revision is not None:
            return attrs.evolve(info.source, revision=self.hub_revision)
        return info.source

    def table(self, task: str) -> Table:
        """Return the rows of ``task``.

        Raises:
            DataError: The folder, or the hub, does not have them.
        """
        source, owner = self.source(task), f"{self.name} {task}"
        if self.data_dir is None:
            return HubTable(owner=owner, source=source)
        folder = Path(self.data_dir).expanduser()
        if not folder.is_dir():
            raise DataError(owner, str(folder), "no such folder: expected the data_dir to be one")
        return find(source, owner, [folder / self.name, folder])

    def load(self, task: str) -> Iterator[Example]:
        """Yield the examples of every row."""
        for index, row in enumerate(self.table(task).checked()):
            yield from self.row_examples(task, index, row)

    def count(self, task: str) -> int | None:
        """Return the number of rows; None if a row makes any number of examples."""
        return len(self.table(task)) if self.one_per_row else None

    def examples_at(
        self, task: str, tokenizer: Tokenizer, seed: int, indexes: Sequence[int]
    ) -> Iterator[Example]:
        """Yield the examples at the given positions, reading no other rows where that can be."""
        if not self.one_per_row:
            yield from super().examples_at(task, tokenizer, seed, indexes)
            return
        rows = self.table(task).rows_at(indexes)
        for index, row in zip(indexes, rows, strict=False):
            yield from self.row_examples(task, index, row)

    def revision(self) -> str:
        """Return the commit of the data, or the hash of local files."""
        if self.only is not None:
            return self.table(self.only).revision
        return "; ".join(f"{task} {self.table(task).revision}" for task in self.tasks())

    def data_of(self, task: str) -> Mapping[str, Any]:
        """Read all rows and say what they are.

        Raises:
            DataError: They are not there, or lack a column.
        """
        table = self.table(task)
        rows = sum(1 for _ in table.checked())
        found = {"place": table.place, "revision": table.revision, "rows": rows}
        info = self.info(task)
        if self.one_per_row and info is not None and info.examples is not None:
            found["expected"] = info.examples
        return found

    def fetch_data(self, task: str, folder: Path) -> Path:
        """Copy the rows from the hub into ``folder``, as ``data_dir`` takes them.

        Raises:
            DataError: The hub does not give them.
        """
        table = HubTable(owner=f"{self.name} {task}", source=self.source(task))
        return table.save(folder / self.name)


def texts(value: object) -> tuple[str, ...]:
    """Return a list column as texts; a single value is a list of one, None an empty one."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(str(item) for item in value)
    return (str(value),)
