"""Quest against its definition, written as loops, and against the golden cases."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sah_core import Allowed, Inputs, Mask, Size
from sah_core.errors import ParameterError
from sah_core.state import LayerInfo
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.quest import Quest
from sah_plugins.maskers.sink import Sink

pytestmark = pytest.mark.unit

HERE = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "maskers"
STEPS = {"sink": Sink, "local": Local, "quest": Quest}


def layer_info(key, capacity=None, first=None, heads=None):
    batch, kv_heads, key_len, head_dim = key.shape
    return LayerInfo(
        index=0,
        count=1,
        batch=batch,
        heads=heads or kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        capacity=key_len if capacity is None else capacity,
        first=first,
        dtype=key.dtype,
        device=key.device,
    )


def state_of(masker, key, *, chunks=None, capacity=None, first=None):
    state = masker.init_state(layer_info(key, capacity, first))
    start = 0
    for size in chunks or [key.shape[2]]:
        part = key[:, :, start : start + size]
        masker.append(state, part, part, start)
        start += size
    assert start == key.shape[2]
    return state


def case(batch=1, heads=4, kv_heads=2, query_len=1, key_len=61, head_dim=8, first=None, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(batch, heads, query_len, head_dim)
    key = torch.randn(batch, kv_heads, key_len, head_dim)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    allowed = Allowed.causal(query_len, key_len, first=first)
    return query, key, allowed, first


def inputs_of(query, key, allowed, state, **more):
    return Inputs(
        query=query,
        key=key,
        value=key,
        allowed=allowed,
        scaling=query.shape[-1] ** -0.5,
        key_len=key.shape[2],
        state=state,
        **more,
    )


def chosen(masker, query, key, allowed, state, **more):
    inputs = inputs_of(query, key, allowed, state, **more)
    return (masker.add_mask(inputs, Mask.empty(inputs.shape)) & allowed).to_dense() > 0


def page_score(masker, query, keys):
    """The bound of one page for one query vector, channel by channel."""
    low, high = keys.amin(0), keys.amax(0)
    if masker.label_bits < 16:
        low, high = (rounded(v, masker.label_bits) for v in (low, high))
    return sum(max(q * a, q * b) for q, a, b in zip(query, low, high, strict=True))


def rounded(vector, bits):
    low, high = vector.min(), vector.max()
    step = (high - low) / (2**bits - 1)
    return torch.round((vector - low) / step) * step + low


def expected(masker, query, key, allowed):
    batch, heads, query_len, _ = query.shape
    kv_heads, key_len = key.shape[1:3]
    group, size = heads // kv_heads, masker.page_size
    keep = allowed.to_dense(key_len).expand(batch, 1, query_len, key_len)
    firsts = allowed.first.expand(batch).tolist()
    result = torch.zeros(batch, heads, query_len, key_len, dtype=torch.bool)
    query, key = query.double(), key.double()
    for b, head, row in torch.cartesian_prod(
        torch.arange(batch), torch.arange(heads), torch.arange(query_len)
    ).tolist():
        first = firsts[b]
        members = [head]
        if masker.group_reduction != "none":
            members = [head // group * group + i for i in range(group)]
        scores = {}
        for begin in range(first, key_len, size):
            if not keep[b, 0, row, begin : begin + size].any():
                continue
            page = key[b, head // group, begin : begin + size]
            bounds = [float(page_score(masker, query[b, m, row], page)) for m in members]
            reduce = {"max": max, "sum": sum, "mean": sum, "none": sum}[masker.group_reduction]
            scores[begin] = reduce(bounds)
        count = max(3, masker.heavy_size.resolve(key_len - first) // size)
        for begin in sorted(scores, key=lambda s: (-scores[s], s))[:count]:
            result[b, head, row, begin : begin + size] = keep[b, 0, row, begin : begin + size]
    return result


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("query_len", [1, 7])
def test_the_selection_is_that_of_the_definition(reduction, query_len):
    masker = Quest(heavy_size=0.3, page_size=4, group_reduction=reduction)
    query, key, allowed, _ = case(query_len=query_len)
    got = chosen(masker, query, key, allowed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, allowed))


@pytest.mark.parametrize("size", [1, 24, "5%", 1.0])
def test_a_budget_is_rounded_down_to_pages_and_never_below_three(size):
    masker = Quest(heavy_size=size, page_size=4)
    query, key, allowed, _ = case(heads=2)
    got = chosen(masker, query, key, allowed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, allowed))
    assert got.sum(-1).min() >= min(61, 2 * 4 + 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bounds_are_rounded_to_the_label_bits(bits):
    masker = Quest(heavy_size=0.3, page_size=4, label_bits=bits)
    query, key, allowed, _ = case(query_len=3, seed=bits)
    got = chosen(masker, query, key, allowed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, allowed))


def test_pages_and_fractions_count_from_the_first_real_key():
    masker = Quest(heavy_size=0.3, page_size=4, group_reduction="sum")
    query, key, allowed, first = case(batch=3, query_len=2, first=[0, 9, 30])
    got = chosen(masker, query, key, allowed, state_of(masker, key, first=first))
    assert torch.equal(got, expected(masker, query, key, allowed))
    for b, start in enumerate(first.tolist()):
        alone = key[b : b + 1, :, start:]
        limits = Allowed.causal(2, alone.shape[2])
        single = chosen(masker, query[b : b + 1], alone, limits, state_of(masker, alone))
        assert torch.equal(got[b : b + 1, ..., start:], single)


def test_prefill_rows_choose_among_the_pages_that_they_may_attend():
    masker = Quest(heavy_size=8, page_size=4)
    query, key, allowed, _ = case(query_len=21, key_len=21)
    got = chosen(masker, query, key, allowed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, allowed))
    assert got[:, :, 0, 0].all()


def test_a_sliding_window_of_the_model_limits_the_pages():
    masker = Quest(heavy_size=12, page_size=4)
    query, key, _, _ = case(query_len=2)
    allowed = Allowed.causal(2, 61, window=18)
    got = chosen(masker, query, key, allowed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, allowed))


def test_a_foreign_mask_hides_pages_without_an_allowed_key():
    masker = Quest(heavy_size=12, page_size=4, group_reduction="max")
    query, key, allowed, _ = case(query_len=2)
    keep = allowed.to_dense(61).clone()
    keep[..., 8:30] = False
    holed = Allowed.from_dense(keep)
    assert holed.keep is not None
    got = chosen(masker, query, key, holed, state_of(masker, key))
    assert torch.equal(got, expected(masker, query, key, holed))


@pytest.mark.parametrize("chunks", [[61], [1] * 61, [16, 16, 29], [3, 40, 1, 1, 16]])
@pytest.mark.parametrize("first", [None, [0, 5], [17, 33]])
@pytest.mark.parametrize("device_start", [False, True])
def test_appending_in_any_chunking_gives_the_bounds_of_one_pass(chunks, first, device_start):
    masker = Quest(page_size=8)
    _, key, _, first = case(batch=2, first=first)
    state = masker.init_state(layer_info(key, first=first))
    start = 0
    for size in chunks:
        part = key[:, :, start : start + size]
        at = torch.tensor([start], dtype=torch.int32) if device_start else start
        masker.append(state, part, part, at)
        start += size
    offsets = [0, 0] if first is None else first.tolist()
    for b, offset in enumerate(offsets):
        for page, begin in enumerate(range(offset, 61, 8)):
            keys = key[b, :, begin : begin + 8]
            assert torch.equal(state.low[b, :, page], keys.amin(1))
            assert torch.equal(state.high[b, :, page], keys.amax(1))


def test_buffers_grow_when_the_context_outgrows_the_capacity():
    masker = Quest(page_size=4)
    _, key, _, _ = case()
    state = state_of(masker, key, chunks=[10, 30, 21], capacity=8)
    whole = state_of(masker, key)
    assert torch.equal(state.low[:, :, :16], whole.low[:, :, :16])
    assert torch.equal(state.high[:, :, :16], whole.high[:, :, :16])


def test_a_restored_snapshot_behaves_as_if_nothing_had_come_after_it():
    masker = Quest(heavy_size=0.4, page_size=8)
    query, key, allowed, first = case(batch=2, first=[0, 3])
    context = key[:, :, :43]
    state = masker.init_state(layer_info(key, first=first))
    masker.append(state, context, context, 0)
    token = state.snapshot()
    for _ in range(2):
        other = torch.randn(2, 2, 11, 8) * 9
        masker.append(state, other, other, 43)
        state.restore(token)
    masker.append(state, key[:, :, 43:], key[:, :, 43:], 43)
    got = chosen(masker, query, key, allowed, state)
    assert torch.equal(got, expected(masker, query, key, allowed))


def test_a_snapshot_taken_right_after_a_restore_is_that_of_the_same_place():
    masker = Quest(heavy_size=0.4, page_size=8)
    query, key, allowed, _ = case()
    context = key[:, :, :43]
    state = masker.init_state(layer_info(key))
    masker.append(state, context, context, 0)
    token = state.snapshot()
    for start in (43, 43):
        other = torch.randn(key.shape[0], 2, 11, 8) * 9
        masker.append(state, other, other, start)
        state.restore(token)
        token = state.snapshot()
    masker.append(state, key[:, :, 43:], key[:, :, 43:], 43)
    got = chosen(masker, query, key, allowed, state)
    assert torch.equal(got, expected(masker, query, key, allowed))


def test_pages_that_earlier_steps_selected_are_ranked_too():
    masker = Quest(heavy_size=8, page_size=4)
    query, key, allowed, _ = case()
    inputs = inputs_of(query, key, allowed, state_of(masker, key))
    sink = Sink(sink_size=8).add_mask(inputs, Mask.empty(inputs.shape))
    both = (masker.add_mask(inputs, sink) & allowed).to_dense() > 0
    alone = expected(masker, query, key, allowed)
    alone[..., :8] = True
    assert torch.equal(both, alone)


def test_a_full_mask_stays_full():
    masker = Quest()
    query, key, allowed, _ = case()
    inputs = inputs_of(query, key, allowed, state_of(masker, key))
    full = Mask.full(inputs.shape)
    assert masker.add_mask(inputs, full) is full


def test_a_length_on_the_device_selects_what_a_host_length_does():
    masker = Quest(heavy_size=0.3, page_size=4)
    query, key, _, _ = case(key_len=61)
    buffer = torch.randn(1, 2, 96, 8)
    buffer[:, :, :61] = key
    state = state_of(masker, key, capacity=96)
    allowed = Allowed.causal(1, 61)
    inputs = Inputs(
        query=query,
        key=buffer,
        value=buffer,
        allowed=allowed,
        scaling=1.0,
        length=torch.tensor([61], dtype=torch.int32),
        state=state,
    )
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape)) & allowed
    got = mask.to_dense()[..., :61] > 0
    assert torch.equal(got, expected(masker, query, key, allowed))


def test_a_shared_selection_is_stored_once_per_kv_head():
    masker = Quest(group_reduction="mean")
    query, key, allowed, _ = case()
    inputs = inputs_of(query, key, allowed, state_of(masker, key))
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    assert mask.heads == 2
    assert mask.selected is not None
    assert mask.selected.page_size == 16


def test_an_unknown_group_reduction_is_refused():
    with pytest.raises(ParameterError, match="group_reduction"):
        Quest(group_reduction="median")


def test_sizes_are_declared():
    assert Quest().heavy_size == Size(fraction=0.05)


def golden_files():
    files = {path.name: path for folder in (SHARED, HERE) for path in folder.glob("quest*")}
    return [files[name] for name in sorted(files)]


@pytest.mark.skipif(not golden_files(), reason="no golden cases of quest are at hand")
@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_golden_cases_are_reproduced(path):
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    query, key, keep = tensors["query"], tensors["key"], tensors["keep"]
    allowed = Allowed.from_dense(keep)
    mask = Mask.empty((*query.shape[:3], key.shape[2]))
    for step in json.loads(facts["pipeline"]):
        masker = STEPS[step["masker"]](**step["params"])
        state = None
        if masker.is_stateful():
            state = state_of(masker, key, first=allowed.first)
        mask = masker.add_mask(inputs_of(query, key, allowed, state), mask)
    assert torch.equal((mask & allowed).to_dense(), tensors["probability"].float())
