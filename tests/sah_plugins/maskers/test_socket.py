"""SOCKET against its definition: a softmax over the corners of the hypercube, written as loops."""

import itertools
import math

import attrs
import pytest
import torch

from sah_core import Mask
from sah_core.attention import layer_info
from sah_core.errors import ParameterError
from sah_core.ops import Ops
from sah_core.testing import CHECKS
from sah_plugins.maskers.socket import Socket

pytestmark = pytest.mark.unit

SMALL = {"heavy_size": 7, "lsh_l": 6, "lsh_k": 3}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "masker",
    [Socket(**SMALL), Socket(heavy_size=0.1, lsh_l=5, lsh_k=9, group_reduction="sum")],
    ids=["own choice", "shared choice"],
)
def test_conformance(masker, check):
    check(masker)


def with_state(masker, inputs, capacity=None):
    info = layer_info(inputs)
    state = masker.init_state(attrs.evolve(info, capacity=capacity or info.capacity))
    masker.append(state, inputs.key, inputs.value, 0)
    return attrs.evolve(inputs, state=state)


def score(masker, planes, query, key, value):
    """The softmax over all corners, table by table, at the corner of the key."""
    total = 0.0
    for table in range(masker.lsh_l):
        w = planes[:, table].double()
        side = torch.tanh(w @ query.double()) / math.sqrt(query.shape[0])
        weights = {
            corner: math.exp(
                sum(c * float(s) for c, s in zip(corner, side, strict=True)) / masker.tau
            )
            for corner in itertools.product((-1, 1), repeat=masker.lsh_k)
        }
        own = tuple(1 if float(x) > 0 else -1 for x in w @ key.double())
        total += weights[own] / sum(weights.values())
    return total * float(value.double().norm()) if masker.value_aware else total


def expected(masker, inputs):
    planes, group = inputs.state.planes, inputs.group
    keep = inputs.allowed.to_dense(inputs.key_len)
    keep = keep.expand(inputs.batch, -1, inputs.query_len, -1)
    reduce = {"none": sum, "sum": sum, "mean": sum, "max": max}[masker.group_reduction]
    result = torch.zeros(inputs.shape, dtype=torch.bool)
    for b in range(inputs.batch):
        first = int(inputs.allowed.first.expand(inputs.batch)[b])
        size = masker.heavy_size.resolve(inputs.key_len - first)
        for head in range(inputs.heads):
            members = [head]
            if masker.group_reduction != "none":
                members = [head // group * group + i for i in range(group)]
            for row in range(inputs.query_len):
                scores = {
                    k: reduce(
                        score(
                            masker,
                            planes,
                            inputs.query[b, m, row],
                            inputs.key[b, head // group, k],
                            inputs.value[b, head // group, k],
                        )
                        for m in members
                    )
                    for k in range(inputs.key_len)
                    if keep[b, 0, row, k]
                }
                best = sorted(scores, key=lambda k: (-scores[k], k))[:size]
                result[b, head, row, best] = True
    return result


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize(("first", "aware"), [(None, True), ([0, 5], True), (None, False)])
def test_the_selection_is_that_of_the_definition(calls, reduction, first, aware):
    masker = Socket(**SMALL | {"heavy_size": 0.3}, group_reduction=reduction, value_aware=aware)
    inputs = with_state(masker, calls.make(first=first, key_len=15))
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    assert torch.equal(calls.effective(mask, inputs) > 0, expected(masker, inputs))
    assert mask.heads == (4 if reduction == "none" else 2)


@pytest.mark.parametrize("tau", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("bits", [1, 5])
def test_scores_are_those_of_the_definition(calls, tau, bits):
    masker = Socket(lsh_l=3, lsh_k=bits, tau=tau)
    inputs = with_state(masker, calls.make(key_len=6, dtype=torch.bfloat16))
    scores = masker.scores(inputs)
    for b, head, row, k in itertools.product(range(2), range(4), range(3), range(6)):
        wanted = score(
            masker,
            inputs.state.planes,
            inputs.query[b, head, row],
            inputs.key[b, head // 2, k],
            inputs.value[b, head // 2, k],
        )
        assert float(scores[b, head, row, k]) == pytest.approx(wanted, rel=1e-4)


def test_of_equal_keys_the_one_with_the_larger_value_is_taken(calls):
    masker = Socket(**SMALL | {"heavy_size": 1})
    inputs = calls.make(batch=1, query_len=1, key_len=9)
    value = inputs.value.clone()
    value[:, :, 6] *= 20
    inputs = attrs.evolve(inputs, key=inputs.key[:, :, :1].expand(-1, -1, 9, -1), value=value)
    inputs = with_state(masker, inputs)
    chosen = masker.add_mask(inputs, Mask.empty(inputs.shape)).to_dense()
    assert chosen[..., 6].all()


@pytest.mark.parametrize("kind", ["ranges", "keys", "both", "pages", "dense"])
def test_the_budget_goes_to_keys_that_are_not_selected_yet(calls, kind):
    masker = Socket(**SMALL | {"heavy_size": 3})
    inputs = with_state(masker, calls.make())
    previous = calls.previous(kind, inputs)
    before = calls.effective(previous, inputs) > 0
    after = calls.effective(masker.add_mask(inputs, previous), inputs) > 0
    assert (after >= before).all()
    assert ((after.sum(-1) - before.sum(-1)) == 3).all()


def test_only_new_keys_are_hashed(calls):
    seen = []

    class Watched(Ops):
        def lsh_codes(self, vectors, planes, center=None):
            seen.append(vectors.shape[2])
            return super().lsh_codes(vectors, planes, center)

    masker = Socket(**SMALL)
    inputs = calls.make(key_len=20, query_len=1)
    state = masker.init_state(attrs.evolve(layer_info(inputs), ops=Watched(), capacity=4))
    for begin, end in ((0, 18), (18, 19), (19, 20)):
        part = slice(begin, end)
        masker.append(state, inputs.key[:, :, part], inputs.value[:, :, part], begin)
        call = attrs.evolve(inputs, state=state, ops=Watched())
        masker.add_mask(call, Mask.empty(inputs.shape)) if end == 20 else None
    assert seen == [18, 1, 1]
    whole = with_state(masker, inputs).state
    assert torch.equal(state.codes.first(20), whole.codes.first(20))
    assert torch.equal(state.norms.first(20), whole.norms.first(20))


def test_a_length_on_the_device_selects_what_a_host_length_does(calls):
    masker = Socket(**SMALL | {"heavy_size": 0.3})
    inputs = with_state(masker, calls.make(query_len=1, first=[0, 6]))
    wanted = calls.effective(masker.add_mask(inputs, Mask.empty(inputs.shape)), inputs)
    captured = calls.captured(inputs)
    state = masker.init_state(layer_info(captured))
    masker.append(state, inputs.key[:, :, :19], inputs.value[:, :, :19], 0)
    last, at = slice(19, 20), torch.tensor([19], dtype=torch.int32)
    masker.append(state, inputs.key[:, :, last], inputs.value[:, :, last], at)
    captured = attrs.evolve(captured, state=state)
    mask = masker.add_mask(captured, Mask.empty(captured.shape))
    assert torch.equal(calls.effective(mask, captured)[..., :20], wanted)


def test_bytes_read_are_the_codes_and_norms(calls):
    inputs = calls.make(batch=2, kv_heads=2, key_len=20)
    assert Socket(lsh_l=60, lsh_k=10).bytes_read(inputs) == 2 * 2 * 20 * 124
    assert Socket(lsh_l=60, lsh_k=8).bytes_read(inputs) == 2 * 2 * 20 * 64
    assert Socket(lsh_l=60, lsh_k=8, value_aware=False).bytes_read(inputs) == 2 * 2 * 20 * 60


@pytest.mark.parametrize("values", [{"lsh_k": 17}, {"tau": 0.0}, {"lsh_l": 0}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ParameterError, match=next(iter(values))):
        Socket(**values)


def test_it_declares_that_it_reads_values():
    assert not Socket.capabilities.keys_only
