"""Distances between orders, against brute force over all of them."""

from itertools import permutations

import pytest

from sah_plugins.scoring.order import (
    NotAnOrderError,
    concordance,
    displacement,
    greatest_deviation,
    mean_deviation,
    square_deviation,
    swap_deviation,
    swap_distance_deviation,
)

pytestmark = pytest.mark.unit
DEVIATIONS = {
    "square": square_deviation,
    "mean": mean_deviation,
    "swap": swap_deviation,
    "swap_distance": swap_distance_deviation,
}


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_the_greatest_deviation_is_that_of_the_worst_order(name, size):
    worst = max(DEVIATIONS[name](order) for order in permutations(range(size)))
    assert greatest_deviation(name, size) == pytest.approx(worst)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_only_the_right_order_deviates_by_nothing(name):
    for order in permutations(range(4)):
        assert (DEVIATIONS[name](order) == 0) == (order == (0, 1, 2, 3))


def test_a_displacement_says_where_each_thing_went():
    assert displacement(["c", "a", "b"], ["a", "b", "c"]) == [1, 2, 0]


@pytest.mark.parametrize("answer", [[], ["a"], ["a", "a"], ["a", "c"], ["a", "b", "c"]])
def test_what_does_not_name_every_thing_once_is_no_order(answer):
    with pytest.raises(NotAnOrderError):
        displacement(answer, ["a", "b"])


def test_concordance_is_the_share_of_pairs_in_the_right_order():
    right = [3, 1, 4, 2]
    for answer in permutations(right):
        pairs = [(a, b) for i, a in enumerate(right) for b in right[i + 1 :]]
        agree = sum(answer.index(a) < answer.index(b) for a, b in pairs)
        assert concordance(answer, right) == pytest.approx(agree / 6)


@pytest.mark.parametrize("answer", [[], [1, 2], [1, 2, 2], [1, 2, 4]])
def test_concordance_of_other_ids_is_0(answer):
    assert concordance(answer, [1, 2, 3]) == 0.0


def test_concordance_of_one_thing_says_nothing():
    assert concordance([1], [1]) == 0.0
