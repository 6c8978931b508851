"""The metric of BABILong: the first sentence of an answer names the right label and no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer

_SHORTEST_LIST = 4
"""Letters of a target with a comma from which on it is a list of labels."""


def is_right(prediction: str, target: str, question: str, labels: Iterable[str]) -> bool:
    """Return whether an answer names exactly the target.

    Args:
        prediction: The answer, of which the first sentence counts.
        target: The right label, or several with commas.
        question: What was asked: labels that it names are no answers.
        labels: All labels of the task.
    """
    answer = prediction.lower()
    for end in (".", "<context>", "<example>"):
        answer = answer.partition(end)[0]
    target, asked = target.lower(), question.lower()
    known = {label.lower() for label in labels}
    named = {label for label in known if label in answer and label not in asked}
    is_list = "," in target and len(target) >= _SHORTEST_LIST
    targets = target.split(",") if is_list else [target]
    return len(named) == len(targets) and all(one in named for one in targets)


def _accuracy(
    prediction: str,
    references: Sequence[str],
    question: str,
    labels: Sequence[str],
    task: str | None = None,
) -> float:
    return float(is_right(prediction, references[0], question, labels))


SCORERS: Mapping[str, Scorer] = {
    "babilong_accuracy": Scorer(
        function=_accuracy,
        description="1 if the first sentence names the right label and no other",
        source="booydar/babilong@7a6efee:babilong/metrics.py:compare_answers",
    )
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metric of BABILong."""
    return SCORERS
