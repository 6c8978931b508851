"""random-sampling: how many, which, with which probability, and what that makes of the estimate."""

import attrs
import pytest
import torch

from sah_core import Mask, Size, selection
from sah_core.attention import build_mask
from sah_core.randomness import Random
from sah_core.testing import CHECKS
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.random_sampling import RandomSampling

pytestmark = pytest.mark.unit

KINDS = ("empty", "ranges", "keys", "both", "pages", "dense")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", [8, 0.1])
def test_conformance(check, size):
    check(RandomSampling(sampling_rate=size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4, 500, 0.2, 1.0])
@pytest.mark.parametrize(
    "case",
    [{}, {"query_len": 20, "first": (7, 0)}, {"query_len": 1, "first": (0, 18)}, {"keep_heads": 4}],
    ids=str,
)
def test_a_row_draws_its_size_from_the_residual_with_the_share_as_probability(
    calls, kind, size, case
):
    inputs = calls.make(**case)
    previous = calls.previous(kind, inputs)
    before = calls.effective(previous, inputs)
    after = calls.effective(RandomSampling(sampling_rate=size).add_mask(inputs, previous), inputs)
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    assert torch.equal(after[before > 0], before[before > 0])
    first = inputs.allowed.first.expand(inputs.batch)
    for b in range(inputs.batch):
        wanted = Size.parse(size).resolve(inputs.capacity - int(first[b]))
        left = ((before[b] == 0) & keep[b]).sum(-1)
        drawn = (after[b] > 0) & (before[b] == 0)
        assert torch.equal(drawn.sum(-1), left.clamp(max=wanted))
        chance = (left.clamp(max=wanted) / left.clamp(min=1)).unsqueeze(-1).expand_as(drawn)
        assert torch.allclose(after[b][drawn], chance[drawn])


@pytest.mark.parametrize("size", [3, 20, 39])
def test_estimates_are_unbiased_and_inclusions_as_frequent_as_stated(calls, size):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    draws = calls.Draws((RandomSampling(sampling_rate=size),), logits)
    draws.check_unbiased()
    count, keys = draws.included.shape
    share = size / keys
    assert torch.allclose(draws.probability[draws.included], torch.tensor(share).double())
    # counts of a simple random sample: chi-square with keys - 1 degrees of freedom
    seen = draws.included.sum(0).double()
    square = ((seen - count * share) ** 2).sum() / (count * share * (1 - share))
    square *= (keys - 1) / keys
    assert abs(float(square) - (keys - 1)) < 4 * (2 * (keys - 1)) ** 0.5
    pairs = draws.included.double().T @ draws.included.double() / count
    joint = share * (size - 1) / (keys - 1)
    off = pairs[~torch.eye(keys, dtype=torch.bool)]
    assert float((off - joint).abs().max()) < 5 * (joint / count) ** 0.5 + 1e-9


def test_estimates_stay_unbiased_behind_a_deterministic_step(calls):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    steps = (OracleTopK(heavy_size=5), RandomSampling(sampling_rate=6))
    draws = calls.Draws(steps, logits)
    draws.check_unbiased()
    heavy = logits.topk(5).indices
    assert (draws.probability[:, heavy] == 1).all()


def test_a_whole_sample_is_exact(calls):
    logits = torch.randn(40)
    draws = calls.Draws((RandomSampling(sampling_rate=40),), logits, draws=40)
    assert (draws.probability == 1).all()


def test_a_seed_a_step_a_layer_a_row_and_a_head_each_draw_for_themselves(calls):
    inputs = calls.make(key_len=400, query_len=2)
    masker = RandomSampling(sampling_rate=40)

    def drawn(**place):
        call = attrs.evolve(inputs, random=Random(**place))
        return masker.add_mask(call, Mask.empty(call.shape)).to_dense()[:1] > 0

    base = drawn()
    assert torch.equal(base, drawn())
    for place in ({"seed": 1}, {"step": 1}, {"layer": 1}):
        overlap = int((drawn(**place) & base).sum()) / int(base.sum())
        assert overlap < 0.25
    for head in range(1, 4):
        assert int((base[0, 0, 0] & base[0, head, 0]).sum()) < 15
    assert int((base[0, 0, 0] & base[0, 0, 1]).sum()) < 15


def test_pieces_of_rows_draw_what_all_rows_do(calls, monkeypatch):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = calls.previous("both", inputs)
    masker = RandomSampling(sampling_rate=0.3)
    whole = masker.add_mask(inputs, previous).to_dense()
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 32 * 2 * 4 * 20)
    assert torch.equal(masker.add_mask(inputs, previous).to_dense(), whole)


@pytest.mark.parametrize("size", [6, 0.4])
def test_a_length_on_the_device_draws_what_a_host_length_does(calls, size):
    inputs = calls.make(query_len=1, first=(0, 9))
    live = calls.captured(inputs)
    masker = RandomSampling(sampling_rate=size)
    here = calls.effective(build_mask((masker,), inputs), inputs)
    there = calls.effective(build_mask((masker,), live, states={}), live)
    assert torch.equal(there[..., :20], here)
