"""Buffers that grow in place, and what a layer tells a masker."""

import pytest
import torch

from sah_core import Allowed, Inputs
from sah_core.attention import layer_info
from sah_core.ops import Ops
from sah_core.randomness import Random
from sah_core.state import GrowingBuffer, TokenBuffer, reorder_first

pytestmark = pytest.mark.unit


def rows(count, value=0.0, dim=2):
    shape = [1, 2, 3]
    shape.insert(dim, count)
    return torch.full(shape, value) + torch.rand(shape)


@pytest.mark.parametrize("dim", [0, 2, 3])
@pytest.mark.parametrize("capacity", [0, 5, 100])
def test_what_was_appended_is_there_in_order(dim, capacity):
    torch.manual_seed(0)
    buffer = GrowingBuffer(dim=dim, capacity=capacity)
    parts = [rows(count, i, dim) for i, count in enumerate((1, 4, 1, 7, 1, 1))]
    for end in range(len(parts)):
        view = buffer.append(parts[end])
        assert torch.equal(view, torch.cat(parts[: end + 1], dim=dim))
        assert torch.equal(buffer.view, view)


def test_room_taken_ahead_is_written_in_place():
    buffer = GrowingBuffer(capacity=10)
    place = buffer.append(rows(1)).data_ptr()
    for _ in range(9):
        assert buffer.append(rows(1)).data_ptr() == place


def test_growing_copies_at_most_once_per_doubling():
    buffer = GrowingBuffer()
    places = {buffer.append(rows(1)).data_ptr(): None for _ in range(1024)}
    assert len(places) <= 11


def test_a_view_that_was_handed_out_does_not_change():
    buffer = GrowingBuffer()
    view = buffer.append(rows(3))
    before = view.clone()
    for _ in range(20):
        buffer.append(rows(2))
    assert torch.equal(view, before)


def test_a_snapshot_is_a_length_and_restoring_cuts_back_to_it():
    buffer = GrowingBuffer()
    first = buffer.append(rows(5)).clone()
    token = buffer.snapshot()
    assert token == 5
    for count in (1, 40):
        buffer.append(rows(count))
        buffer.restore(token)
        assert torch.equal(buffer.view, first)
        again = rows(2)
        assert torch.equal(buffer.append(again), torch.cat([first, again], dim=2))
        buffer.restore(token)


@pytest.mark.parametrize("places", [(2, 0, 1), (1, 1, 0, 2), (2,)])
def test_sequences_of_a_buffer_change_places_and_its_room_stays(places):
    rows, numbers = torch.tensor(places), torch.rand(3, 2, 9, 4)
    growing, tokens = GrowingBuffer(capacity=12), TokenBuffer((3, 2, 12, 4), torch.float32, "cpu")
    growing.reorder(rows)  # nothing is there yet
    growing.append(numbers[:, :, :7])
    tokens.write(numbers[:, :, :7], 0)
    view = growing.view
    for buffer in (growing, tokens):
        buffer.reorder(rows)
        assert buffer.data.shape == (len(places), 2, 12, 4)
    growing.append(numbers[rows, :, 7:])
    tokens.write(numbers[rows, :, 7:], 7)
    assert torch.equal(growing.view, numbers[rows])
    assert torch.equal(tokens.first(9), numbers[rows])
    assert torch.equal(view, numbers[:, :, :7])


def test_first_keys_change_places_unless_one_holds_for_all():
    rows, first = torch.tensor([2, 2, 0]), torch.tensor([4, 0, 7], dtype=torch.int32)
    assert reorder_first(first, rows).tolist() == [7, 7, 4]
    assert reorder_first(first[:1], rows).tolist() == [4]
    assert reorder_first(None, rows) is None


def test_an_empty_buffer_has_no_view():
    with pytest.raises(RuntimeError, match="empty"):
        _ = GrowingBuffer().view


def test_appending_does_not_keep_the_tensor_of_the_caller():
    buffer = GrowingBuffer()
    given = rows(2)
    view = buffer.append(given)
    before = view.clone()
    given.zero_()
    assert torch.equal(view, before)


@pytest.mark.parametrize("first", [None, (0, 0), (0, 3)])
def test_a_layer_tells_its_shapes_its_padding_and_its_ops(first):
    ops = Ops()
    padding = None if first is None else torch.tensor(first, dtype=torch.int32)
    inputs = Inputs(
        query=torch.zeros(2, 6, 1, 4),
        key=torch.zeros(2, 3, 9, 4, dtype=torch.bfloat16),
        value=torch.zeros(2, 3, 9, 5),
        allowed=Allowed.causal(1, 9, first=padding),
        scaling=1.0,
        key_len=9,
        layer=3,
        layer_count=8,
        ops=ops,
    )
    info = layer_info(inputs)
    assert (info.index, info.count, info.batch, info.heads, info.kv_heads) == (3, 8, 2, 6, 3)
    assert (info.head_dim, info.value_dim, info.capacity) == (4, 5, 9)
    assert info.dtype == torch.bfloat16
    assert info.device == torch.device("cpu")
    assert info.ops is ops
    assert (info.first is None) == (first != (0, 3))


@pytest.mark.parametrize(("shape", "dim"), [((), 2), ((3,), 2), ((3,), 3)])
def test_tokens_are_written_at_their_index_wherever_it_lives(shape, dim):
    numbers = torch.rand(2, 2, 11, *shape).movedim(2, dim)
    empty = torch.zeros(2, 2, 4, *shape).movedim(2, dim)
    buffer = TokenBuffer(tuple(empty.shape), torch.float32, "cpu", dim=dim)
    buffer.write(numbers.narrow(dim, 0, 3), 0)
    buffer.write(numbers.narrow(dim, 3, 6), 3)
    buffer.reserve(12)
    for index in (9, 10):
        buffer.write(numbers.narrow(dim, index, 1), torch.tensor([index], dtype=torch.int32))
    assert torch.equal(buffer.first(11), numbers)
    token = buffer.snapshot()
    buffer.write(empty.narrow(dim, 0, 1), 11)
    buffer.restore(token)
    assert torch.equal(buffer.first(11), numbers)


def test_a_token_buffer_makes_room_ahead_and_copies_at_most_once_per_doubling():
    buffer = TokenBuffer((1, 1, 0), torch.uint8, "cpu")
    places = set()
    for index in range(64):
        buffer.write(torch.full((1, 1, 1), index, dtype=torch.uint8), index)
        places.add(buffer.data.shape[2])
    assert len(places) <= 8
    assert buffer.first(64).flatten().tolist() == list(range(64))
    buffer.reserve(500)
    assert buffer.first(500).shape[2] == 500


def test_a_layer_tells_a_masker_the_random_numbers_of_its_step():
    key = torch.zeros(1, 1, 3, 4)
    inputs = Inputs(
        query=key, key=key, value=key, allowed=Allowed.causal(3, 3), scaling=1.0, key_len=3, layer=2
    )
    assert layer_info(inputs, 1, 7).random == Random(seed=7, step=1, layer=2)
