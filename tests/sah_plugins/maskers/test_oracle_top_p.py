"""oracle-top-p against its definition, written as loops."""

import attrs
import pytest
import torch

from sah_core import Mask, ParameterError, selection
from sah_core.attention import build_mask
from sah_core.testing import CHECKS
from sah_plugins.maskers.oracle_top_p import OracleTopP

pytestmark = pytest.mark.unit

KINDS = ("empty", "ranges", "keys", "both", "pages", "dense")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("masker", [OracleTopP(top_p=0.6), OracleTopP(max_size=8)], ids=str)
def test_conformance(check, masker):
    check(masker)


def smallest_set(logits, top_p):
    """Indices of the smallest set with that share of the mass; ``logits`` maps key to logit."""
    order = sorted(logits, key=lambda k: (-logits[k], k))
    if top_p == 1 or not order:
        return order
    mass = {k: torch.tensor(logits[k] - logits[order[0]]).double().exp().item() for k in order}
    whole, reached = sum(mass.values()), 0.0
    for count, key in enumerate(order):
        if reached >= top_p * whole:
            return order[:count]
        reached += mass[key]
    return order


def expected(inputs, previous, top_p, most=None):
    before = previous.to_dense() > 0
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    logits = inputs.ops.logits(inputs.query, inputs.key, inputs.scaling, inputs.softcap)
    result = before & keep
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in inputs.shape[:3])).tolist():
        free = (keep[b, h, q] & ~before[b, h, q]).nonzero().flatten().tolist()
        best = smallest_set({k: float(logits[b, h, q, k]) for k in free}, top_p)
        result[b, h, q, best[:most]] = True
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.93, 1.0])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"query_len": 20},
        {"query_len": 1, "first": (0, 11)},
        {"query_len": 20, "first": (7, 0)},
        {"keep_heads": 1},
        {"keep_heads": 4},
        {"kv_heads": 1, "key_len": 2, "query_len": 1},
        {"softcap": 0.5},
    ],
    ids=str,
)
def test_the_selection_is_that_of_the_definition(calls, kind, top_p, case):
    inputs = calls.make(**case)
    previous = calls.previous(kind, inputs)
    found = calls.effective(OracleTopP(top_p=top_p).add_mask(inputs, previous), inputs) > 0
    assert torch.equal(found, expected(inputs, previous, top_p))


def test_equal_logits_go_to_the_lower_index(calls):
    inputs = calls.make(query_len=1)
    inputs = attrs.evolve(inputs, query=torch.zeros_like(inputs.query))
    mask = OracleTopP(top_p=0.25).add_mask(inputs, Mask.empty(inputs.shape))
    assert (mask.to_dense()[..., :5] == 1).all()
    assert not mask.to_dense()[..., 5:].any()


def test_all_of_the_mass_is_every_key_however_little_it_weighs(calls):
    key = torch.linspace(0, -3000, 20).view(1, 1, 20, 1).expand(2, 2, 20, 1).contiguous()
    inputs = calls.make(query_len=1, key=key, value=key, scaling=1.0)
    inputs = attrs.evolve(inputs, query=torch.ones(2, 4, 1, 1))
    for top_p, count in ((1.0, 20), (0.999999, 1)):
        mask = OracleTopP(top_p=top_p).add_mask(inputs, Mask.empty(inputs.shape))
        assert (mask.to_dense() > 0).sum(-1).unique().tolist() == [count]


def test_rows_that_need_many_more_keys_than_others_are_exact_too(calls):
    inputs = calls.make(batch=1, heads=2, query_len=2, key_len=3000)
    flat = attrs.evolve(inputs, query=inputs.query * torch.tensor([0.01, 9.0]).view(1, 2, 1, 1))
    previous = Mask.empty(flat.shape)
    found = OracleTopP(top_p=0.8).add_mask(flat, previous).to_dense() > 0
    assert torch.equal(found, expected(flat, previous, 0.8))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_rows_select_what_all_rows_do(calls, kind, monkeypatch):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = calls.previous(kind, inputs)
    whole = OracleTopP(top_p=0.7).add_mask(inputs, previous).to_dense()
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 32 * 2 * 4 * 20)
    assert torch.equal(OracleTopP(top_p=0.7).add_mask(inputs, previous).to_dense(), whole)


def test_a_limit_keeps_the_best_keys_and_counts_the_rows_that_need_more(calls):
    inputs = calls.make()
    previous = calls.previous("both", inputs)
    found = OracleTopP(top_p=0.9, max_size=2).add_mask(inputs, previous)
    assert torch.equal(calls.effective(found, inputs) > 0, expected(inputs, previous, 0.9, most=2))
    whole = expected(inputs, previous, 0.9).sum(-1)
    limited = expected(inputs, previous, 0.9, most=2).sum(-1)
    assert selection.overflow_rows(inputs.request_state) == int((whole > limited).sum())


def test_no_limit_counts_no_overflow(calls):
    inputs = calls.make()
    OracleTopP().add_mask(inputs, Mask.empty(inputs.shape))
    assert selection.overflow_rows(inputs.request_state) == 0


@pytest.mark.parametrize("max_size", [None, 6, 0.3])
def test_a_length_on_the_device_selects_what_a_host_length_does(calls, max_size):
    inputs = calls.make(query_len=1, first=(0, 9))
    masker = OracleTopP(top_p=0.8, max_size=max_size)
    live = calls.captured(inputs)
    found = build_mask((masker,), live, states={})
    capacity = found.selected.capacity
    assert capacity == (25 if max_size is None else live.budget(masker.max_size).capacity)
    here = calls.effective(build_mask((masker,), inputs, states={}), inputs)
    assert torch.equal(calls.effective(found, live)[..., :20], here)


def test_a_fraction_limits_each_sequence_of_a_batch_by_its_own_keys(calls):
    inputs = calls.make(query_len=1, first=(0, 10))
    previous = Mask.empty(inputs.shape)
    found = calls.effective(OracleTopP(top_p=1.0, max_size=0.3).add_mask(inputs, previous), inputs)
    assert (found > 0).sum(-1).flatten(1).tolist() == [[6] * 4, [3] * 4]
    assert selection.overflow_rows(inputs.request_state) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_keys_are_ranked_and_summed_in_full_precision(calls, dtype):
    inputs = calls.make(dtype=dtype, key_len=64)
    previous = Mask.empty(inputs.shape)
    found = calls.effective(OracleTopP(top_p=0.9).add_mask(inputs, previous), inputs) > 0
    assert torch.equal(found, expected(inputs, previous, 0.9))


@pytest.mark.parametrize("value", [0.0, 1.1, -0.5, True, "most"])
def test_a_bad_share_is_refused(value):
    with pytest.raises(ParameterError, match="top_p"):
        OracleTopP(top_p=value)
