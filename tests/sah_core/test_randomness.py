"""Counter-based random numbers: a function of the place, whatever the order and the batch."""

import itertools
import math

import pytest
import torch

from sah_core.randomness import Random

pytestmark = pytest.mark.unit

WORD = (1 << 64) - 1


def absorb(state, word):
    """One step of SplitMix64 in Python integers."""
    bits = ((state ^ (word & WORD)) + 0x9E3779B97F4A7C15) & WORD
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & WORD
    return bits ^ (bits >> 31)


def bits_of(*words):
    state = 0
    for word in words:
        state = absorb(state, word)
    return state


def positions(*values):
    return torch.tensor(values, dtype=torch.int32)


def uniform(random, heads=2, query=(7, 8), keys=50, draw=0):
    key = torch.arange(keys, dtype=torch.int32).view(1, 1, 1, keys)
    return random.uniform(heads, positions(query), key, draw)


@pytest.mark.parametrize("seed", [0, 3, -1, 2**63, 2**64 - 1])
def test_bits_are_the_mixed_counter_words(seed):
    random = Random(seed=seed, step=2, layer=5)
    key = positions(0, 1, 131072).view(1, 1, 1, 3)
    bits = random.bits(2, positions([4, 9]), key, draw=1)
    for head, (row, query), (slot, k) in itertools.product(
        range(2), enumerate((4, 9)), enumerate((0, 1, 131072))
    ):
        assert int(bits[0, head, row, slot]) & WORD == bits_of(seed, 2, 5, 1, head, query, k)


def test_uniform_numbers_are_the_top_bits_inside_the_open_interval():
    random = Random(seed=1)
    key = torch.arange(40).view(1, 1, 1, 40)
    bits, numbers = random.bits(1, positions([3]), key), random.uniform(1, positions([3]), key)
    for word, number in zip(bits.flatten().tolist(), numbers.flatten().tolist(), strict=True):
        assert number == ((word & WORD) >> 41) / 2**23 + 2**-24
    assert numbers.dtype == torch.float32


def test_every_word_matters():
    base = Random(seed=1, step=2, layer=3)
    numbers = uniform(base)
    others = [Random(seed=s, step=t, layer=u) for s, t, u in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    for other in [
        *(uniform(r) for r in others),
        uniform(base, draw=1),
        uniform(base, query=(8, 9)),
    ]:
        assert not torch.equal(numbers, other)
    assert not torch.equal(numbers[:, 0], numbers[:, 1])
    assert numbers[0, 0, 0].unique().numel() == 50


def test_order_chunks_and_batch_do_not_matter():
    random = Random(seed=4, step=1, layer=2)
    whole = uniform(random, heads=3, query=(5, 6, 7))
    assert torch.equal(uniform(random, heads=3, query=(6,))[:, :, 0], whole[:, :, 1])
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    key = shuffled.view(1, 1, 1, 50)
    assert torch.equal(random.uniform(3, positions([5, 6, 7]), key), whole[..., shuffled])
    padded = torch.arange(-2, 48).view(1, 1, 1, 50)
    both = torch.cat([torch.arange(50).view(1, 1, 1, 50), padded])
    batch = random.uniform(3, positions([5, 6, 7], [3, 4, 5]), both)
    assert torch.equal(batch[:1], whole)
    alone = random.uniform(3, positions([3, 4, 5]), padded)
    assert torch.equal(batch[1:], alone)


def test_numbers_look_uniform_and_independent():
    numbers = Random(seed=9).uniform(
        8, torch.arange(100).view(1, 100), torch.arange(500).view(1, 1, 1, 500)
    )
    count = numbers.numel()
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert abs(float(numbers.double().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / count)
    histogram = torch.histc(numbers, bins=20, min=0, max=1)
    deviation = (histogram - count / 20).abs().max() / math.sqrt(count / 20)
    assert deviation < 5
    centred = numbers.double() - 0.5
    for dim in (1, 2, 3):
        a = centred.narrow(dim, 0, centred.shape[dim] - 1)
        b = centred.narrow(dim, 1, centred.shape[dim] - 1)
        assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(a.numel())


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    random = Random(seed=3, layer=2)
    keys = torch.arange(400).view(1, 1, 1, 400)
    numbers = random.normal(4, torch.arange(100).view(1, 100), keys).double()
    assert torch.equal(numbers.float(), random.normal(4, torch.arange(100).view(1, 100), keys))
    count = numbers.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = float((numbers**power).mean())
        assert abs(mean - moment) < 5 * math.sqrt(variance / count)
    assert numbers.abs().max() > 4
    other = random.normal(4, torch.arange(100).view(1, 100), keys, draw=1)
    assert abs(float((numbers * other).mean())) < 5 / math.sqrt(count)


def test_numbers_of_53_bits_are_uniform_and_reach_far_into_the_tail():
    position, keys = torch.arange(500).view(1, 500), torch.arange(400).view(1, 1, 1, 400)
    numbers = Random(seed=1).uniform64(1, position, keys)
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) > 0 < 1 - float(numbers.max())
    assert numbers.numel() == numbers.unique().numel()
    assert float(numbers.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 200_000) ** 0.5)
    low = float((numbers < 0.001).double().mean())
    assert low == pytest.approx(0.001, abs=4 * (0.001 / 200_000) ** 0.5)
