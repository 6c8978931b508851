"""How far an order of things is from the right one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations


def concordance(answer: Sequence[int], right: Sequence[int]) -> float:
    """Return the share of pairs that stand in the right order, as lifelines computes it.

    Args:
        answer: Ids in the order that was answered.
        right: The same ids in the right order, at least two.

    Returns:
        0 to 1; 0 if the ids are not the same, each once.
    """
    if sorted(answer) != sorted(right) or len(set(right)) < max(len(right), 2):
        return 0.0
    place = {name: index for index, name in enumerate(answer)}
    pairs = list(combinations(right, 2))
    return sum(place[first] < place[then] for first, then in pairs) / len(pairs)


class NotAnOrderError(ValueError):
    """An answer does not name every thing once."""


def displacement(answer: Sequence[Hashable], right: Sequence[Hashable]) -> list[int]:
    """Return, for each place of the right order, the place at which the answer has its thing.

    Raises:
        NotAnOrderError: The answer is no order of the same things.
    """
    if not right or len(answer) != len(right) or set(answer) != set(right):
        raise NotAnOrderError
    if len(set(right)) < len(right):
        raise NotAnOrderError
    places = {name: place for place, name in enumerate(answer)}
    return [places[name] for name in right]


def square_deviation(places: Sequence[int]) -> float:
    """Return the mean square of the distances to the right places."""
    return sum((place - i) ** 2 for i, place in enumerate(places)) / len(places)


def mean_deviation(places: Sequence[int]) -> float:
    """Return the mean distance to the right places."""
    return sum(abs(place - i) for i, place in enumerate(places)) / len(places)


def swap_deviation(places: Sequence[int]) -> float:
    """Return the least number of swaps of any two that bring all to their places."""
    seen: set[int] = set()
    cycles = 0
    for start in range(len(places)):
        if start in seen:
            continue
        cycles += 1
        at = start
        while at not in seen:
            seen.add(at)
            at = places[at]
    return float(len(places) - cycles)


def swap_distance_deviation(places: Sequence[int]) -> float:
    """Return the summed distance of swaps, each the one that gains the most per distance."""
    now, weight = list(places), 0
    while any(place != i for i, place in enumerate(now)):
        gain, i, j = max((_gain(now, i, j), -i, -j) for i, j in combinations(range(len(now)), 2))
        if gain <= 0:  # never so for a permutation
            raise NotAnOrderError
        i, j = -i, -j
        now[i], now[j] = now[j], now[i]
        weight += j - i
    return float(weight)


def _gain(places: Sequence[int], i: int, j: int) -> float:
    now = abs(places[i] - i) + abs(places[j] - j)
    swapped = abs(places[j] - i) + abs(places[i] - j)
    return (now - swapped) / (j - i)


def greatest_deviation(name: str, size: int) -> float:
    """Return the greatest deviation that an order of ``size`` things can have, that of ``name``.

    Args:
        name: ``square``, ``mean``, ``swap`` or ``swap_distance``.
        size: The number of things, at least 1.
    """
    return {
        "square": (size * size - 1) / 3,
        "mean": (size * size // 2) / size,
        "swap": size - 1.0,
        "swap_distance": float(size * size // 4),
    }[name]
