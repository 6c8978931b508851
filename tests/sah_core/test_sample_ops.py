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
