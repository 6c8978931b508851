"""Rows in pieces, samples without replacement, and the count of rows that overflow."""

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, Mask, selection
from sah_core.randomness import Random
from sah_core.selection import (
    count_overflow,
    join_rows,
    overflow_rows,
    residual_count,
    row_pieces,
    sample,
)

pytestmark = pytest.mark.unit


def call(query_len=5, key_len=12):
    key = torch.zeros(2, 2, key_len, 4)
    return Inputs(
        query=torch.zeros(2, 4, query_len, 4),
        key=key,
        value=key,
        allowed=Allowed.causal(query_len, key_len),
        scaling=1.0,
        key_len=key_len,
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_pieces_are_the_rows_in_order_and_small_enough(rows, monkeypatch):
    inputs = call()
    monkeypatch.setattr(selection, "SCORE_BYTES", rows * 2 * 4 * 12 * 8)
    pieces = list(row_pieces(inputs, Mask.empty(inputs.shape), 8))
    assert all(part.query_len <= rows for part, _ in pieces)
    positions = torch.cat([part.query_position for part, _ in pieces], 1)
    assert torch.equal(positions, inputs.query_position)
    assert [mask.shape for _, mask in pieces] == [part.shape for part, _ in pieces]


def test_a_row_that_does_not_fit_is_a_piece_all_the_same(monkeypatch):
    inputs = call()
    monkeypatch.setattr(selection, "SCORE_BYTES", 1)
    assert len(list(row_pieces(inputs, Mask.empty(inputs.shape)))) == 5


def test_pieces_of_different_width_are_padded():
    joined = join_rows([torch.zeros(1, 1, 1, 2).int(), torch.ones(1, 1, 2, 3).int()])
    assert joined.flatten().tolist() == [0, 0, -1, 1, 1, 1, 1, 1, 1]


def test_a_sample_takes_its_count_from_what_is_left_and_nothing_else():
    inputs = attrs.evolve(call(), random=Random(seed=1))
    taken = Mask.from_indices(inputs.shape, torch.tensor([[[[0, 3]]]]))
    left = residual_count(taken, inputs.allowed).expand(inputs.shape[:3])
    assert left[0, 0].tolist() == [6, 7, 8, 9, 10]
    indices = sample(inputs, taken, torch.full((1, 1, 1), 4), 6)
    assert ((indices >= 0).sum(-1) == 4).all()
    drawn = Mask.from_indices(inputs.shape, indices).to_dense() > 0
    assert not drawn[..., [0, 3]].any()
    assert not (drawn & ~inputs.allowed.to_dense(12)).any()
    other = sample(inputs, taken, torch.full((1, 1, 1), 4), 6, draw=1)
    assert not torch.equal(indices, other)


def test_overflow_is_counted_per_step_and_layer_over_calls():
    inputs = call()
    assert overflow_rows(inputs.request_state) == 0
    for layer in (0, 1, 0):
        here = attrs.evolve(inputs, layer=layer, random=Random(step=2, layer=layer))
        count_overflow(here, torch.tensor([True, False, True]))
    assert overflow_rows(inputs.request_state) == 6
    counts = inputs.request_state[selection.OVERFLOW]
    assert {place: int(count) for place, count in counts.items()} == {(2, 0): 4, (2, 1): 2}
