"""BLEU of one order of n-grams, as NLTK's ``sentence_bleu`` gives it when it weighs that alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def bleu_n(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Return the clipped precision of n-grams times the brevity penalty, 0 to 1.

    Papineni et al., "Bleu: a Method for Automatic Evaluation of Machine Translation" (2002), but
    for one order alone. Where no n-gram is common, NLTK gives the least positive number, here it
    is 0.
    """
    common = _ngrams(prediction, n) & _ngrams(reference, n)
    if not common:
        return 0.0
    precision = sum(common.values()) / (len(prediction) - n + 1)
    short = len(prediction) <= len(reference)
    return precision * (math.exp(1 - len(reference) / len(prediction)) if short else 1.0)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
