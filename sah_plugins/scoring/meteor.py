"""METEOR as NLTK 3.8 computes it: unigrams aligned by form, stem and synonym, and their order.

Lavie and Agarwal, "METEOR: An Automatic Metric for MT Evaluation with High Levels of Correlation
with Human Judgments" (2007). Words are matched from the last to the first, each with the last word
of the reference that is still free; stems are Porter's, synonyms WordNet's. NLTK itself would look
for WordNet among its own data and offer a download; here the database files are read directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from sah_core.scorer import needed_library

from .wordnet import synonyms

_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5

_Words = dict[int, str]
"""Words that are not matched yet, by their position."""


def meteor(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Return METEOR of two lists of words, 0 to 1; identical ones score a little below 1.

    Raises:
        MissingLibraryError: NLTK, for its stemmer, or WordNet is not there.
    """
    predicted = dict(enumerate(word.lower() for word in prediction))
    expected = dict(enumerate(word.lower() for word in reference))
    pairs: list[tuple[int, int]] = []
    for form, alternatives in ((str, _alone), (_stem, _alone), (str, synonyms)):
        # NLTK looks for the synonyms of what the step before left over, and these are stems.
        predicted, expected = _formed(predicted, form), _formed(expected, form)
        pairs += _match(predicted, expected, alternatives)
        for i, j in pairs:
            predicted.pop(i, None)
            expected.pop(j, None)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(prediction), len(pairs) / len(reference)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    penalty = _GAMMA * (_chunks(sorted(pairs)) / len(pairs)) ** _BETA
    return float((1 - penalty) * mean)


def _alone(word: str) -> Iterable[str]:
    return (word,)


def _formed(words: _Words, form: Callable[[str], str]) -> _Words:
    return {place: form(word) for place, word in words.items()}


def _match(
    predicted: _Words, expected: _Words, alternatives: Callable[[str], Iterable[str]]
) -> list[tuple[int, int]]:
    free: dict[str, list[int]] = {}
    for j in sorted(expected):
        free.setdefault(expected[j], []).append(j)
    pairs = []
    for i in sorted(predicted, reverse=True):
        places = [free[form][-1] for form in alternatives(predicted[i]) if free.get(form)]
        if places:
            j = max(places)
            free[expected[j]].pop()
            pairs.append((i, j))
    return pairs


def _chunks(pairs: Sequence[tuple[int, int]]) -> int:
    """Into how many runs of neighbours the pairs fall."""
    follows = ((i + 1, j + 1) == after for (i, j), after in zip(pairs, pairs[1:], strict=False))
    return len(pairs) - sum(follows)


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    return needed_library("nltk.stem.porter", "nltk", "METEOR").PorterStemmer()
