"""The metric of the MATH data set: equality of two answers in their normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.math_answer import is_equiv


def _equal(prediction: str, references: Sequence[str]) -> float:
    return float(any(is_equiv(prediction, reference) for reference in references))


SCORERS: Mapping[str, Scorer] = {
    "math_is_equiv": Scorer(
        function=_equal,
        description="1 if the extracted answer equals a reference in its normal form",
        source="hendrycks/math@985bdc1:modeling/math_equivalence.py:is_equiv",
    )
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metric of MATH."""
    return SCORERS
