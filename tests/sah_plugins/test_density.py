"""Density: selected over allowed keys, each key once, against a count of places."""

import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask, Pipeline, registry
from sah_core.attention import Session
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.sink import Sink
from sah_plugins.metrics.density import Density

pytestmark = pytest.mark.unit


def call(query_len=3, key_len=12, batch=2, heads=4, first=None, allowed=None):
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    key = torch.zeros(batch, 2, key_len, 4)
    return Inputs(
        query=torch.zeros(batch, heads, query_len, 4),
        key=key,
        value=key,
        allowed=allowed or Allowed.causal(query_len, key_len, first=first),
        scaling=1.0,
        key_len=key_len,
    )


def places(inputs, mask):
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    return int(((mask.to_dense() > 0) & keep).sum()), int(keep.sum())


def masks(inputs):
    zero = torch.zeros(1, 1, 1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    shape = (inputs.batch, 2, inputs.query_len, 5)
    indices = torch.rand(*shape[:3], inputs.capacity, generator=generator).argsort(-1)[..., :5]
    chance = torch.rand(shape, generator=generator) * 0.9 + 0.1
    dense = torch.rand(inputs.shape, generator=generator)
    ranges = Mask.from_ranges(inputs.shape, [KeyRange(zero, zero, 4, -2, 4)])
    weighted = Mask.from_indices(inputs.shape, indices.int(), probability=chance)
    return [
        Mask.empty(inputs.shape),
        Mask.full(inputs.shape),
        ranges,
        weighted,
        ranges | weighted,
        Mask.from_dense(dense * (dense < 0.4)),
    ]


KEEP = torch.rand(2, 1, 3, 12, generator=torch.Generator().manual_seed(2)) < 0.5
CALLS = {
    "question": {},
    "one token": {"query_len": 1},
    "left padding": {"first": (0, 7)},
    "padding rows": {"query_len": 12, "first": (9, 0)},
    "foreign mask": {"allowed": Allowed.from_dense(KEEP)},
    "shared limits": {"allowed": Allowed.everything(12)},
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_every_selected_key_that_may_be_attended_counts_once(case):
    inputs = call(**case)
    whole = Density()
    total = [0, 0]
    for mask in masks(inputs):
        one = Density()
        one.sah_mask_built(inputs, mask)
        whole.sah_mask_built(inputs, mask)
        selected, allowed = places(inputs, mask)
        total = [total[0] + selected, total[1] + allowed]
        keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
        per_row = ((mask.to_dense() > 0) & keep).sum(-1) / keep.sum(-1).clamp(min=1)
        assert one.result() == {
            "density": selected / allowed,
            "max_density": float(per_row.max()),
            "selected": selected,
            "allowed": allowed,
        }
    assert whole.result()["selected"] == total[0]
    assert whole.result()["allowed"] == total[1]
    assert whole.result()["density"] == pytest.approx(total[0] / total[1])


def test_layers_that_share_limits_and_mask_count_each():
    inputs = call()
    mask = masks(inputs)[4]
    density = Density()
    for _ in range(3):
        density.sah_mask_built(inputs, mask)
    selected, allowed = places(inputs, mask)
    assert density.result()["selected"] == 3 * selected
    assert density.result()["allowed"] == 3 * allowed


def test_nothing_sparse_is_density_one_and_reset_starts_again():
    density = Density()
    nothing = {"density": 1.0, "max_density": 1.0, "selected": 0, "allowed": 0}
    assert density.result() == nothing
    inputs = call()
    density.sah_mask_built(inputs, Mask.empty(inputs.shape))
    assert density.result()["density"] == 0.0
    density.reset()
    assert density.result() == nothing


def test_results_combine_by_their_sums():
    results = [
        {"density": 0.5, "max_density": 0.6, "selected": 1, "allowed": 2},
        {"density": 0.1, "max_density": 0.9, "selected": 10, "allowed": 100},
    ]
    combined = {"density": 11 / 102, "max_density": 0.9, "selected": 11, "allowed": 102}
    assert Density.combine(results) == combined
    assert Density.combine([])["density"] == 1.0


def test_of_a_run_dense_layers_count_as_one_and_dense_phases_not_at_all():
    steps = (Sink(sink_size=2), Local(window_size=3), OracleTopK(heavy_size=2))
    density = Density()
    pipeline = Pipeline.of(*steps, dense_layers=[1])
    session = Session(pipeline, ["full_attention"] * 3, observers=[density])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 20, 8, generator=generator)
    key = torch.randn(1, 2, 20, 8, generator=generator)
    selected = allowed = 0
    for begin, end, phase in ((0, 12, "prefill"), (12, 17, "question"), (17, 18, "decode")):
        session.phase = phase
        limits = Allowed.causal(end - begin, end)
        for layer in range(3):
            session.attend(
                layer, query[:, :, begin:end], key[:, :, :end], key[:, :, :end], limits, 0.3
            )
            for row in range(begin, end) if phase != "prefill" else ():
                allowed += 4 * (row + 1)
                selected += 4 * (row + 1 if layer == 1 else 2 + 3 + 2)
    assert density.result() == {
        "density": selected / allowed,
        "max_density": 1.0,
        "selected": selected,
        "allowed": allowed,
    }


def test_it_is_found_by_name():
    assert registry.metrics["density"] is Density
