"""Rows in pieces, choices that head groups share, samples, and the count of rows that overflow."""

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask, Size, selection
from sah_core.randomness import Random
from sah_core.selection import (
    add_best,
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
    left = residual_count(inputs, taken).expand(inputs.shape[:3])
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
    counts = {place: int(count) for place, count in inputs.request_state.items()}
    assert counts == {(selection.OVERFLOW, 2, 0): 4, (selection.OVERFLOW, 2, 1): 2}


def random_call(query_len=3, keep=None):
    generator = torch.Generator().manual_seed(0)
    allowed = Allowed.causal(query_len, 20) if keep is None else Allowed.from_dense(keep)
    return Inputs(
        query=torch.randn(2, 4, query_len, 8, generator=generator),
        key=torch.randn(2, 2, 20, 8, generator=generator),
        value=torch.randn(2, 2, 20, 8, generator=generator),
        allowed=allowed,
        scaling=1.0,
        key_len=20,
    )


def shared(inputs):
    """One score per KV head, with ties."""
    grouped = inputs.ops.logits(inputs.query, inputs.key, 1.0).unflatten(1, (2, 2)).sum(2)
    return grouped.round()


def expected(inputs, previous, size):
    scores, taken = shared(inputs), previous.to_dense() > 0
    open_keys = inputs.allowed.to_dense(20).expand(inputs.shape)
    result = taken.clone()
    for b, kv, row in torch.cartesian_prod(*map(torch.arange, (2, 2, inputs.query_len))).tolist():
        pair = slice(2 * kv, 2 * kv + 2)
        left = [
            k
            for k in range(20)
            if open_keys[b, pair, row, k].any() and not taken[b, pair, row, k].all()
        ]
        best = sorted(left, key=lambda k: (-float(scores[b, kv, row, k]), k))[:size]
        result[b, pair, row, best] = True
    return result & open_keys


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_shared_choice_takes_the_best_keys_that_some_head_of_the_group_lacks(
    monkeypatch, size, pieces
):
    if pieces:
        monkeypatch.setattr(selection, "SCORE_BYTES", 2 * 4 * 2 * 4 * 20)
    inputs = random_call()
    indices = torch.tensor([[0, 3], [0, 4], [1, 5], [1, 5]], dtype=torch.int32)
    previous = Mask.from_indices(inputs.shape, indices[None, :, None].expand(2, -1, 3, -1))
    mask = add_best(inputs, previous, Size(tokens=size), shared)
    got = (mask & inputs.allowed).to_dense()
    wanted = expected(inputs, previous, size)
    assert torch.equal(got, wanted.float())
    # a key that some heads had selected before counts once
    assert torch.equal(mask.counts(inputs.allowed)[0], wanted.sum(-1))


def test_limits_that_differ_by_head_admit_what_any_head_of_a_group_may_attend():
    keep = torch.ones(2, 4, 3, 20, dtype=torch.bool)
    keep[:, 0, :, :10] = keep[:, 2:, :, 5:15] = False
    inputs = random_call(keep=keep)
    nothing = Mask.empty(inputs.shape)
    mask = add_best(inputs, nothing, Size(tokens=6), shared)
    got = (mask & inputs.allowed).to_dense()
    assert torch.equal(got, expected(inputs, nothing, 6).float())


def test_nothing_is_scored_where_nothing_can_be_added():
    inputs = random_call()
    full = Mask.full(inputs.shape)
    assert add_best(inputs, full, Size(tokens=3), pytest.fail) is full
    nothing = Mask.empty(inputs.shape)
    assert add_best(inputs, nothing, Size(tokens=0), pytest.fail) is nothing


@pytest.mark.parametrize("keep", [False, True])
def test_what_heads_share_is_made_from_the_scores_of_candidates_alone(keep):
    limits = Allowed.causal(3, 20).to_dense(20).clone()
    limits[..., 2::5] = False
    inputs = random_call(keep=limits if keep else None)
    zero = torch.zeros((1, 1, 1), dtype=torch.int32)
    taken = Mask.from_ranges(inputs.shape, [KeyRange(zero, zero + 2, 2)])
    taken = taken | Mask.from_indices(inputs.shape, torch.tensor([[[[7, 11]]]]).expand(2, 4, 1, 2))
    seen = []

    def logits(part):
        return part.ops.logits(part.query, part.key, 1.0)

    def share(scores):
        seen.append(scores)
        return torch.softmax(scores, dim=-1).unflatten(1, (2, 2)).sum(2)

    mask = add_best(inputs, taken, Size(tokens=4), logits, share)
    candidates = inputs.allowed.to_dense(20).expand(inputs.shape) & (taken.to_dense() == 0)
    assert torch.equal(seen[0] > float("-inf"), candidates)
    weights = torch.softmax(logits(inputs).masked_fill(~candidates, float("-inf")), -1)
    joint = weights.unflatten(1, (2, 2)).sum(2)
    best = joint.topk(4).indices
    wanted = (taken.to_dense() > 0).scatter(-1, best.repeat_interleave(2, dim=1), True)
    allowed = inputs.allowed.to_dense(20)
    assert torch.equal((mask & inputs.allowed).to_dense() > 0, wanted & allowed)


def decode_call(batch=3, kv_heads=4, group=2, key_len=30, first=(0, 4, 9), keep=None):
    torch.manual_seed(0)
    start = torch.tensor(first, dtype=torch.int32)
    key = torch.randn(batch, kv_heads, key_len, 8)
    allowed = Allowed.causal(1, key_len, first=start)
    if keep is not None:
        allowed = attrs.evolve(allowed, keep=keep)
    return Inputs(
        query=torch.randn(batch, kv_heads * group, 1, 8),
        key=key,
        value=key,
        allowed=allowed,
        scaling=1.0,
        key_len=key_len,
    )


def logits(part):
    return part.ops.logits(part.query, part.key, part.scaling)


def taken_before(inputs, selections):
    """The first and last keys of each sequence, and keys by index for so many selections."""
    allowed = inputs.allowed
    ends = Mask.from_ranges(
        inputs.shape,
        [
            KeyRange(allowed.start, allowed.start, 2, 0, 2),
            KeyRange(allowed.stop, allowed.stop, 3, -3, 0),
        ],
    )
    if not selections:
        return ends
    indices = torch.randint(10, 25, (inputs.batch, selections, 1, 2), dtype=torch.int32)
    indices[..., 1] = indices[..., 0] - 1
    return ends | Mask.from_indices(inputs.shape, indices)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("selections", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", [Size(tokens=4), Size(fraction=0.2)])
def test_one_row_scored_by_sequence_and_head_selects_what_it_selects_in_whole(
    monkeypatch, blocks, selections, kept, size
):
    keep = torch.rand(3, 8, 1, 30) < 0.7 if kept else None
    inputs = decode_call(keep=keep)
    previous = taken_before(inputs, selections)
    right = add_best(inputs, previous, size, logits).to_dense()
    monkeypatch.setattr(selection, "CACHED_BYTES", blocks * 4 * 2 * 30)
    sizes = []

    def watched(part):
        sizes.append(part.batch * part.kv_heads)
        return logits(part)

    assert torch.equal(add_best(inputs, previous, size, watched, stateless=True).to_dense(), right)
    assert sum(sizes) == 12
    if selections != 2:
        assert max(sizes) <= max(1, blocks)


@pytest.mark.parametrize("sequences", [slice(0, 1), slice(1, 3), slice(0, 3)])
@pytest.mark.parametrize("kv_heads", [slice(0, 2), slice(2, 4), slice(0, 4)])
@pytest.mark.parametrize("selections", [1, 2, 4, 8])
def test_a_part_of_a_call_is_that_part_of_its_mask(sequences, kv_heads, selections):
    keep = torch.rand(3, 8, 1, 30) < 0.7
    inputs = decode_call(keep=keep)
    heads = slice(kv_heads.start * 2, kv_heads.stop * 2)
    mask = taken_before(inputs, selections)
    part = inputs.part(sequences, kv_heads)
    cut = mask.part(sequences, heads)
    assert cut.shape == part.shape
    assert torch.equal(cut.to_dense(), mask.to_dense()[sequences, heads])
    assert torch.equal(part.allowed.to_dense(30), inputs.allowed.to_dense(30)[sequences, heads])
    assert torch.equal(part.query, inputs.query[sequences, heads])
    assert torch.equal(part.key, inputs.key[sequences, kv_heads])
