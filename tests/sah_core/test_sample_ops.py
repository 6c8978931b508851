"""The primitives around samples, against their definitions in loops."""

import math

import pytest
import torch

from sah_core import Allowed, KeyRange
from sah_core.ops import REFERENCE
from sah_core.randomness import Random

pytestmark = pytest.mark.unit


def test_what_ranges_leave_is_what_lies_in_none_of_them():
    allowed = Allowed.causal(3, 20, first=torch.tensor([0, 6], dtype=torch.int32))
    first, stop = allowed.start, allowed.stop
    ranges = [KeyRange(first, first, 5, 0, 5), KeyRange(stop, stop, 9, -9, 0)]
    counts = REFERENCE.residual_count(ranges, allowed)
    keys = REFERENCE.range_entries(ranges, allowed, 20)
    for b in range(2):
        for row in range(3):
            low, high = int(first[b, 0, 0]), int(stop[0, 0, row])
            held = {k for k in range(low, high) if k < low + 5 or k >= high - 9}
            assert int(counts[b, 0, row]) == high - low - len(held)
            found = [k for k in keys[b, 0, row].tolist() if k >= 0]
            assert sorted(found) == sorted(held)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_weights_are_their_sums_in_double_precision(weighted):
    torch.manual_seed(0)
    drawn, sure = 30 * torch.randn(1, 2, 1, 12), 30 * torch.randn(1, 2, 1, 4)
    drawn[0, 0, 0, 7:] = float("-inf")
    chance = torch.rand(1, 2, 1, 4) + 0.1 if weighted else None
    sinks = torch.tensor([90.0, -5.0]) if weighted else None
    top, moments = REFERENCE.weight_moments(drawn, sure, chance, sinks)
    for head in range(2):
        logits = [x for x in drawn[0, head, 0].tolist() if x > float("-inf")]
        known = sure[0, head, 0].tolist()
        peak = max(logits + known + ([] if sinks is None else [float(sinks[head])]))
        assert float(top[0, head, 0, 0]) == peak
        weights = [math.exp(x - peak) for x in logits]
        shares = [1.0] * 4 if chance is None else chance[0, head, 0].tolist()
        held = sum(math.exp(x - peak) / p for x, p in zip(known, shares, strict=True))
        held += 0.0 if sinks is None else math.exp(float(sinks[head]) - peak)
        mean = sum(weights) / len(weights)
        powers = [sum((w - mean) ** power for w in weights) for power in (2, 4)]
        right = torch.tensor([held, sum(weights), *powers], dtype=torch.float64)
        torch.testing.assert_close(moments[:, 0, head, 0], right, rtol=1e-5, atol=1e-12)


def test_a_row_number_is_the_uniform_number_of_key_position_0():
    random = Random(seed=5, step=1, layer=2)
    first = torch.tensor([0, 3], dtype=torch.int32)
    position = torch.tensor([[7, 8]], dtype=torch.int32)
    got = REFERENCE.row_numbers(random, 4, position, first, draw=6)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert torch.equal(got, random.uniform(4, position - first.view(-1, 1), zero, 6))


def test_a_random_choice_takes_the_greatest_numbers():
    random, first = Random(seed=5), torch.zeros(1, dtype=torch.int32)
    position = torch.tensor([[39]], dtype=torch.int32)
    indices, chosen = REFERENCE.random_topk(random, 2, position, 40, first, 6, batch=2, draw=1)
    scores = REFERENCE.random_scores(random, 2, position, 40, first, draw=1)
    assert (chosen == 6).all()
    for b in range(2):
        right = scores[0].topk(6, dim=-1).indices.sort(-1).values
        assert torch.equal(indices[b].sort(-1).values.long(), right)


def test_signatures_are_the_signs_of_the_mlp_of_each_head():
    torch.manual_seed(0)
    one = torch.randn(2, 6, 5), torch.randn(2, 1, 5)
    two = torch.randn(2, 5, 40), torch.randn(2, 1, 40)
    rows = torch.randn(1, 2, 3, 6)
    words = REFERENCE.signatures(rows, [one, two])
    for head in range(2):
        hidden = torch.nn.functional.silu(rows[0, head] @ one[0][head] + one[1][head])
        signs = (hidden @ two[0][head] + two[1][head] > 0).tolist()
        for row in range(3):
            for bit in range(40):
                word = int(words[0, head, row, bit // 32]) & 0xFFFFFFFF
                assert (word >> bit % 32 & 1) == signs[row][bit]


def test_signatures_of_new_keys_are_written_where_they_belong():
    torch.manual_seed(0)
    layers = [(torch.randn(4, 6, 40), torch.randn(4, 1, 40))]
    key = torch.randn(2, 2, 3, 6)
    words = torch.zeros(2, 4, 8, 2, dtype=torch.int32)
    REFERENCE.signature_update(words, key[:, :, :2], layers, 3)
    REFERENCE.signature_update(words, key[:, :, 2:], layers, torch.tensor([5], dtype=torch.int32))
    assert not words[:, :, :3].any()
    assert not words[:, :, 6:].any()
    for head in range(4):
        weight, bias = layers[0][0][head], layers[0][1][head]
        signs = key[:, head // 2] @ weight + bias > 0
        assert torch.equal(words[:, head, 3:6], REFERENCE.pack_signs(signs.float()))


def choose(method, logits, capacity, counts, *, seed=0, rows=1):
    """A weighted choice of rows that all have the same logits, which stand in the last rows of
    their sequences.
    """
    key_len = logits.shape[-1]
    wide = logits.expand(logits.shape[0], logits.shape[1], rows, key_len).contiguous()
    position = torch.arange(key_len - 1, key_len - 1 + rows, dtype=torch.int32).view(1, rows)
    first = torch.zeros(1, dtype=torch.int32)
    count = torch.as_tensor(counts, dtype=torch.int32).expand(wide.shape[:3])
    return method(Random(seed=seed), wide, position, first, capacity, count=count, draw=3)


WEIGHTED = [REFERENCE.weighted_topk, REFERENCE.weighted_draws]


@pytest.mark.parametrize("method", WEIGHTED, ids=lambda m: m.__name__)
def test_weighted_samples_hold_candidates_once_and_as_many_as_wanted(method):
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 3, 4, 25)
    logits[0, :, :, ::2] = float("-inf")
    logits[1, 2] = float("-inf")
    counts = torch.tensor([3, 7, 0, 12]).expand(2, 3, 4)
    position = torch.tensor([[24, 25, 26, 27]], dtype=torch.int32)
    first = torch.tensor([0, 4], dtype=torch.int32)
    indices, chance = method(
        Random(seed=1), logits, position, first, 12, count=counts.to(torch.int32)
    )
    assert (indices.dtype, chance.dtype) == (torch.int32, torch.float32)
    assert indices.shape == chance.shape
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4))).tolist():
        row = [k for k in indices[b, h, q].tolist() if k >= 0]
        open_ = [k for k in range(25) if float(logits[b, h, q, k]) > -float("inf")]
        wanted = int(counts[b, h, q])
        assert len(row) == len(set(row))
        assert set(row) <= set(open_)
        if len(open_) <= wanted:
            assert len(row) == len(open_)
            assert (chance[b, h, q] == 1).all()
        else:
            exact = method.__name__ == "weighted_topk"
            assert len(row) == wanted if exact else len(row) <= wanted


@pytest.mark.parametrize("method", WEIGHTED, ids=lambda m: m.__name__)
def test_the_sums_of_weighted_samples_are_right_on_average(method):
    torch.manual_seed(0)
    logits, draws = 1.5 * torch.randn(1, 1, 1, 12), 20_000
    indices, chance = choose(method, logits, 4, 4, rows=draws)
    shares = torch.zeros(draws, 13, dtype=torch.float64)
    places = torch.where(indices < 0, 12, indices).long()[0, 0]
    shares.scatter_(1, places, 1 / chance[0, 0].double())
    mean, error = shares[:, :12].mean(0), shares[:, :12].std(0) / draws**0.5
    assert ((mean - 1).abs() < 4.5 * error).all()


def test_draws_with_replacement_hit_a_key_as_often_as_its_probability_says():
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0, 3.0]).view(1, 1, 1, 5), 20_000
    indices, chance = choose(REFERENCE.weighted_draws, logits, 3, 3, rows=draws)
    share = torch.softmax(logits[0, 0, 0].double(), 0)
    right = 1 - (1 - share) ** 3
    for key in range(5):
        hit = indices[0, 0] == key
        assert torch.allclose(chance[0, 0][hit].double(), right[key], atol=1e-6)
        error = float((right[key] * (1 - right[key]) / draws) ** 0.5)
        assert abs(float(hit.any(-1).double().mean()) - float(right[key])) < 4 * error


def test_the_sample_without_replacement_is_the_best_of_logits_with_gumbel_noise():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 1, 30)
    indices, chance = choose(REFERENCE.weighted_topk, logits, 6, 6, seed=5)
    keys = torch.arange(30).view(1, 1, 1, -1)
    height = Random(seed=5).uniform64(2, torch.tensor([[29]]), keys, draw=3)
    scores = logits.double() - (-height.log()).log()
    for head in range(2):
        order = scores[0, head, 0].sort(descending=True)
        kept = indices[0, head, 0] >= 0
        assert set(indices[0, head, 0][kept].tolist()) == set(order.indices[:6].tolist())
        at = indices[0, head, 0][kept].long()
        right = 1 - (-(logits[0, head, 0, at].double() - order.values[6]).exp()).exp()
        torch.testing.assert_close(chance[0, head, 0][kept].double(), right, atol=1e-5, rtol=1e-5)
