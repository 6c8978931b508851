"""Results on disk: one folder per cell, written so that a killed run goes on at the next sample.

A cell is one model, pipeline, benchmark and task. Its id is the hash of everything that could
change its numbers. Its folder holds

    config.json          what the cell is, and on which machines and libraries its samples were made
    samples.jsonl        one line per sample: prediction, references, scores
    micro_metrics.jsonl  one line per sample: results of the observers, such as density
    records/             per metric that keeps single observations: one line for each
    timings.jsonl        one line per sample: seconds; only this differs between equal runs
    metrics.json         written last, in one step: the cell is done
    error.json           only if the cell failed: the error and its traceback
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import attrs

from sah_core.errors import OutputFolderError

from .json_files import (
    Lines,
    append_bytes,
    arrange_lines,
    cut,
    read_json,
    replace_rows,
    to_line,
    write_json,
)

SAMPLES = "samples.jsonl"
MICRO_METRICS = "micro_metrics.jsonl"
TIMINGS = "timings.jsonl"
RECORDS = "records"
CONFIG = "config.json"
METRICS = "metrics.json"
ERROR = "error.json"

_ID_LETTERS = 12
_LONGEST_SLUG = 80


def canonical(value: Any) -> str:
    """Plain data as text, the same for equal data; NaN is refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def content_id(identity: Mapping[str, Any]) -> str:
    """The hash that names a cell: SHA-256 of its canonical identity."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


def slug(text: str) -> str:
    """`text` as a readable piece of a file name."""
    words = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "x"
    return words[:_LONGEST_SLUG].rstrip("-.")


@attrs.frozen(kw_only=True)
class Sample:
    """What is kept of one answered example; ``observed`` are single observations, by metric."""

    id: str
    record: Mapping[str, Any]
    micro: Mapping[str, Any]
    timing: Mapping[str, Any]
    observed: Mapping[str, Sequence[Mapping[str, Any]]] = attrs.field(factory=dict)


@attrs.define(kw_only=True)
class Cell:
    """The folder of a cell, open for more samples.

    Attributes:
        folder: Where it lies.
        id: The content id.
        records: The lines of samples.jsonl, in order.
        micro: The lines of micro_metrics.jsonl, likewise.
        timings: The lines of timings.jsonl, likewise.
        notes: What the user should know about going on here, one line each.
    """

    folder: Path
    id: str
    records: list[dict[str, Any]] = attrs.field(factory=list)
    micro: list[dict[str, Any]] = attrs.field(factory=list)
    timings: list[dict[str, Any]] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    _lock: Any = attrs.field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        root: Path,
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> Cell:
        """Open the folder of a cell, making it or repairing what a killed run left.

        Args:
            root: The folder of all results.
            identity: Everything that could change the numbers of the cell, as plain data.
            about: Further facts for readers; ``model``, ``benchmark``, ``task`` and ``pipeline``
                name the folder.
            environment: Where samples are made from now on: device, library versions, limit.

        Raises:
            OutputFolderError: The folder cannot be written, holds another cell, or is being
                written by another run.
        """
        from filelock import FileLock, Timeout

        cell_id = content_id(identity)
        folder = find_folder(root, cell_id) or root / folder_name(about, cell_id)
        cell = cls(folder=folder, id=cell_id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cell._lock = FileLock(folder / ".lock", blocking=False)
            cell._lock.acquire()
            cell._write_config(identity, about, environment)
            cell._recover()
        except Timeout as error:
            raise OutputFolderError(str(folder), "another run is writing to it") from error
        except OutputFolderError:
            cell.close()
            raise
        except OSError as error:
            cell.close()
            raise OutputFolderError(str(folder), error.strerror or str(error)) from error
        return cell

    def close(self) -> None:
        """Let other runs write to the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def ids(self) -> set[str]:
        """The samples that are kept."""
        return {record["id"] for record in self.records}

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The content of metrics.json; None while the cell is not done."""
        return read_json(self.folder / METRICS)

    @property
    def error(self) -> dict[str, Any] | None:
        """The content of error.json, if an earlier run failed here."""
        return read_json(self.folder / ERROR)

    def is_done(self, limit: int | None) -> bool:
        """Whether nothing is left to do under this limit on the number of samples."""
        metrics = self.metrics
        if metrics is None:
            return False
        enough = limit is not None and len(self.records) >= limit
        return enough or bool(metrics.get("complete"))

    def append(self, sample: Sample) -> None:
        """Keep one sample; it is on the disk when this returns.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        observed = {
            name: b"".join(to_line({"id": sample.id, **row}) for row in rows)
            for name, rows in sample.observed.items()
        }
        sizes = {"record_bytes": {name: len(text) for name, text in observed.items()}}
        micro = {"id": sample.id, **sample.micro, **(sizes if observed else {})}
        rows = (
            (TIMINGS, self.timings, {"id": sample.id, **sample.timing}),
            (MICRO_METRICS, self.micro, micro),
            # Last: a sample counts as kept once it stands here, so the others must stand by then.
            (SAMPLES, self.records, {"id": sample.id, **sample.record}),
        )
        lines = [(name, kept, row, to_line(row)) for name, kept, row in rows]
        with suppress(FileNotFoundError):  # from here on the cell is not done any more
            os.unlink(self.folder / METRICS)
        for name, text in observed.items():
            if text:
                path = self.records_path(name)
                path.parent.mkdir(exist_ok=True)
                append_bytes(path, text)
        for name, kept, row, line in lines:
            append_bytes(self.folder / name, line)
            kept.append(row)

    def records_path(self, metric: str) -> Path:
        """The file of a metric's single observations."""
        return self.folder / RECORDS / f"{slug(metric)}.jsonl"

    def arrange(self, order: Sequence[str]) -> None:
        """Put the samples into the order of the task, which growing limits do not keep.

        A kill between two of the files costs nothing: they are matched by id when they are read.
        """
        place = {sample_id: number for number, sample_id in enumerate(order)}
        last = len(place)
        ordered = sorted(self.records, key=lambda row: place.get(row["id"], last))
        if ordered != self.records:
            for path in sorted((self.folder / RECORDS).glob("*.jsonl")):
                arrange_lines(path, [row["id"] for row in ordered])
            self.records = ordered
            replace_rows(self.folder / SAMPLES, ordered)
            self._match()

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Mark the cell as done."""
        write_json(self.folder / METRICS, metrics)
        with suppress(FileNotFoundError):
            os.unlink(self.folder / ERROR)

    def fail(self, error: Mapping[str, Any]) -> None:
        """Record why the cell could not go on; the samples stay."""
        write_json(self.folder / ERROR, error)

    def _write_config(
        self, identity: Mapping[str, Any], about: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        path = self.folder / CONFIG
        known = read_json(path)
        if known is None:
            config = {**about, "id": self.id, "identity": identity, "environments": [environment]}
            write_json(path, config)
            return
        if known.get("id") != self.id:
            raise OutputFolderError(str(self.folder), f"it holds the cell {known.get('id')}")
        environments = known.get("environments", [])
        if environment in environments:
            return
        write_json(path, {**known, "environments": [*environments, environment]})
        if environments and (self.folder / SAMPLES).exists():
            changes = [
                f"{key} was {environments[-1].get(key)}, is {value}"
                for key, value in environment.items()
                if key != "limit" and environments[-1].get(key) != value
            ]
            if changes:
                self.notes.append(f"goes on elsewhere than it began: {'; '.join(changes)}")

    def _recover(self) -> None:
        """Read what is kept, and cut off what a killed run left half done."""
        samples = Lines.read(self.folder / SAMPLES)
        micro = {row["id"]: row for row in Lines.read(self.folder / MICRO_METRICS).rows}
        complete = list(takewhile(lambda row: row["id"] in micro, samples.rows))
        count = self._recover_records([micro[row["id"]] for row in complete])
        self.records = samples.cut(count)
        self._match()

    def _match(self) -> None:
        """Give the other files the order of the samples, and no lines of other ones."""
        self.micro, self.timings = self._matched(MICRO_METRICS), self._matched(TIMINGS)

    def _matched(self, name: str) -> list[dict[str, Any]]:
        lines = Lines.read(self.folder / name)
        by_id = {row["id"]: row for row in lines.rows}
        matched = [by_id[row["id"]] for row in self.records if row["id"] in by_id]
        if matched == lines.rows[: len(matched)]:
            return lines.cut(len(matched))
        replace_rows(self.folder / name, matched)
        return matched

    def _recover_records(self, micro: Sequence[Mapping[str, Any]]) -> int:
        """Cut off single observations of samples that are not kept.

        Args:
            micro: What was kept of the samples.

        Returns:
            How many of the samples have all their observations.
        """
        paths = list((self.folder / RECORDS).glob("*.jsonl"))
        there = {path: path.stat().st_size for path in paths}
        ends: list[dict[Path, int]] = [{}]
        for row in micro:
            sizes = row.get("record_bytes", {})
            end = {**ends[-1]}
            for name, size in sizes.items():
                path = self.records_path(name)
                end[path] = end.get(path, 0) + size
            if any(size > there.get(path, 0) for path, size in end.items()):
                break
            ends.append(end)
        for path, size in there.items():
            cut(path, min(size, ends[-1].get(path, 0)))
        return len(ends) - 1


def find_folder(root: Path, cell_id: str) -> Path | None:
    """The folder that holds a cell under whatever readable name; None if there is none."""
    return next(iter(sorted(root.glob(f"*/*/*-{cell_id[:_ID_LETTERS]}"))), None)


def folder_name(about: Mapping[str, Any], cell_id: str) -> Path:
    """The folder of a new cell, below the folder of all results."""
    task = slug(f"{about['benchmark']}-{about['task']}")
    pipeline = f"{slug(str(about['pipeline']))}-{cell_id[:_ID_LETTERS]}"
    return Path(slug(str(about["model"]))) / task / pipeline


def configs(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the config of every cell below a folder of results."""
    for path in sorted(root.glob(f"*/*/*/{CONFIG}")):
        config = read_json(path)
        if config is not None:
            yield path.parent, config
