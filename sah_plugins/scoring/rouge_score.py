"""ROUGE as the package ``rouge-score`` computes it: Google's, the scores of most papers."""

from __future__ import annotations

from functools import cache
from typing import Any

from sah_core.scorer import needed_library

from .rouge import Rouge


def rouge_score(prediction: str, reference: str, kind: str, *, stemmer: bool = False) -> Rouge:
    r"""Return ROUGE over lower-case tokens of ASCII letters and digits.

    Args:
        prediction: The text to be scored.
        reference: The text that was expected.
        kind: ``rouge1``, ``rouge2``, ``rougeL``, or ``rougeLsum``, whose sentences end at ``\n``.
        stemmer: Compare stems (Porter's), not words.

    Raises:
        MissingLibraryError: The package is not installed.
    """
    score = _scorer(kind, stemmer).score(target=reference, prediction=prediction)[kind]
    return _PackageRouge(recall=float(score.recall), precision=float(score.precision))


class _PackageRouge(Rouge):
    """The harmonic mean as it is."""

    @property
    def f(self) -> float:
        """The harmonic mean of recall and precision, 0 if both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@cache
def _scorer(kind: str, stemmer: bool) -> Any:
    module = needed_library("rouge_score.rouge_scorer", "rouge-score", f"ROUGE ({kind})")
    return module.RougeScorer([kind], use_stemmer=stemmer)
