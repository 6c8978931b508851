"""value-aware-top-k against its definition: weight times value norm."""

import attrs
import pytest
import torch

from sah_core import Mask
from sah_core.attention import build_mask, layer_info
from sah_core.testing import CHECKS
from sah_plugins.maskers.value_aware_top_k import ValueAwareTopK

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check, tmp_path):
    check(ValueAwareTopK.example(tmp_path))


def expected(inputs, previous, count):
    """Row by row, with the products themselves in float64."""
    before = previous.to_dense() > 0
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    result = before & keep
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in inputs.shape[:3])).tolist():
        group = h // inputs.group
        logits = inputs.key[b, group].double() @ inputs.query[b, h, q].double() * inputs.scaling
        product = logits.exp() * inputs.value[b, group].double().norm(dim=-1)
        free = (keep[b, h, q] & ~before[b, h, q]).nonzero().flatten().tolist()
        best = sorted(free, key=lambda k: (-float(product[k]), k))
        result[b, h, q, best[:count]] = True
    return result


@pytest.mark.parametrize("kind", ["empty", "ranges", "both", "pages", "dense"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"query_len": 20, "first": (7, 0)},
        {"query_len": 1, "kv_heads": 1},
        {"kv_heads": 4},
        {"keep_heads": 4},
    ],
    ids=str,
)
def test_the_selection_is_that_of_the_definition(calls, kind, case):
    inputs = calls.make(**case)
    previous = calls.previous(kind, inputs)
    masker = ValueAwareTopK(heavy_size=4)
    found = add(masker, inputs, previous)
    assert torch.equal(calls.effective(found, inputs) > 0, expected(inputs, previous, 4))


def add(masker, inputs, previous):
    state = masker.init_state(layer_info(inputs))
    masker.append(state, inputs.key, inputs.value, 0)
    return masker.add_mask(attrs.evolve(inputs, state=state), previous)


def test_a_great_value_outranks_a_greater_logit(calls):
    key = torch.tensor([2.0, 1.0, 0.0]).view(1, 1, 3, 1)
    value = torch.tensor([0.1, 1.0, 9.0]).view(1, 1, 3, 1)
    inputs = calls.make(batch=1, heads=1, kv_heads=1, query_len=1, key_len=3, scaling=1.0)
    inputs = attrs.evolve(inputs, query=torch.ones(1, 1, 1, 1), key=key, value=value)
    mask = build_mask((ValueAwareTopK(heavy_size=1),), inputs)
    assert mask.to_dense().flatten().tolist() == [0, 0, 1]


def test_a_value_of_norm_zero_ranks_last_and_is_still_a_candidate(calls):
    inputs = calls.make(query_len=1)
    value = inputs.value.clone()
    value[:, :, 4] = 0
    inputs = attrs.evolve(inputs, value=value)
    for count, there in ((19, False), (20, True)):
        mask = build_mask((ValueAwareTopK(heavy_size=count),), inputs)
        assert bool(mask.to_dense()[..., 4].any()) == there
        assert (mask.to_dense() > 0).sum(-1).unique().tolist() == [count]


def test_a_length_on_the_device_selects_what_a_host_length_does(calls):
    inputs = calls.make(query_len=1, first=(0, 9))
    masker = ValueAwareTopK(heavy_size=5)
    here = add(masker, inputs, Mask.empty(inputs.shape))
    live = calls.captured(inputs)
    there = add(masker, live, Mask.empty(live.shape))
    assert torch.equal(calls.effective(there, live)[..., :20], calls.effective(here, inputs))
