"""Golden cases of metrics: predictions with the scores that official code gives them.

A file is JSON with ``metric``, ``source``, ``tolerance`` and lists of cases (``public``, and any
other list of mappings with an ``expected``). A case has an ``id``, a ``prediction`` (a text, or a
list of them for a corpus metric), ``references``, ``kwargs`` and what is ``expected``.

A file that names no metric, such as samples of a generator, is for the benchmark whose
``check_golden`` knows it; in a folder, a file that nobody knows is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from sah_core import registry
from sah_core.errors import (
    BrokenPluginError,
    MissingLibraryError,
    RequestError,
    SahError,
    UnknownPluginError,
    one_line,
)
from sah_core.scorer import Scorer, find_scorer

Status = Literal["passed", "failed", "skipped"]

_SHOWN = 80


@attrs.frozen(kw_only=True)
class FileResult:
    """How the cases of one file came out.

    Attributes:
        path: The file.
        metric: The metric, or what else the file is about.
        status: ``failed`` if any case did; ``skipped`` if none could be run.
        passed: How many cases agree.
        failed: How many do not.
        accepted: How many do not agree for a listed reason, the official code being wrong.
        skipped: How many could not be run.
        reasons: Why cases were skipped or accepted, each reason once.
        differences: A line for every case that failed.
    """

    path: Path
    metric: str
    status: Status
    passed: int = 0
    failed: int = 0
    accepted: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def run_metrics(paths: Iterable[str | Path]) -> Iterator[FileResult]:
    """Check metrics on golden files.

    Args:
        paths: JSON files, or folders that hold some; in a folder, files that are no golden cases
            of metrics are passed over.

    Yields:
        A result per file, in order.

    Raises:
        RequestError: A path leads to no golden case.
        BrokenPluginError: Nobody knows a file, and a benchmark that might cannot be imported; in a
            folder such a file is skipped for that reason.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield _run_file(path)
            continue
        results = 0
        for file in sorted(path.rglob("*.json")):
            try:
                result = _run_file(file)
            except RequestError:
                continue
            except BrokenPluginError as error:
                result = FileResult(path=file, metric="", status="skipped", reasons=(str(error),))
            results += 1
            yield result
        if not results:
            raise RequestError(f"{str(path)!r} holds no golden metric file (*.json)")


def _run_file(path: Path) -> FileResult:
    content = _content(path)
    if isinstance(content.get("metric"), str) and _cases(content):
        return _run_cases(path, content)
    result = _run_benchmark(path, content)
    if result is None:
        raise RequestError(f"{str(path)!r} is no golden metric file: it names no metric with cases")
    return result


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise RequestError(f"{str(path)!r} is no golden metric file: {reason}") from error
    except ValueError as error:
        raise RequestError(f"{str(path)!r} is no golden metric file: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{str(path)!r} is no golden metric file: it is no mapping")
    return content


def _run_benchmark(path: Path, content: Mapping[str, Any]) -> FileResult | None:
    """The result of the benchmark that knows the file; None if none does."""
    broken: list[BrokenPluginError] = []
    for name in registry.benchmarks:
        try:
            cases = registry.benchmarks[name].check_golden(content, path.parent)
        except BrokenPluginError as error:
            broken.append(error)
            continue
        if cases is None:
            continue
        try:
            found = list(cases)
        except MissingLibraryError as error:
            return FileResult(path=path, metric=name, status="skipped", reasons=(str(error),))
        except SahError as error:  # such as an input that does not lie beside the file
            return FileResult(path=path, metric=name, status="failed", differences=(str(error),))
        wrong = [f"{case}: {difference}" for case, difference in found if difference]
        return FileResult(
            path=path,
            metric=name,
            status="failed" if wrong else "passed",
            passed=len(found) - len(wrong),
            failed=len(wrong),
            differences=tuple(wrong),
        )
    if broken:  # one of them may be the benchmark that knows the file
        raise broken[0]
    return None


def _cases(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = (value for value in content.values() if isinstance(value, list))
    return [
        case
        for cases in lists
        for case in cases
        if isinstance(case, dict) and {"prediction", "references", "expected"} <= case.keys()
    ]


def _run_cases(path: Path, content: Mapping[str, Any]) -> FileResult:
    metric, cases = content["metric"], _cases(content)
    try:
        scorer = find_scorer(metric)
    except UnknownPluginError:
        reason = f"metric {metric} is not installed"
        return FileResult(
            path=path, metric=metric, status="skipped", skipped=len(cases), reasons=(reason,)
        )
    except SahError as error:
        return FileResult(
            path=path, metric=metric, status="failed", failed=len(cases), differences=(str(error),)
        )
    counts = dict.fromkeys(("passed", "failed", "accepted", "skipped"), 0)
    reasons, differences = dict[str, None](), []
    for number, case in enumerate(cases):
        outcome, text = _run_case(scorer, case, float(content.get("tolerance", 1e-6)))
        counts[outcome] += 1
        if outcome == "failed":
            differences.append(f"{case.get('id', number)}: {text}")
        elif text:
            reasons[text] = None
    ran = counts["passed"] + counts["accepted"]
    status: Status = "failed" if counts["failed"] else "passed" if ran else "skipped"
    return FileResult(
        path=path,
        metric=metric,
        status=status,
        reasons=tuple(reasons),
        differences=tuple(differences),
        **counts,
    )


def _run_case(scorer: Scorer, case: Mapping[str, Any], tolerance: float) -> tuple[str, str]:
    """The outcome of a case, and why."""
    expected = case["expected"]
    try:
        score = scorer(case["prediction"], case["references"], **(case.get("kwargs") or {}))
    except MissingLibraryError as error:
        return "skipped", str(error)
    except Exception as error:  # foreign code: one case must not end the run
        return "failed", f"raised {type(error).__name__}: {one_line(str(error))}"
    if not isinstance(expected, int | float):
        return "skipped", f"{expected!r} is expected, which is no score"
    if math.isclose(score, expected, rel_tol=0.0, abs_tol=tolerance):
        return "passed", ""
    reason = scorer.accepts(case, score) if scorer.accepts else None
    if reason:
        return "accepted", reason
    shown = one_line(repr(case["prediction"]))
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return "failed", f"expected {expected!r}, got {score!r} for {shown}"
