"""MagicPIG against its definition, written as loops, and its probabilities against many draws."""

import math

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask, ParameterError, Pipeline, selection
from sah_core.attention import build_mask, context_only, layer_info
from sah_core.ops import REFERENCE
from sah_core.randomness import Random
from sah_core.selection import overflow_rows
from sah_core.testing import CHECKS
from sah_plugins.maskers import magicpig
from sah_plugins.maskers.magicpig import HashTables, MagicPig

pytestmark = pytest.mark.unit

SMALL = {"lsh_l": 12, "lsh_k": 3, "init_offset": 2, "local_offset": 5}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "masker",
    [MagicPig(**SMALL), MagicPig(lsh_l=9, lsh_k=2, max_size=7), MagicPig(lsh_l=30, lsh_k=17)],
    ids=["small", "overflowing", "wide"],
)
def test_conformance(masker, check):
    check(masker)


@attrs.frozen(kw_only=True)
class Bounded(MagicPig):
    """Promises what follows from its max_size, so that no check of a decode step is skipped."""

    capabilities = attrs.evolve(MagicPig.capabilities, unbounded=False)


@pytest.mark.parametrize("check", ["no_host_sync", "captured_decode", "density"])
@pytest.mark.parametrize("values", [{}, {"lsh_l": 9, "lsh_k": 2, "max_size": 7}])
def test_a_decode_step_waits_for_nothing_and_can_be_captured(values, check):
    checks = {function.__name__: function for function in CHECKS}
    checks[f"check_{check}"](Bounded(**SMALL | values))


def call(batch=1, heads=4, kv_heads=2, query_len=1, key_len=61, dim=8, first=None, **more):
    draw = torch.Generator().manual_seed(more.pop("seed", 0))
    dtype = more.pop("dtype", torch.float32)
    query = torch.randn(batch, heads, query_len, dim, generator=draw).to(dtype)
    key = (torch.randn(batch, kv_heads, key_len, dim, generator=draw) + 0.7).to(dtype)
    value = torch.randn(batch, kv_heads, key_len, dim, generator=draw).to(dtype)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    allowed = more.pop("allowed", None) or Allowed.causal(query_len, key_len, first=first)
    return Inputs(
        query=query,
        key=key,
        value=value,
        allowed=allowed,
        scaling=dim**-0.5,
        key_len=key_len,
        **more,
    )


def with_state(masker, inputs, context=None):
    """The call with a state that saw the keys, the first ``context`` of them as the context."""
    context = inputs.key_len if context is None else context
    state = masker.init_state(layer_info(inputs))
    masker.append(state, inputs.key[:, :, :context], inputs.value[:, :, :context], 0)
    masker.end_prefill(state, attrs.evolve(context_only(inputs, context), state=state))
    rest = inputs.key[:, :, context:]
    masker.append(state, rest, rest, context)
    return attrs.evolve(inputs, state=state)


def tail(masker, cosine):
    """Chance of at least min_matches collisions, term by term."""
    hit = (1 - math.acos(max(-1.0, min(1.0, cosine))) / math.pi) ** masker.lsh_k
    return sum(
        math.comb(masker.lsh_l, j) * hit**j * (1 - hit) ** (masker.lsh_l - j)
        for j in range(masker.min_matches, masker.lsh_l + 1)
    )


def expected(masker, inputs, context):
    """Loops over rows, keys and tables; the context's middle keys have their mean at 0."""
    planes = inputs.state.planes.double()
    keep = inputs.allowed.to_dense(inputs.key_len).expand(inputs.batch, 1, inputs.query_len, -1)
    firsts = inputs.allowed.first.expand(inputs.batch).tolist()
    result = torch.zeros(inputs.shape)
    for b in range(inputs.batch):
        for head in range(inputs.heads):
            key = inputs.key[b, head // inputs.group].double()
            if masker.center and firsts[b] < context:
                begin, end = firsts[b] + masker.init_offset, context - masker.local_offset
                begin, end = (begin, end) if begin < end else (firsts[b], context)
                key = key - key[begin:end].mean(0)
            for row in range(inputs.query_len):
                query = inputs.query[b, head, row].double()
                for k in range(inputs.key_len):
                    sides = (planes @ query > 0) == (planes @ key[k] > 0)
                    if keep[b, 0, row, k] and int(sides.all(0).sum()) >= masker.min_matches:
                        cosine = query @ key[k] / (query.norm() * key[k].norm())
                        result[b, head, row, k] = tail(masker, float(cosine))
    return result


@pytest.mark.parametrize("matches", [1, 2, 4])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("query_len", [1, 3])
def test_keys_with_enough_collisions_are_selected_with_their_chance(matches, center, query_len):
    masker = MagicPig(**SMALL, min_matches=matches, center=center, max_size=1.0)
    inputs = with_state(masker, call(query_len=query_len, key_len=37), 37 - query_len)
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape)) & inputs.allowed
    wanted = expected(masker, inputs, 37 - query_len)
    assert 0 < (wanted > 0).sum() < wanted.numel()
    torch.testing.assert_close(mask.to_dense(), wanted, atol=1e-6, rtol=1e-5)


def test_means_and_fractions_count_from_the_first_real_key():
    masker = MagicPig(**SMALL, max_size=1.0)
    inputs = with_state(masker, call(batch=3, query_len=2, key_len=40, first=[0, 9, 38]), 38)
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape)) & inputs.allowed
    torch.testing.assert_close(mask.to_dense(), expected(masker, inputs, 38), atol=1e-6, rtol=1e-5)


def test_the_mean_of_a_long_context_is_taken_in_pieces(monkeypatch):
    inputs = call(batch=2, key_len=50, first=[0, 7])
    masker = MagicPig(**SMALL)
    whole = masker.mean(inputs)
    monkeypatch.setattr(magicpig, "MEAN_CHUNK", 8)
    torch.testing.assert_close(masker.mean(inputs), whole)
    torch.testing.assert_close(whole[1], inputs.key[1, :, 9:45].mean(1))


def test_half_precision_keys_are_hashed_as_they_are():
    masker = MagicPig(**SMALL, max_size=1.0)
    inputs = with_state(masker, call(dtype=torch.bfloat16, key_len=30))
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape)) & inputs.allowed
    torch.testing.assert_close(mask.to_dense(), expected(masker, inputs, 30), atol=1e-5, rtol=1e-5)


def test_the_choice_is_the_same_when_all_keys_move_by_one_vector():
    inputs = call(key_len=60)
    moved = attrs.evolve(inputs, key=inputs.key + torch.arange(8) * 0.5)
    for center in (True, False):
        masker = MagicPig(lsh_l=12, lsh_k=3, center=center, init_offset=0, local_offset=0)
        masks = [
            masker.add_mask(with_state(masker, i), Mask.empty(i.shape)).to_dense()
            for i in (inputs, moved)
        ]
        assert torch.allclose(*masks, atol=1e-5) is center


def test_what_earlier_steps_selected_is_neither_sampled_nor_reweighted():
    masker = MagicPig(**SMALL, max_size=1.0)
    inputs = with_state(masker, call())
    alone = masker.add_mask(inputs, Mask.empty(inputs.shape)).to_dense()
    zero = torch.zeros((1, 1, 1), dtype=torch.int32)
    sink = Mask.from_ranges(inputs.shape, [KeyRange(zero, zero + 9, 9)])
    picked = Mask.from_indices(inputs.shape, torch.tensor([12, 40, 41]).expand(1, 4, 1, 3))
    mask = masker.add_mask(inputs, sink | picked)
    wanted = alone.clone()
    wanted[..., :9] = wanted[..., [12, 40, 41]] = 1.0
    torch.testing.assert_close((mask & inputs.allowed).to_dense(), wanted)
    assert mask.dense is None


def test_a_key_at_the_mean_counts_as_orthogonal():
    masker = MagicPig(lsh_l=9, lsh_k=2, max_size=1.0)
    inputs = with_state(masker, call(key_len=1, heads=2, kv_heads=1), 1)
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    wanted = torch.tensor([0.0, tail(masker, 0.0)])
    assert torch.isin(mask.to_dense(), wanted).all()


@pytest.mark.parametrize("bits", [1, 8, 9, 15, 16, 31])
def test_codes_use_the_smallest_type_and_never_overflow(bits):
    inputs = call(key_len=50)
    masker = MagicPig(lsh_l=3, lsh_k=bits)
    state = with_state(masker, inputs).state
    codes = state.codes.data
    width = 1 if bits <= 8 else 2 if bits < 16 else 4
    assert codes.element_size() == width
    assert codes.shape == (1, 2, 3, 50)
    centred = (inputs.key - state.center.unsqueeze(2)).double()
    sides = torch.einsum("bhnd,kld->bhlnk", centred, state.planes.double()) > 0
    wanted = (sides * 2 ** torch.arange(bits)).sum(-1)
    assert torch.equal(codes.long(), wanted)
    assert masker.bytes_read(inputs) == codes.numel() * width


def test_an_overfull_row_keeps_an_even_sample_that_its_probabilities_account_for():
    whole = MagicPig(lsh_l=12, lsh_k=1, max_size=1.0)
    capped = attrs.evolve(whole, max_size=10)
    inputs = call(heads=2, kv_heads=2)
    everything = whole.add_mask(with_state(whole, inputs), Mask.empty(inputs.shape)).to_dense()
    found = (everything > 0).sum(-1, keepdim=True)
    assert (found > 10).all()
    total = torch.zeros(inputs.shape, dtype=torch.float64)
    draws = 300
    inputs = with_state(capped, inputs)
    for seed in range(draws):
        # only the numbers that thin the rows change with the seed: the state keeps its planes
        random = attrs.evolve(inputs, random=Random(seed=seed))
        mask = capped.add_mask(random, Mask.empty(inputs.shape)).to_dense()
        kept = mask > 0
        assert (kept.sum(-1) == 10).all()
        assert overflow_rows(random.request_state) == 2 * (seed + 1)
        torch.testing.assert_close(mask[kept], (everything * 10 / found)[kept])
        total += kept.double()
    share = torch.where(everything > 0, 10 / found, 0.0)
    error = (total / draws - share).abs()
    assert (error <= 4.5 * (share * (1 - share) / draws).sqrt()).all()


def test_collisions_of_many_tables_are_binomial_with_the_stated_chance():
    tables, bits, draws = 5, 3, 20_000
    inputs = call(key_len=6, heads=1, kv_heads=1)
    state = HashTables(layer_info(inputs), bits, tables * draws)
    state.append(inputs.key, 0)
    state.finish(inputs.key, None)
    codes = state.codes.first(6)[0, 0] == REFERENCE.lsh_codes(inputs.query, state.planes)[0, 0]
    matches = codes.view(draws, tables, 6).sum(1)
    at = torch.arange(6, dtype=torch.int32).view(1, 1, 1, 6)
    cosine = REFERENCE.cosines(inputs.query, inputs.key, at)[0, 0, 0].tolist()
    for key in range(6):
        hit = (1 - math.acos(cosine[key]) / math.pi) ** bits
        seen = torch.bincount(matches[:, key], minlength=tables + 1).tolist()
        wanted = [
            draws * math.comb(tables, j) * hit**j * (1 - hit) ** (tables - j)
            for j in range(tables + 1)
        ]
        # cells that expect little are pooled; 30 is beyond the 99.99 % point for 5 degrees
        pool = [(s, w) for s, w in zip(seen, wanted, strict=True) if w >= 5]
        rest = sum(s for s, w in zip(seen, wanted, strict=True) if w < 5)
        spare = sum(w for w in wanted if w < 5)
        square = sum((s - w) ** 2 / w for s, w in pool) + (rest - spare) ** 2 / max(spare, 5)
        assert square < 30


@pytest.mark.parametrize("center", [True, False])
def test_numerator_and_denominator_are_unbiased_over_twenty_thousand_draws(center):
    tables, bits, draws, keys = 6, 2, 20_000, 10
    masker = MagicPig(lsh_l=tables, lsh_k=bits, max_size=1.0)
    inputs = call(key_len=keys, heads=2, kv_heads=1, seed=3)
    state = HashTables(layer_info(inputs), bits, tables * draws)
    state.append(inputs.key, 0)
    mean = inputs.key.mean(2) if center else None
    state.finish(inputs.key, mean)
    queries = REFERENCE.lsh_codes(inputs.query, state.planes)
    at = torch.arange(keys, dtype=torch.int32).expand(1, 2, 1, keys)
    chance = masker.chance(REFERENCE.cosines(inputs.query, inputs.key, at, mean)).double()
    weights = torch.exp(REFERENCE.logits(inputs.query, inputs.key, inputs.scaling)).double()
    value = inputs.value[0, 0].double()
    for head in range(2):
        same = queries[0, head] == state.codes.first(keys)[0, 0]
        chosen = (same.view(draws, tables, keys).sum(1) >= 2).double()
        parts = chosen * (weights / chance)[0, head, 0]
        for estimate, exact in (
            (parts.sum(1, keepdim=True), weights[0, head, 0].sum()),
            (parts @ value, weights[0, head, 0] @ value),
        ):
            error = estimate.std(0) / math.sqrt(draws)
            assert ((estimate.mean(0) - exact).abs() <= 4 * error).all()
        frequency = chosen.mean(0)
        stated = chance[0, head, 0]
        spread = (stated * (1 - stated) / draws).sqrt()
        assert ((frequency - stated).abs() <= 4 * spread).all()


def test_seed_step_and_layer_draw_other_hyperplanes():
    masker = MagicPig(**SMALL)
    info = layer_info(call())
    planes = [
        masker.init_state(attrs.evolve(info, random=random)).planes
        for random in (Random(), Random(), Random(seed=1), Random(step=1), Random(layer=1))
    ]
    assert torch.equal(planes[0], planes[1])
    for other in planes[2:]:
        assert not torch.equal(planes[0], other)


def test_the_same_masker_twice_in_a_row_of_steps_samples_twice():
    masker = MagicPig(**SMALL, max_size=1.0)
    inputs = call()
    once = build_mask((masker,), inputs).to_dense() > 0
    twice = build_mask((masker, masker), inputs).to_dense() > 0
    assert (twice | once).eq(twice).all()
    assert twice.sum() > once.sum()


def test_a_pipeline_takes_one_sampler():
    Pipeline.of(MagicPig())
    with pytest.raises(Exception, match="sampl"):
        Pipeline.of(MagicPig(), MagicPig(lsh_l=20))


def test_context_in_chunks_and_a_state_gone_back_before_its_end_are_hashed_alike():
    masker = MagicPig(**SMALL)
    inputs = call(key_len=50)
    state = masker.init_state(layer_info(inputs))
    for start in range(0, 40, 8):
        part = inputs.key[:, :, start : start + 8]
        masker.append(state, part, part, start)
    plain = attrs.evolve(call(key_len=50), state=state)
    prefill = attrs.evolve(
        plain,
        key=plain.key[:, :, :40],
        value=plain.value[:, :, :40],
        key_len=40,
        allowed=Allowed.causal(1, 40),
        query_position=None,
    )
    before = masker.add_mask(prefill, Mask.empty(prefill.shape)).to_dense()
    token = state.snapshot()
    context = attrs.evolve(context_only(inputs, 40), state=state)
    masker.end_prefill(state, context)
    first = state.codes.first(40).clone()
    state.restore(token)
    again = masker.add_mask(prefill, Mask.empty(prefill.shape)).to_dense()
    assert torch.equal(before, again)
    masker.end_prefill(state, context)
    assert torch.equal(state.codes.first(40), first)
    whole = with_state(masker, inputs, 40).state
    assert torch.equal(whole.codes.first(40), first)


def test_a_length_on_the_device_selects_what_a_host_length_does():
    masker = MagicPig(**SMALL, max_size=0.9)
    inputs = call(key_len=61)
    wanted = masker.add_mask(with_state(masker, inputs), Mask.empty(inputs.shape)).to_dense()
    buffer = torch.randn(1, 2, 96, 8)
    buffer[:, :, :61] = inputs.key
    state = masker.init_state(attrs.evolve(layer_info(inputs), capacity=96))
    masker.append(state, inputs.key[:, :, :60], inputs.value[:, :, :60], 0)
    masker.end_prefill(state, context_only(inputs, 60))
    state.center = with_state(masker, inputs).state.center
    state.finish(inputs.key[:, :, :60], state.center)
    last = inputs.key[:, :, 60:]
    masker.append(state, last, last, torch.tensor([60], dtype=torch.int32))
    captured = Inputs(
        query=inputs.query,
        key=buffer,
        value=buffer,
        allowed=inputs.allowed,
        scaling=1.0,
        length=torch.tensor([61], dtype=torch.int32),
        state=state,
    )
    mask = masker.add_mask(captured, Mask.empty(captured.shape)) & inputs.allowed
    torch.testing.assert_close(mask.to_dense()[..., :61], wanted)


def test_rows_in_pieces_are_the_rows_at_once(monkeypatch):
    masker = MagicPig(lsh_l=9, lsh_k=2, max_size=11)
    inputs = with_state(masker, call(query_len=13, key_len=40), 27)
    whole = masker.add_mask(inputs, Mask.empty(inputs.shape))
    monkeypatch.setattr(selection, "SCORE_BYTES", 1)
    pieces = masker.add_mask(inputs, Mask.empty(inputs.shape))
    assert torch.equal(whole.to_dense(), pieces.to_dense())


def test_more_matches_than_tables_are_refused():
    with pytest.raises(ParameterError, match="min_matches = 4.*lsh_l, 3"):
        MagicPig(lsh_l=3, min_matches=4)
