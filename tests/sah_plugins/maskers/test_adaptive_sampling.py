"""adaptive-sampling: budgets against the formula in loops, unbiased estimates, coverage."""

from statistics import NormalDist

import attrs
import pytest
import torch

from sah_core import Mask, ParameterError, selection
from sah_core.attention import build_mask
from sah_core.randomness import Random
from sah_core.testing import CHECKS
from sah_plugins.maskers.adaptive_sampling import AdaptiveSampling, student_quantile
from sah_plugins.maskers.oracle_top_k import OracleTopK

pytestmark = pytest.mark.unit

MODES = ("uniform", "multinomial", "gumbel")
KINDS = ("empty", "ranges", "keys", "both", "pages", "dense")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "options",
    [
        {"bound": "attention"},
        {"mode": "multinomial", "bound": "numerator"},
        {"mode": "gumbel", "max_size": 20},
        {"base_rate_sampling": 0.1, "init_offset": 3, "local_offset": 0.1, "two_sided": False},
    ],
    ids=str,
)
def test_conformance(check, options):
    given = {"base_rate_sampling": 4, "epsilon": 0.3, "delta": 0.3}
    check(AdaptiveSampling(**given | options))


def budgets(masker, inputs, previous):
    """Row by row in float64: the keys that the bound asks for, from the masker's base sample."""
    inner = masker.sampling_range(inputs)
    left = selection.residual_count(inner, previous).expand(inputs.shape[:3])
    base_count = masker.base_count(left)
    base = selection.sample(inner, previous, base_count, masker.base_capacity(inputs), draw=0)
    chance = previous.to_dense().double()
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    result = torch.zeros(inputs.shape[:3], dtype=torch.long)
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in inputs.shape[:3])).tolist():
        key = inputs.key[b, h // inputs.group].double()
        value = inputs.value[b, h // inputs.group].double()
        weight = (key @ inputs.query[b, h, q].double() * inputs.scaling).exp()
        n, drawn = int(left[b, h, q]), [k for k in base[b, h, q].tolist() if k >= 0]
        assert len(drawn) == int(base_count[b, h, q])
        fixed = ((chance[b, h, q] > 0) & keep[b, h, q]).nonzero().flatten()
        held = weight[fixed] / chance[b, h, q, fixed]
        sure = {"denominator": held.sum(), "numerator": held @ value[fixed]}
        terms = {"denominator": weight[drawn], "numerator": weight[drawn, None] * value[drawn]}
        need = 0.0
        for name, epsilon, delta in parts_of(masker):
            x = terms[name].reshape(len(drawn), -1 if drawn else 1)
            spread = x.var(0).sum().sqrt() if len(drawn) > 1 else torch.tensor(0.0)
            size = (sure[name] + n * x.mean(0) if len(drawn) else sure[name] + x.sum(0)).norm()
            z = NormalDist().inv_cdf(1 - delta / 2 if masker.two_sided else 1 - delta)
            factor = 1.0
            if masker.cautious and len(drawn) > 1:
                z = student(z, len(drawn) - 1)
                excess = max(0.0, float(kurtosis(terms["denominator"]) - 1))
                factor = 1 + (excess / len(drawn)) ** 0.5
            if n:
                need = max(need, float(factor * (z * n * spread / (epsilon * size)) ** 2))
        result[b, h, q] = min(max(-(-need // 1), len(drawn)), n)
    return result


def student(z, freedom):
    """The first terms of the expansion of Student's quantile."""
    correction = (z**3 + z) / (4 * freedom)
    return z + correction + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def kurtosis(x):
    off = x - x.mean()
    return (off**4).mean() / (off**2).mean() ** 2


def parts_of(masker):
    if masker.bound != "attention":
        return [(masker.bound, masker.epsilon, masker.delta)]
    epsilon = masker.epsilon / (2 + masker.epsilon)
    return [(name, epsilon, masker.delta / 2) for name in ("denominator", "numerator")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bound": "numerator"},
        {"bound": "attention", "epsilon": 0.8},
        {"two_sided": False, "cautious": False},
        {"cautious": False},
        {"base_rate_sampling": 0.3},
        {"init_offset": 3, "local_offset": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [{}, {"query_len": 1}, {"query_len": 40, "first": (7, 0)}, {"keep_heads": 4}],
    ids=str,
)
def test_the_budget_is_that_of_the_bound(calls, kind, options, case):
    given = {"base_rate_sampling": 5, "epsilon": 0.4, "delta": 0.2}
    masker = AdaptiveSampling(**given | options)
    inputs = calls.make(**{"key_len": 40} | case)
    previous = calls.previous(kind, inputs)
    before = calls.effective(previous, inputs)
    after = calls.effective(masker.add_mask(inputs, previous), inputs)
    assert torch.equal(after[before > 0], before[before > 0])
    drawn = (after > 0) & (before == 0)
    expected = budgets(masker, inputs, previous)
    # the last digit of a float32 sum may move a budget by one key
    assert int((drawn.sum(-1) - expected).abs().max()) <= 1
    assert float((drawn.sum(-1) != expected).double().mean()) < 0.02
    inner = masker.sampling_range(inputs)
    left = selection.residual_count(inner, previous).expand(inputs.shape[:3])
    chance = (drawn.sum(-1) / left.clamp(min=1)).unsqueeze(-1).expand_as(drawn)
    assert torch.allclose(after[drawn], chance[drawn])


def test_offsets_leave_out_the_first_and_the_last_keys_of_every_row(calls):
    inputs = calls.make(query_len=20, first=(6, 0))
    masker = AdaptiveSampling(base_rate_sampling=50, init_offset=4, local_offset=3)
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    found = calls.effective(mask, inputs) > 0
    for b, first in enumerate((6, 0)):
        for q in range(20):
            expected = [first + 4 <= k <= q - 3 for k in range(20)]
            assert found[b, 0, q].tolist() == expected


def test_learned_sinks_count_in_the_denominator(calls):
    inputs = calls.make(query_len=1, key_len=200)
    masker = AdaptiveSampling(base_rate_sampling=10, epsilon=0.1)
    previous = Mask.empty(inputs.shape)
    plain = (masker.add_mask(inputs, previous).to_dense() > 0).sum()
    heavy = attrs.evolve(inputs, sinks=torch.full((4,), 9.0))
    fewer = (masker.add_mask(heavy, previous).to_dense() > 0).sum()
    assert int(fewer) == 2 * 4 * 10 < int(plain)


@pytest.mark.parametrize("size", [0.0, 80.0, -80.0, 3e4])
def test_logits_of_any_size_neither_overflow_nor_vanish(calls, size):
    inputs = calls.make(query_len=1, key_len=100)
    inputs = attrs.evolve(inputs, query=inputs.query * size)
    for mode in MODES:
        mask = AdaptiveSampling(mode=mode, bound="attention").add_mask(
            inputs, Mask.empty(inputs.shape)
        )
        dense = mask.to_dense()
        assert dense.isfinite().all()
        assert ((dense >= 0) & (dense <= 1)).all()
        assert (dense > 0).any(-1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.25), (2.0, 0.6)])
def test_estimates_are_unbiased(calls, mode, sigma, epsilon):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1)) * sigma
    masker = AdaptiveSampling(
        base_rate_sampling=6, epsilon=epsilon, delta=0.2, mode=mode, max_size=20
    )
    calls.Draws((masker,), logits).check_unbiased()
    calls.Draws((OracleTopK(heavy_size=4), masker), logits, seed=1).check_unbiased()


@pytest.mark.parametrize("mode", MODES)
def test_inclusions_are_as_frequent_as_stated(calls, mode):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    # a fixed budget: the base sample asks for more than max_size in every draw
    masker = AdaptiveSampling(base_rate_sampling=8, epsilon=0.01, mode=mode, max_size=8)
    draws = calls.Draws((masker,), logits)
    count, keys = draws.included.shape
    seen = draws.included.sum(0).double()
    if mode == "gumbel":
        # a key's chance depends on the threshold of the draw; its mean is 1 / E[1 / p] weighted
        # back: the sum of 1 / p over the draws that hold the key is their number
        mean = draws.factors().mean(0)
        error = draws.factors().std(0) / count**0.5
        assert ((mean - 1).abs() < 4.5 * error).all()
        return
    stated = draws.probability.max(0).values
    assert torch.allclose(draws.probability, stated * draws.included, atol=1e-6)
    if mode == "multinomial":
        share = torch.softmax(logits.double(), 0)
        assert torch.allclose(stated, 1 - (1 - share) ** 8, atol=1e-6)
    square = ((seen - count * stated) ** 2 / (count * stated * (1 - stated))).sum()
    assert float(square) < keys + 4 * (2 * keys) ** 0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_of_everything_left_takes_it_whole(calls, mode):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 4
    draws = calls.Draws((AdaptiveSampling(epsilon=1e-6, mode=mode),), logits, draws=200)
    assert (draws.probability == 1).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.1), (0.2, 0.05), (0.3, 0.1)])
def test_the_two_sided_bound_is_kept_on_gaussian_logits(calls, sigma, epsilon, delta):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(4)) * sigma
    masker = AdaptiveSampling(base_rate_sampling=0.05, epsilon=epsilon, delta=delta)
    draws = calls.Draws((masker,), logits, draws=4000)
    exact = draws.weight.sum()
    within = ((draws.denominators() - exact).abs() <= epsilon * exact).double().mean()
    error = (delta * (1 - delta) / 4000) ** 0.5
    assert float(within) >= 1 - delta - 3 * error


@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize(("bound", "epsilon"), [("numerator", 0.3), ("attention", 0.8)])
def test_the_bounds_of_numerator_and_attention_are_kept_on_gaussian_logits(
    calls, bound, epsilon, cautious
):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(4)) * 0.5
    delta, count = 0.1, 2000
    masker = AdaptiveSampling(epsilon=epsilon, delta=delta, bound=bound, cautious=cautious)
    draws = calls.Draws((masker,), logits, draws=count)
    assert draws.included.double().mean() < 0.5
    found, exact = draws.numerators(), draws.weight @ draws.value
    if bound == "attention":
        found, exact = found / draws.denominators().unsqueeze(1), exact / draws.weight.sum()
    within = ((found - exact).norm(dim=1) <= epsilon * exact.norm()).double().mean()
    error = (delta * (1 - delta) / count) ** 0.5
    assert float(within) >= 1 - delta - 3 * error


def test_the_expansion_of_students_quantile_is_close_to_the_tables():
    degrees = torch.tensor([5.0, 10.0, 30.0, 1e9])
    found = student_quantile(NormalDist().inv_cdf(0.975), degrees)
    assert found.tolist() == pytest.approx([2.571, 2.228, 2.042, 1.960], abs=0.03)


def test_the_base_sample_and_the_final_sample_are_drawn_independently(calls):
    inputs = attrs.evolve(calls.make(query_len=1, key_len=400), random=Random(seed=2))
    previous = Mask.empty(inputs.shape)
    counts = torch.full(inputs.shape[:3], 100, dtype=torch.int32)
    base = selection.sample(inputs, previous, counts, 100, draw=0)
    masker = AdaptiveSampling(base_rate_sampling=100, epsilon=10.0)
    final = masker.add_mask(inputs, previous).selected.indices
    assert final.shape == base.shape
    both = [
        len(set(a) & set(b))
        for a, b in zip(base[0, :, 0].tolist(), final[0, :, 0].tolist(), strict=True)
    ]
    assert max(both) < 45


def test_rows_above_the_limit_are_counted_and_keep_exact_probabilities(calls):
    inputs = calls.make(query_len=3, key_len=60)
    masker = AdaptiveSampling(base_rate_sampling=4, epsilon=0.01, max_size=9)
    found = calls.effective(masker.add_mask(inputs, Mask.empty(inputs.shape)), inputs)
    assert (found > 0).sum(-1).unique().tolist() == [9]
    assert selection.overflow_rows(inputs.request_state) == 2 * 4 * 3
    for q in range(3):
        chances = found[:, :, q][found[:, :, q] > 0]
        assert torch.allclose(chances, torch.tensor(9 / (58 + q)))


@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_rows_draw_what_all_rows_do(calls, mode, monkeypatch):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = calls.previous("both", inputs)
    masker = AdaptiveSampling(base_rate_sampling=2, epsilon=0.5, mode=mode)
    whole = masker.add_mask(inputs, previous).to_dense()
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 48 * 2 * 4 * 20)
    torch.testing.assert_close(masker.add_mask(inputs, previous).to_dense(), whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_size", [None, 12])
def test_a_length_on_the_device_draws_what_a_host_length_does(calls, mode, max_size):
    inputs = calls.make(query_len=1, key_len=60, first=(0, 9))
    live = calls.captured(inputs)
    masker = AdaptiveSampling(base_rate_sampling=0.1, epsilon=0.4, mode=mode, max_size=max_size)
    here = calls.effective(build_mask((masker,), inputs), inputs)
    there = calls.effective(build_mask((masker,), live, states={}), live)
    torch.testing.assert_close(there[..., :60], here)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", 0.0), ("delta", 0.6), ("delta", 0.0), ("mode", "poisson"), ("bound", "both")],
)
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        AdaptiveSampling(**{name: value})
