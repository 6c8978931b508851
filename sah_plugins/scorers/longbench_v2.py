"""The metrics of LongBench-v2: the letter that an answer names, and accuracies of many answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer

SOURCE = "THUDM/LongBench@2e00731"
COLUMNS = ("Overall", "Easy", "Hard", "Short", "Medium", "Long")
BLANK_CREDIT = 0.25
"""What an answer without a letter is worth in the compensated variant: a guess."""

_PATTERNS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


def extract_answer(prediction: str) -> str | None:
    """Return the letter that an answer names in the prescribed words; None if it names none."""
    plain = prediction.strip().replace("*", "")
    for pattern in _PATTERNS:
        found = re.search(pattern, plain)
        if found:
            return found[1]
    return None


def _is_right(prediction: str, references: Sequence[str]) -> float:
    return float(extract_answer(prediction) == references[0])


def in_column(column: str, difficulty: str, length: str) -> bool:
    """Return whether a question counts in a column: all but the named kinds are hard, and long."""
    kind = "Easy" if difficulty == "easy" else "Hard"
    span = {"short": "Short", "medium": "Medium"}.get(length, "Long")
    return column in ("Overall", kind, span)


def _accuracy(
    prediction: Sequence[str],
    references: Sequence[Sequence[str]],
    difficulty: Sequence[str],
    length: Sequence[str],
    column: str = "Overall",
    compensated: bool = False,
) -> float:
    points = []
    for answer, accepted, kind, span in zip(
        prediction, references, difficulty, length, strict=True
    ):
        if in_column(column, kind, span):
            blank = compensated and extract_answer(answer) is None
            points.append(BLANK_CREDIT if blank else _is_right(answer, accepted))
    return round(100 * sum(points) / len(points), 1)


SCORERS: Mapping[str, Scorer] = {
    "longbench_v2_extract": Scorer(
        function=_is_right,
        description="1 if the answer names the right letter in the prescribed words",
        source=f"{SOURCE}:pred.py:extract_answer",
    ),
    "longbench_v2_accuracy": Scorer(
        function=_accuracy,
        scale=1.0,
        corpus=True,
        description="accuracy over the questions of a column, in percent",
        source=f"{SOURCE}:result.py",
    ),
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of LongBench-v2."""
    return SCORERS
