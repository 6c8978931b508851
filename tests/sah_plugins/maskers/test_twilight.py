"""twilight against its definition: the fewest selected keys that hold the estimated mass."""

import attrs
import pytest
import torch

from sah_core import Mask, ParameterError, Pipeline, selection
from sah_core.attention import build_mask, layer_info
from sah_core.ops import round_to_bits
from sah_core.testing import CHECKS
from sah_plugins.maskers.oracle_top_p import OracleTopP
from sah_plugins.maskers.twilight import Twilight

pytestmark = pytest.mark.unit

KINDS = ("ranges", "keys", "both", "pages", "dense", "full")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", [{}, {"label_bits": 16}, {"keep_ranges": True}], ids=str)
def test_conformance(check, options):
    check(Twilight(top_p=0.6, **options))


def before_of(calls, kind, inputs):
    return Mask.full(inputs.shape) if kind == "full" else calls.previous(kind, inputs)


def add(masker, inputs, previous, length=None):
    state = masker.init_state(layer_info(inputs))
    if state is not None:
        masker.append(state, inputs.key[:, :, :length], inputs.value[:, :, :length], 0)
    return masker.add_mask(attrs.evolve(inputs, state=state), previous)


def expected(masker, inputs, previous):
    """Row by row: the probabilities that stay."""
    before = previous.to_dense() * inputs.allowed.to_dense(inputs.capacity)
    key = inputs.key if masker.label_bits == 16 else round_to_bits(inputs.key, masker.label_bits)
    logits = inputs.ops.logits(inputs.query, key, inputs.scaling, inputs.softcap)
    ranges = Mask.from_ranges(inputs.shape, previous.ranges if masker.keep_ranges else ())
    spared = before * ranges.to_dense()
    result = spared.clone()
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in inputs.shape[:3])).tolist():
        chance = before[b, h, q].double()
        there = ((chance > 0) & (spared[b, h, q] == 0)).nonzero().flatten().tolist()
        mass = {k: float((logits[b, h, q, k].double()).exp() / chance[k]) for k in there}
        whole, reached = sum(mass.values()), 0.0
        for k in sorted(there, key=lambda k: (-mass[k], k)):
            if reached >= masker.top_p * whole:
                break
            reached += mass[k]
            result[b, h, q, k] = chance[k]
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_ranges", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"query_len": 1},
        {"query_len": 1, "kv_heads": 4, "first": (0, 11)},
        {"query_len": 20, "first": (7, 0)},
        {"keep_heads": 4},
        {"query_len": 1, "keep_heads": 1, "softcap": 0.5},
    ],
    ids=str,
)
def test_what_stays_is_that_of_the_definition(calls, kind, keep_ranges, bits, case):
    inputs = calls.make(**case)
    previous = before_of(calls, kind, inputs)
    masker = Twilight(top_p=0.7, label_bits=bits, keep_ranges=keep_ranges)
    found = calls.effective(add(masker, inputs, previous), inputs)
    torch.testing.assert_close(found, expected(masker, inputs, previous))


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1.0])
def test_a_row_keeps_its_best_candidate_and_all_of_them_at_1(calls, top_p):
    inputs = calls.make(query_len=5)
    previous = calls.previous("both", inputs)
    before = calls.effective(previous, inputs)
    after = calls.effective(add(Twilight(top_p=top_p), inputs, previous), inputs)
    assert (after > 0).any(-1).all()
    if top_p == 1:
        assert torch.equal(after, before)
    if top_p == 1e-6:
        assert ((after > 0).sum(-1) == 1).all()


def test_everything_pruned_by_the_true_keys_is_the_oracle(calls):
    inputs = calls.make(query_len=4, first=(0, 5))
    pruned = add(Twilight(top_p=0.8, label_bits=16), inputs, Mask.full(inputs.shape))
    oracle = OracleTopP(top_p=0.8).add_mask(inputs, Mask.empty(inputs.shape))
    assert torch.equal(calls.effective(pruned, inputs), calls.effective(oracle, inputs))


def test_the_window_of_everything_is_the_full_selector(calls):
    inputs = calls.make(query_len=2, key_len=60)
    steps = Pipeline.parse("local(100%) | twilight(0.85)").steps
    found = calls.effective(build_mask(steps, inputs), inputs)
    masker = Twilight()
    assert torch.equal(found, expected(masker, inputs, Mask.full(inputs.shape)))


@pytest.mark.parametrize("text", ["local(100%)", "local(4)", "local(4) | oracle-top-k(3)"])
@pytest.mark.parametrize("bits", [4, 16])
def test_rows_in_which_a_sampler_found_nothing_to_draw_are_pruned_like_others(calls, text, bits):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = build_mask(Pipeline.parse(f"{text} | random-sampling(0.3)").steps, inputs)
    assert (previous.selected.probability == 0).any()
    masker = Twilight(top_p=0.7, label_bits=bits)
    found = calls.effective(add(masker, inputs, previous), inputs)
    torch.testing.assert_close(found, expected(masker, inputs, previous))


def test_keys_are_kept_in_half_a_byte_per_channel(calls):
    inputs = calls.make(key_len=64, head_dim=32)
    state = Twilight().init_state(layer_info(inputs))
    assert state.codes.data.nbytes == 2 * 2 * 64 * 32 // 2
    assert state.affine.data.nbytes == 2 * 2 * 64 * 2 * 4


def test_equal_estimates_go_to_the_lower_index_whatever_the_order_of_the_selection(calls):
    inputs = calls.make(query_len=1)
    inputs = attrs.evolve(inputs, query=torch.zeros_like(inputs.query))
    keys = torch.tensor([17, 3, 9, 12]).view(1, 1, 1, 4)
    found = add(Twilight(top_p=0.5), inputs, Mask.from_indices(inputs.shape, keys)).to_dense()
    assert found.nonzero()[:, 3].unique().tolist() == [3, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_rows_keep_what_all_rows_do(calls, kind, monkeypatch):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = before_of(calls, kind, inputs)
    whole = add(Twilight(top_p=0.7), inputs, previous).to_dense()
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 48 * 2 * 4 * 20)
    assert torch.equal(add(Twilight(top_p=0.7), inputs, previous).to_dense(), whole)


def test_pieces_without_candidates_leave_the_others_right(calls, monkeypatch):
    inputs = calls.make(query_len=6)
    dense = calls.previous("dense", inputs).to_dense()
    dense[:, :, :3] = 0
    previous = Mask.from_dense(dense)
    monkeypatch.setattr(selection, "SCORE_BYTES", 1)
    found = calls.effective(add(Twilight(top_p=0.7), inputs, previous), inputs)
    torch.testing.assert_close(found, expected(Twilight(top_p=0.7), inputs, previous))


@pytest.mark.parametrize("bits", [4, 16])
def test_a_length_on_the_device_keeps_what_a_host_length_does(calls, bits):
    inputs = calls.make(query_len=1, first=(0, 9))
    live = calls.captured(inputs)
    masker = Twilight(top_p=0.7, label_bits=bits)
    here = add(masker, inputs, calls.previous("both", inputs))
    before = calls.previous("both", inputs)
    before = attrs.evolve(before, shape=live.shape)
    there = add(masker, live, before)
    assert torch.equal(calls.effective(there, live)[..., :20], calls.effective(here, inputs))


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.0), ("label_bits", 3)])
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        Twilight(**{name: value})
