"""RULER's metrics: which of the answers occur in a prediction."""

import re
from collections.abc import Iterable, Sequence


def clean_prediction(prediction: str) -> str:
    r"""Return a prediction as RULER scores it: each of ``\x00``–``\x1f`` is a line break.

    Taking control characters out instead, as some copies of the scorer do, would glue the numbers
    of two lines together.
    """
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of the references that occur in the prediction, in any case; 0 to 1."""
    return sum(_occurring(prediction, references)) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if any of the references occurs in the prediction, in any case, else 0."""
    return float(any(_occurring(prediction, references)))


def _occurring(prediction: str, references: Sequence[str]) -> Iterable[bool]:
    text = clean_prediction(prediction).lower()
    return [reference.lower() in text for reference in references]
