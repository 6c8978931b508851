"""ROUGE as the package ``rouge`` 1.0.1 computes it, which LongBench and LooGLE score with.

Its numbers are not those of the paper: sentences end at "." only, case and other punctuation stay,
and all counts are of distinct tokens. Ours are the same numbers with one exception. That package
backtracks by recursion, so that where a pair of sentences needs about as many steps as Python's
recursion limit, 1,000, it raises, and LongBench takes 0.0 for the score: two equal Chinese texts
of 1,000 words score 0, since "。" ends no sentence. Here backtracking is a loop, and the argument
``longest_path`` brings the failure back for who wants it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

_SMALL = 1e-8


@attrs.frozen
class Rouge:
    """Recall, precision and their harmonic mean, 0 to 1."""

    recall: float
    precision: float

    @property
    def f(self) -> float:
        """The package's harmonic mean, slightly low: identical texts score 0.999999995."""
        total = self.precision + self.recall + _SMALL
        return 2.0 * (self.precision * self.recall / total)


class PathTooLongError(ValueError):
    """Backtracking takes more steps than are allowed."""


def rouge_l(prediction: str, reference: str, *, longest_path: int | None = None) -> Rouge:
    """Return summary-level ROUGE-L.

    Args:
        prediction: The text to be scored.
        reference: The text that was expected.
        longest_path: The most steps that backtracking through one pair of sentences may take.

    Raises:
        ValueError: One of the texts holds nothing but ".".
        PathTooLongError: ``longest_path`` is exceeded.
    """
    predicted, expected = _both_sentences(prediction, reference)
    union: set[str] = set()
    for reference_words in expected:
        for words in predicted:
            union.update(_common_subsequence(reference_words, words, longest_path))
    return _ratio(len(union), len(_distinct(expected)), len(_distinct(predicted)))


def rouge_n(prediction: str, reference: str, n: int) -> Rouge:
    """Return ROUGE-N over the distinct n-grams of the whole texts.

    Raises:
        ValueError: One of the texts holds nothing but ".".
    """
    predicted, expected = (_ngrams(s, n) for s in _both_sentences(prediction, reference))
    return _ratio(len(predicted & expected), len(expected), len(predicted))


def _both_sentences(prediction: str, reference: str) -> tuple[list[list[str]], list[list[str]]]:
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        raise ValueError("a text without a sentence has no ROUGE score")
    return predicted, expected


def _sentences(text: str) -> list[list[str]]:
    # Splitting on one space makes a token "" of a piece that is all white space.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _distinct(sentences: Sequence[Sequence[str]]) -> set[str]:
    return {word for words in sentences for word in words}


def _ngrams(sentences: Sequence[Sequence[str]], n: int) -> set[tuple[str, ...]]:
    words = [word for sentence in sentences for word in sentence]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _ratio(overlap: int, expected: int, predicted: int) -> Rouge:
    return Rouge(
        recall=overlap / expected if expected else 0.0,
        precision=overlap / predicted if predicted else 0.0,
    )


def _common_subsequence(
    first: Sequence[str], second: Sequence[str], longest_path: int | None
) -> list[str]:
    """One longest common subsequence, the one that the package finds, in reverse."""
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, found, steps = len(first), len(second), [], 0
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
        steps += 1
        if longest_path is not None and steps > longest_path:
            raise PathTooLongError(f"backtracking takes more than {longest_path} steps")
    return found
