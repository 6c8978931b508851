"""The choice among the keys that are left, where head groups share it."""

import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask, Size, choosing
from sah_core.choosing import add_best

pytestmark = pytest.mark.unit


def call(query_len=3, keep=None):
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
        monkeypatch.setattr(choosing, "SCORE_BYTES", 2 * 4 * 2 * 4 * 20)
    inputs = call()
    indices = torch.tensor([[0, 3], [0, 4], [1, 5], [1, 5]], dtype=torch.int32)
    previous = Mask.from_indices(inputs.shape, indices[None, :, None].expand(2, -1, 3, -1))
    mask = add_best(inputs, previous, Size(tokens=size), shared)
    got = (mask & inputs.allowed).to_dense()
    assert torch.equal(got, expected(inputs, previous, size).float())


def test_limits_that_differ_by_head_admit_what_any_head_of_a_group_may_attend():
    keep = torch.ones(2, 4, 3, 20, dtype=torch.bool)
    keep[:, 0, :, :10] = keep[:, 2:, :, 5:15] = False
    inputs = call(keep=keep)
    nothing = Mask.empty(inputs.shape)
    mask = add_best(inputs, nothing, Size(tokens=6), shared)
    got = (mask & inputs.allowed).to_dense()
    assert torch.equal(got, expected(inputs, nothing, 6).float())


def test_nothing_is_scored_where_nothing_can_be_added():
    inputs = call()
    full = Mask.full(inputs.shape)
    assert add_best(inputs, full, Size(tokens=3), pytest.fail) is full
    nothing = Mask.empty(inputs.shape)
    assert add_best(inputs, nothing, Size(tokens=0), pytest.fail) is nothing


@pytest.mark.parametrize("keep", [False, True])
def test_what_heads_share_is_made_from_the_scores_of_candidates_alone(keep):
    limits = Allowed.causal(3, 20).to_dense(20).clone()
    limits[..., 2::5] = False
    inputs = call(keep=limits if keep else None)
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
