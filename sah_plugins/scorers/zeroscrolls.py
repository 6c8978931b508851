"""The metrics of ZeroSCROLLS, those of the evaluator beside its data set, in percent.

All but ROUGE score one answer, by the best of its references. ROUGE of a task is a geometric mean
of three means over the task, and so no mean of scores of examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.order import concordance
from sah_plugins.scoring.rouge_score import rouge_score
from sah_plugins.scoring.text import best, normalize_ascii_answer, token_f1, whole_number

SOURCE = "tau/zero_scrolls:metrics"
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")

_LETTER = re.compile(r"\b[A-D]\b")
# What the official ``\d+\.?\d*%`` finds, but in linear time: on long digits that takes minutes.
_PERCENTAGE = re.compile(r"(?<!\d)\d++(?:\.\d*+)?%")


def _best_percent(pair: Callable[[str, str], float]) -> Callable[..., float]:
    def score(prediction: str, references: Sequence[str]) -> float:
        return 100.0 * best(pair(prediction, reference) for reference in references)

    return score


def _f1(prediction: str, reference: str) -> float:
    answer, expected = (normalize_ascii_answer(text).split() for text in (prediction, reference))
    return token_f1(answer, expected)


def _exact_match(prediction: str, reference: str) -> float:
    return float(normalize_ascii_answer(prediction) == normalize_ascii_answer(reference))


def _accuracy(prediction: str, reference: str) -> float:
    answer, expected = (_LETTER.search(text) for text in (prediction, reference))
    return float(answer is not None and expected is not None and answer[0] == expected[0])


def _exp_similarity(prediction: str, reference: str) -> float:
    answer, expected = _percentage(prediction), _percentage(reference)
    if answer is None:
        return 0.0
    return float(0.5 ** (abs((expected or 0.0) - answer) / 10))


def _percentage(text: str) -> float | None:
    found = _PERCENTAGE.search(text)
    return float(found[0].removesuffix("%")) if found else None


def _concordance(prediction: str, reference: str) -> float:
    return concordance(_numbers(prediction), _numbers(reference))


def _numbers(text: str) -> list[int]:
    """The integers of a text; none if one of them is too long to be any id."""
    digits = re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()
    numbers = [number for number in map(whole_number, digits) if number is not None]
    return numbers if len(numbers) == len(digits) else []


def rouge_parts(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L, the best F over the references of each, in percent."""
    return {
        kind: 100.0 * best(rouge_score(prediction, reference, kind).f for reference in references)
        for kind in ROUGE_KINDS
    }


def geometric_mean(parts: Mapping[str, float]) -> float:
    """Return the cube root of the product of the three ROUGE scores."""
    product = 1.0
    for kind in ROUGE_KINDS:
        product *= parts[kind]
    return float(product ** (1.0 / 3.0))


def _rouge(
    prediction: Any, references: Sequence[Any], key: str = "geometric_mean", corpus: bool = False
) -> float:
    answers, accepted = (prediction, references) if corpus else ([prediction], [references])
    scores = [rouge_parts(*pair) for pair in zip(answers, accepted, strict=True)]
    means = {kind: sum(parts[kind] for parts in scores) / len(scores) for kind in ROUGE_KINDS}
    return round(geometric_mean(means) if key == "geometric_mean" else means[key], 4)


_make = partial(Scorer, scale=1.0)

SCORERS: Mapping[str, Scorer] = {
    "zeroscrolls_rouge": _make(
        function=_rouge,
        description="geometric mean of ROUGE-1, -2 and -L F (rouge-score), or ``key`` alone",
        source="tau/scrolls:metrics/scrolls.py",
    ),
    "zeroscrolls_f1": _make(
        function=_best_percent(_f1),
        description="token F1 of normalised text in ASCII",
        source=f"{SOURCE}/f1.py",
    ),
    "zeroscrolls_exact_match": _make(
        function=_best_percent(_exact_match),
        description="100 if the normalised text in ASCII is equal",
        source=f"{SOURCE}/exact_match.py",
    ),
    "zeroscrolls_accuracy": _make(
        function=_best_percent(_accuracy),
        description="100 if the first letter from A to D that stands alone is right",
        source=f"{SOURCE}/accuracy.py",
    ),
    "zeroscrolls_exp_similarity": _make(
        function=_best_percent(_exp_similarity),
        description="halved for every ten points between the first percentages",
        source=f"{SOURCE}/exp_similarity.py",
    ),
    "zeroscrolls_concordance_index": _make(
        function=_best_percent(_concordance),
        description="share of the pairs in the right order, 0 if numbers are missing",
        source=f"{SOURCE}/concordance_index.py",
    ),
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of ZeroSCROLLS."""
    return SCORERS
