"""Sink, local, causal and oracle-top-k against their definitions."""

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask, ParameterError, Size, registry, selection
from sah_plugins.maskers.causal import Causal
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.sink import Sink

pytestmark = pytest.mark.unit


def call(
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    query_len=3,
    key_len=20,
    first=None,
    window=None,
    captured=False,
    keep_heads=0,
    **more,
):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, heads, query_len, 8, generator=generator)
    room = key_len + 5 if captured else key_len
    key = torch.randn(batch, kv_heads, room, 8, generator=generator)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    allowed = Allowed.causal(query_len, key_len, first=first, window=window)
    if keep_heads:
        keep = torch.rand(batch, keep_heads, query_len, key_len, generator=generator) < 0.5
        allowed = Allowed.from_dense(keep & allowed.to_dense(key_len))
    return Inputs(
        query=query,
        key=key,
        value=key,
        allowed=allowed,
        scaling=0.4,
        key_len=None if captured else key_len,
        length=torch.tensor([key_len], dtype=torch.int32) if captured else None,
        **more,
    )


CALLS = {
    "question": {},
    "one token": {"query_len": 1},
    "prefill": {"query_len": 20},
    "few keys": {"query_len": 2, "key_len": 3},
    "one key": {"query_len": 1, "key_len": 1},
    "left padding": {"first": (0, 11)},
    "nearly all padding": {"first": (19, 4), "query_len": 5},
    "padded prefill": {"query_len": 20, "first": (7, 0)},
    "window": {"window": 6},
    "as many kv heads": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1, "query_len": 1},
    "graph capture": {"captured": True, "query_len": 1},
    "padding under graph capture": {"captured": True, "query_len": 1, "first": (0, 9)},
}
SIZES = [0, 1, 4, 500, 0.05, 0.2, 0.29, 1.0]


def firsts(inputs):
    return inputs.allowed.first.expand(inputs.batch).tolist()


def keep_of(inputs):
    return inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)


def rows(inputs):
    """Sequence, head, row, the position of the row, and the keys of its sequence."""
    length = int(inputs.length)
    for b, first in enumerate(firsts(inputs)):
        for h in range(inputs.heads):
            for q in range(inputs.query_len):
                yield b, h, q, length - inputs.query_len + q, range(first, length)


def chosen(masker, inputs, previous=None):
    """What is selected and may be attended."""
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape) if previous is None else previous)
    return (mask.to_dense() > 0) & keep_of(inputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_sink_selects_the_first_real_keys(case, size):
    inputs = call(**case)
    expected = torch.zeros(inputs.shape, dtype=torch.bool)
    for b, h, q, _, real in rows(inputs):
        count = Size.parse(size).resolve(len(real))
        expected[b, h, q, list(real[:count])] = True
    assert torch.equal(chosen(Sink(sink_size=size), inputs), expected & keep_of(inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_local_selects_the_last_keys_up_to_the_query(case, size):
    inputs = call(**case)
    expected = torch.zeros(inputs.shape, dtype=torch.bool)
    for b, h, q, position, real in rows(inputs):
        count = Size.parse(size).resolve(len(real))
        expected[b, h, q, [k for k in real if position - count < k <= position]] = True
    assert torch.equal(chosen(Local(window_size=size), inputs), expected & keep_of(inputs))


def given(kind, inputs):
    """What an earlier step may have selected."""
    generator = torch.Generator().manual_seed(9)
    if kind == "empty":
        return Mask.empty(inputs.shape)
    if kind == "sink and window":
        return Local(window_size=3).add_mask(
            inputs, Sink(sink_size=2).add_mask(inputs, given("empty", inputs))
        )
    if kind == "indices":
        keys = torch.randint(0, inputs.capacity, (1, inputs.kv_heads, 1, 1), generator=generator)
        return Mask.from_indices(inputs.shape, keys.int())
    if kind == "pages":
        mask = Mask.from_indices(
            inputs.shape,
            torch.zeros(1, 1, 1, 1).int(),
            page_size=4,
            origin=inputs.allowed.first,
        )
        return mask | given("sink and window", inputs)
    dense = torch.rand(inputs.shape, generator=generator)
    return Mask.from_dense(dense * (dense < 0.3))


KINDS = ("empty", "sink and window", "indices", "pages", "dense")


def top(inputs, previous, size):
    """Row by row: the best keys that may be attended and are not selected yet."""
    expected = torch.zeros(inputs.shape, dtype=torch.bool)
    before, keep = previous.to_dense() > 0, keep_of(inputs)
    logits = inputs.ops.logits(inputs.query, inputs.key, inputs.scaling, inputs.softcap)
    for b, h, q, _, real in rows(inputs):
        count = Size.parse(size).resolve(len(real))
        row = logits[b, h, q].tolist()
        free = [k for k in real if keep[b, h, q, k] and not before[b, h, q, k]]
        best = sorted(free, key=lambda k: (-row[k], k))[:count]
        expected[b, h, q, best] = True
    return (expected | before) & keep


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", ["empty", "sink and window"])
def test_oracle_selects_the_keys_of_the_highest_logits_that_are_not_selected_yet(kind, case, size):
    inputs = call(**case)
    previous = given(kind, inputs)
    found = chosen(OracleTopK(heavy_size=size), inputs, previous)
    assert torch.equal(found, top(inputs, previous, size))


@pytest.mark.parametrize("case", ["question", "left padding", "padded prefill", "one kv head"])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_comes_on_top_of_any_form_of_mask(kind, case):
    inputs = call(**CALLS[case])
    previous = given(kind, inputs)
    for size in (3, 0.3):
        found = chosen(OracleTopK(heavy_size=size), inputs, previous)
        assert torch.equal(found, top(inputs, previous, size))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_spends_nothing_on_keys_that_a_foreign_mask_hides(kind, heads):
    inputs = call(keep_heads=heads, query_len=4)
    previous = given(kind, inputs)
    assert torch.equal(chosen(OracleTopK(heavy_size=3), inputs, previous), top(inputs, previous, 3))


def test_oracle_gives_equal_scores_to_the_lower_index():
    inputs = call(query_len=4)
    inputs = attrs.evolve(inputs, query=torch.zeros_like(inputs.query))
    found = chosen(OracleTopK(heavy_size=3), inputs)
    assert found.nonzero()[:, 3].unique().tolist() == [0, 1, 2]


def test_oracle_ranks_by_the_capped_logits():
    inputs = call(softcap=0.01)
    assert torch.equal(
        chosen(OracleTopK(heavy_size=3), inputs), top(inputs, Mask.empty(inputs.shape), 3)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["padded prefill", "window"])
def test_oracle_in_pieces_of_rows_is_oracle_at_once(case, kind, monkeypatch):
    inputs = call(**CALLS[case])
    previous = given(kind, inputs)
    whole = chosen(OracleTopK(heavy_size=0.2), inputs, previous)
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 4 * 2 * 4 * 20)
    assert torch.equal(chosen(OracleTopK(heavy_size=0.2), inputs, previous), whole)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_causal_keeps_what_may_be_attended_with_its_probability(kind, case):
    inputs = call(**case)
    previous = Mask.full(inputs.shape) if kind == "full" else given(kind, inputs)
    mask = Causal().add_mask(inputs, previous)
    assert torch.equal(mask.to_dense(), previous.to_dense() * keep_of(inputs))


@pytest.mark.parametrize(
    "masker", [Sink(sink_size=3), Local(window_size=3), OracleTopK(heavy_size=3)], ids=str
)
def test_earlier_selections_keep_their_probability(masker):
    inputs = call(first=(0, 5))
    previous = given("dense", inputs)
    before = previous.to_dense()
    mask = masker.add_mask(inputs, previous)
    assert torch.equal(previous.to_dense(), before)
    dense = mask.to_dense()
    assert (dense[before > 0] >= before[before > 0] - 1e-6).all()
    assert torch.equal(
        masker.add_mask(inputs, Mask.full(inputs.shape)).to_dense().unique(), torch.ones(1)
    )


@pytest.mark.parametrize("name", ["sink", "local", "oracle-top-k", "causal"])
def test_maskers_are_found_by_name(name):
    assert registry.maskers[name].name == name


@pytest.mark.parametrize(
    ("cls", "parameter"), [(Sink, "sink_size"), (Local, "window_size"), (OracleTopK, "heavy_size")]
)
@pytest.mark.parametrize("value", [-1, 0.0, 1.5, True, "many", None])
def test_a_bad_size_is_an_error_that_names_it(cls, parameter, value):
    with pytest.raises(ParameterError) as caught:
        cls(**{parameter: value})
    assert (caught.value.owner, caught.value.parameter) == (cls.name, parameter)


def test_ranges_share_the_tensors_of_the_call():
    inputs = call(query_len=1)
    mask = Sink(sink_size=3).add_mask(inputs, Mask.empty(inputs.shape))
    [part] = mask.ranges
    assert isinstance(part, KeyRange)
    assert part.start_base.data_ptr() == inputs.allowed.first.data_ptr()
