"""Scores of finished results, computed again from what was kept of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from sah_core import registry
from sah_core.benchmark import Benchmark, Example, ScoredExample, mean
from sah_core.errors import RequestError, SahError, one_line
from sah_core.parameters import from_plain
from sah_core.scorer import Scorer, find_scorer

from .json_files import read_json, read_rows, replace_rows, write_json
from .store import CONFIG, METRICS, SAMPLES

NOTE = "rescored"
OTHER = "other_metrics"


@attrs.frozen(kw_only=True)
class Rescored:
    """The scores of a cell, old and new.

    Attributes:
        folder: Where the cell lies.
        label: Model, benchmark, task and pipeline in words.
        score: The name of the score that is compared.
        old: The mean of the scores that are kept; None if there are none.
        new: The mean of those computed now.
        changed: How many samples score otherwise.
        samples: How many there are.
        problem: Why it could not be scored again; empty if it was.
        rows: The samples with their new scores.
        metrics: The new content of metrics.json; None if the cell has no such file.
    """

    folder: Path
    label: str
    score: str
    old: float | None = None
    new: float | None = None
    changed: int = 0
    samples: int = 0
    problem: str = ""
    rows: tuple[dict[str, Any], ...] = attrs.field(default=(), repr=False)
    metrics: dict[str, Any] | None = attrs.field(default=None, repr=False)

    def write(self) -> None:
        """Put the new scores in the place of the old ones, each file in one step."""
        if self.metrics is None:
            return
        if self.score not in self.metrics.get(OTHER, {}):
            replace_rows(self.folder / SAMPLES, self.rows)
        write_json(self.folder / METRICS, self.metrics)


def cell_folders(paths: Sequence[str | Path]) -> list[Path]:
    """Return the folders of cells at or below the paths.

    Raises:
        RequestError: A path leads to none.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        cells = sorted({file.parent for file in path.rglob(CONFIG)}) if path.is_dir() else []
        if not cells:
            raise RequestError(f"{str(path)!r} holds no results: expected folders with {CONFIG}")
        found += [cell for cell in cells if cell not in found]
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return what config.json says a cell is.

    Raises:
        RequestError: It does not say it.
    """
    config = read_json(folder / CONFIG) or {}
    identity = config.get("identity")
    benchmark = identity.get("benchmark") if isinstance(identity, dict) else None
    if not (isinstance(benchmark, dict) and {"name", "parameters"} <= benchmark.keys()) or not (
        {"benchmark", "task"} <= config.keys()
    ):
        raise RequestError(
            f"{str(folder / CONFIG)!r} does not say what was run: restore it, or delete the folder "
            "and run it again"
        )
    return config


def rescore(folders: Sequence[Path], metric: str | None = None) -> Iterator[Rescored]:
    """Score cells again.

    Args:
        folders: Of the cells.
        metric: Another metric than the benchmark's own, from ``registry.scorers``.

    Raises:
        UnknownPluginError: There is no such metric.
    """
    scorer = None if metric is None else find_scorer(metric)
    for folder in folders:
        label = str(folder)
        try:
            config = config_of(folder)
            label = ", ".join(
                str(part)
                for part in (
                    config.get("model"),
                    f"{config['benchmark']} {config['task']}",
                    config.get("label", config.get("pipeline")),
                )
            )
            if scorer is None or metric is None:
                yield _by_benchmark(folder, label, config)
            else:
                yield _by_metric(folder, label, scorer, metric)
        except NotImplementedError as error:
            yield Rescored(folder=folder, label=label, score="", problem=one_line(str(error)))
        except (SahError, KeyError, TypeError, ValueError, IndexError) as error:
            problem = (
                str(error) if isinstance(error, SahError) else f"{type(error).__name__}: {error}"
            )
            yield Rescored(folder=folder, label=label, score="", problem=one_line(problem))


def _by_benchmark(folder: Path, label: str, config: Mapping[str, Any]) -> Rescored:
    identity = config["identity"]["benchmark"]
    task = str(config["task"])
    benchmark = from_plain(registry.benchmarks[identity["name"]], identity["parameters"])
    rows = read_rows(folder / SAMPLES)
    new = [benchmark.score(_example(row, task), str(row["prediction"])) for row in rows]
    main = benchmark.main_score
    known, after = read_json(folder / METRICS), _aggregate(benchmark, task, rows, new)
    return Rescored(
        folder=folder,
        label=label,
        score=main,
        old=mean(row["scores"][main] for row in rows if main in row["scores"])
        if known is None
        else known.get("scores", {}).get(main),
        new=after["scores"].get(main),
        changed=sum(row["scores"] != scores for row, scores in zip(rows, new, strict=True)),
        samples=len(rows),
        rows=tuple({**row, "scores": scores} for row, scores in zip(rows, new, strict=True)),
        metrics=None if known is None else _new_metrics(known, benchmark, task, after),
    )


def _new_metrics(
    known: Mapping[str, Any], benchmark: Benchmark, task: str, scored: Mapping[str, Any]
) -> dict[str, Any]:
    note = {
        "protocol_version": benchmark.protocol_for(task).version,
        "scores_before": known.get(NOTE, {}).get("scores_before", known.get("scores")),
    }
    return {**known, **scored, NOTE: note}


def _aggregate(
    benchmark: Benchmark,
    task: str,
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """The metrics of a task, whose score need not be the mean of those of its samples."""
    return benchmark.aggregate(
        [
            ScoredExample(id=row["id"], task=task, scores=score, facts=row["facts"])
            for row, score in zip(rows, scores, strict=True)
        ]
    )


def _by_metric(folder: Path, label: str, scorer: Scorer, metric: str) -> Rescored:
    rows = read_rows(folder / SAMPLES)
    scores = [_percent(scorer, row) for row in rows]
    known = read_json(folder / METRICS)
    new = mean(scores)
    metrics = None
    if known is not None:
        entry = {"n": len(scores), "score": new, "source": scorer.source}
        metrics = {**known, OTHER: {**known.get(OTHER, {}), metric: entry}}
    return Rescored(
        folder=folder,
        label=label,
        score=metric,
        old=None if known is None else known.get(OTHER, {}).get(metric, {}).get("score"),
        new=new,
        samples=len(rows),
        metrics=metrics,
    )


def _percent(scorer: Scorer, row: Mapping[str, Any]) -> float:
    """The score of a sample; keywords of the metric come from its facts and its question."""
    known = {"question": row["question"], **row["facts"]}
    given = {name: known[name] for name in scorer.keywords if name in known}
    if scorer.corpus:
        lists = {name: [value] for name, value in given.items()}
        return scorer.percent([row["prediction"]], [row["references"]], **lists)
    return scorer.percent(row["prediction"], row["references"], **given)


def _example(row: Mapping[str, Any], task: str) -> Example:
    return Example(
        id=row["id"],
        context_id=row["context_id"],
        context="",
        question=row["question"],
        references=row["references"],
        max_new_tokens=1,
        task=task,
        facts=row["facts"],
    )
