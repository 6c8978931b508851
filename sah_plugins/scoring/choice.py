"""Scores of short answers: class names, numbers, lines of code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher


def classification(prediction: str, reference: str, all_classes: Sequence[str]) -> float:
    """Return 1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's does not count. The official code takes such
    classes out of the list that it runs through, so that it overlooks the one after each; scores
    depend on it, so it is the same here.
    """
    named = [name for name in all_classes if name in prediction]
    index = 0
    while index < len(named):
        if named[index] in reference and named[index] != reference:
            named.remove(named[index])
        index += 1  # past the one that has moved into the place of the removed one, too
    return 1.0 / len(named) if reference in named else 0.0


def number_share(prediction: str, reference: str | int) -> float:
    """Return the share of the numbers in the answer that equal the reference, as texts."""
    numbers, right = re.findall(r"\d+", prediction), str(reference)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def paragraph_share(prediction: str, reference: str, pattern: str) -> float:
    """Return `number_share` for the number that ``pattern`` finds in the reference."""
    found = re.search(pattern, reference)
    return number_share(prediction, found[1]) if found else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Return the edit similarity of the first line of code in the answer, 0 to 1.

    A line with a backtick, "#" or "//" is no line of code. The similarity is fuzzywuzzy's, in
    hundredths, with difflib; where python-Levenshtein is installed, fuzzywuzzy takes another one.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(sign in line for sign in ("`", "#", "//")))
    return _ratio(next(code, ""), reference) / 100


def _ratio(first: str, second: str) -> int:
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * SequenceMatcher(None, first, second).ratio())
