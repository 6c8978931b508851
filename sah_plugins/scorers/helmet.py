"""The metrics of HELMET that need no judge: exact match, F1, substring match and ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.rouge_score import rouge_score
from sah_plugins.scoring.text import normalize_answer, qa_f1

_WHOLE = ("yes", "no", "noanswer")
"""Answers that are right as a whole or not at all."""


def _exact_match(prediction: str, reference: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(reference))


def _substring(prediction: str, reference: str) -> float:
    return float(normalize_answer(reference) in normalize_answer(prediction))


def _f1(prediction: str, reference: str) -> float:
    both = normalize_answer(prediction), normalize_answer(reference)
    if both[0] != both[1] and any(text in _WHOLE for text in both):
        return 0.0
    return qa_f1(prediction, reference)


def _rouge(kind: str, part: str) -> Callable[[str, str], float]:
    def score(prediction: str, reference: str) -> float:
        found = rouge_score(prediction, reference, kind, stemmer=True)
        return found.f if part == "f1" else found.recall

    return score


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "f1": _f1,
    "substring_exact_match": _substring,
    **{
        f"{kind}_{part}": _rouge(kind, part)
        for kind in ("rougeL", "rougeLsum")
        for part in ("f1", "recall")
    },
}
"""By the key that ``calculate_metrics`` gives them."""


def _flat(references: Sequence[str | Sequence[str]]) -> list[str]:
    found: list[str] = []
    for reference in references:
        found += [reference] if isinstance(reference, str) else reference
    return found


def _score(prediction: str, references: Sequence[str | Sequence[str]], key: str) -> float:
    return max(METRICS[key](prediction, reference) for reference in _flat(references))


SCORERS: Mapping[str, Scorer] = {
    "helmet_metrics": Scorer(
        function=_score,
        description="the metric that ``key`` names, the best over the references",
        source="princeton-nlp/HELMET@4526dfb:utils.py:calculate_metrics",
    )
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of HELMET."""
    return SCORERS
