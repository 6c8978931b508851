"""The attention call as maskers and backends see it."""

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, Size

pytestmark = pytest.mark.unit


def inputs_of(query_len=3, key_len=10, *, first=None, batch=2, captured=False, **more):
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    length = torch.tensor([key_len], dtype=torch.int32)
    buffer = key_len + 6 if captured else key_len
    return Inputs(
        query=torch.arange(batch * 4 * query_len * 2.0).view(batch, 4, query_len, 2),
        key=torch.zeros(batch, 2, buffer, 2),
        value=torch.zeros(batch, 2, buffer, 3),
        allowed=Allowed.causal(query_len, key_len, first=first),
        scaling=1.0,
        key_len=None if captured else key_len,
        length=length if captured else None,
        **more,
    )


def test_facts_of_the_shapes():
    inputs = inputs_of()
    assert inputs.shape == (2, 4, 3, 10)
    assert (inputs.batch, inputs.heads, inputs.kv_heads, inputs.group) == (2, 4, 2, 2)
    assert (inputs.query_len, inputs.capacity) == (3, 10)
    assert inputs.length.tolist() == [10]
    assert inputs.length.dtype == torch.int32


def test_inputs_are_frozen():
    with pytest.raises(AttributeError):
        inputs_of().scaling = 2.0


def test_inputs_without_any_length_are_refused():
    inputs = attrs.evolve(inputs_of(), key_len=None)
    with pytest.raises(ValueError, match="key_len or length"):
        _ = inputs.length


@pytest.mark.parametrize("captured", [False, True])
def test_the_queries_are_the_last_keys(captured):
    inputs = inputs_of(captured=captured)
    assert inputs.query_position.tolist() == [[7, 8, 9]]
    assert inputs.query_position.dtype == torch.int32


@pytest.mark.parametrize("captured", [False, True])
def test_rows_keep_the_keys_and_their_positions(captured):
    inputs = inputs_of(query_len=5, captured=captured)
    rows = inputs.rows(1, 4)
    assert torch.equal(rows.query, inputs.query[:, :, 1:4])
    assert rows.key is inputs.key
    assert rows.query_position.tolist() == [[6, 7, 8]]
    assert rows.rows(1, 2).query_position.tolist() == [[7]]
    assert torch.equal(rows.allowed.stop, inputs.allowed.stop[:, :, 1:4])
    every_other = inputs.rows(0, 5, 2)
    assert torch.equal(every_other.query, inputs.query[:, :, ::2])
    assert every_other.query_position.tolist() == [[5, 7, 9]]
    assert torch.equal(every_other.allowed.stop, inputs.allowed.stop[:, :, ::2])


def test_rows_keep_their_positions_when_something_else_is_replaced():
    rows = attrs.evolve(inputs_of(query_len=5).rows(1, 4), state="something")
    assert rows.query_position.tolist() == [[6, 7, 8]]


def test_no_rows_are_a_call_over_the_context():
    inputs = inputs_of()
    nothing = inputs.rows(0, 0)
    assert nothing.query_len == 0
    assert nothing.query_position.shape == (1, 0)
    assert nothing.shape == (2, 4, 0, 10)


@pytest.mark.parametrize("captured", [False, True])
def test_tokens_mean_tokens_up_to_the_keys_there_are(captured):
    inputs = inputs_of(captured=captured, first=(0, 4))
    budget = inputs.budget(Size(tokens=3))
    assert (budget.capacity, budget.count) == (3, None)
    assert inputs.budget(Size(tokens=0)).capacity == 0
    assert inputs.budget(Size(tokens=500)).capacity == inputs.capacity


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.29, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("first", [None, (0, 0), (3, 3), (0, 4), (9, 1)])
@pytest.mark.parametrize("captured", [False, True])
def test_fractions_are_of_the_real_keys_rounded_down(fraction, first, captured):
    inputs = inputs_of(first=first, captured=captured)
    budget = inputs.budget(Size(fraction=fraction))
    expected = [int(fraction * (10 - padding)) for padding in first or (0, 0)]
    count = budget.count
    count = torch.tensor(budget.capacity) if count is None else count
    assert count.expand(2, 1, 1).flatten().tolist() == expected
    assert budget.capacity >= max(expected)
    if not captured:
        assert budget.capacity == max(expected)
        assert (budget.count is None) == (len(set(expected)) == 1)


def test_a_fraction_of_100_keys_does_not_lose_one_to_rounding():
    inputs = inputs_of(key_len=100, batch=1)
    captured = inputs_of(key_len=100, batch=1, captured=True)
    for percent in range(1, 101):
        size = Size(fraction=percent / 100)
        expected = size.resolve(100)
        assert inputs.budget(size).capacity == expected
        assert captured.budget(size).count.flatten().tolist() == [expected]
