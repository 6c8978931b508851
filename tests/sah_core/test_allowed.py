"""Who may be attended, against a loop over positions."""

import pytest
import torch

from sah_core import Allowed

pytestmark = pytest.mark.unit


def definition(query_len, key_len, *, first=(0,), window=None, offset=None):
    """Row by row: causal, at an offset, after the padding, inside the window."""
    offset = key_len - query_len if offset is None else offset
    keep = torch.zeros(len(first), 1, query_len, key_len, dtype=torch.bool)
    for sequence, padding in enumerate(first):
        for row in range(query_len):
            position = offset + row
            for key in range(key_len):
                seen = padding <= key <= position
                keep[sequence, 0, row, key] = seen and (window is None or key > position - window)
    return keep


CASES = {
    "prefill": {"query_len": 6, "key_len": 6},
    "chunk on a cache": {"query_len": 3, "key_len": 9},
    "one token": {"query_len": 1, "key_len": 9},
    "window": {"query_len": 6, "key_len": 9, "window": 4},
    "window of one": {"query_len": 3, "key_len": 5, "window": 1},
    "window past the start": {"query_len": 3, "key_len": 5, "window": 50},
    "left padding": {"query_len": 6, "key_len": 6, "first": (0, 4)},
    "all but the last padded": {"query_len": 2, "key_len": 6, "first": (5, 1)},
    "left padding and window": {"query_len": 4, "key_len": 8, "first": (0, 3), "window": 3},
    "keys to come": {"query_len": 2, "key_len": 9, "offset": 4},
}


def make(query_len, key_len, *, first=None, **options):
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    return Allowed.causal(query_len, key_len, first=first, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_causal_limits_are_the_definition(case):
    expected = definition(**case)
    allowed = make(**case)
    shape = expected.shape
    assert torch.equal(allowed.to_dense(case["key_len"]).expand(shape), expected)
    assert torch.equal(allowed.counts.expand(shape[:3]), expected.sum(-1))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_host_bounds_agree_with_the_tensors(case):
    allowed = make(**case)
    starts, stops = allowed.bounds
    assert torch.equal(torch.tensor(stops, dtype=torch.int32), allowed.stop[:, 0])
    start = torch.tensor(starts, dtype=torch.int32)
    assert torch.equal(start, allowed.start[:, 0])
    assert allowed.first_host == tuple(allowed.first.tolist())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contains_answers_for_every_key(case):
    expected = definition(**case)
    keys = torch.arange(-2, case["key_len"] + 2, dtype=torch.int32).view(1, 1, 1, -1)
    inside = make(**case).contains(keys).expand(*expected.shape[:3], -1)
    assert torch.equal(inside[..., 2:-2], expected)
    assert not inside[..., :2].any()
    assert not inside[..., -2:].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_structure_is_read_back_from_a_dense_mask(case):
    keep = definition(**case)
    allowed = Allowed.from_dense(keep)
    assert allowed.keep is None
    assert torch.equal(allowed.to_dense(case["key_len"]).expand(keep.shape), keep)
    if case.get("window") is None:
        assert allowed.first.tolist() == list(case.get("first", (0,)))


@pytest.mark.parametrize("heads", [1, 4])
def test_a_mask_that_is_no_interval_keeps_its_tensor(heads):
    keep = torch.rand(2, heads, 3, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0, :, 1] = False
    allowed = Allowed.from_dense(keep)
    assert allowed.heads == heads
    assert torch.equal(allowed.to_dense(11), keep)
    assert torch.equal(allowed.counts, keep.sum(-1))
    keys = torch.arange(11, dtype=torch.int32).view(1, 1, 1, -1)
    assert torch.equal(allowed.contains(keys), keep)
    assert not allowed.contains(torch.tensor([-1, 11]).view(1, 1, 1, 2)).any()


def test_a_keep_mask_per_head_takes_keys_of_one_head_or_of_all():
    keep = torch.rand(1, 4, 2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed = Allowed.from_dense(keep)
    keys = torch.randint(0, 6, (1, 4, 2, 3), generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(1, 4, 2, 3, dtype=torch.bool)
    for head in range(4):
        for row in range(2):
            for slot in range(3):
                expected[0, head, row, slot] = keep[0, head, row, keys[0, head, row, slot]]
    assert torch.equal(allowed.contains(keys), expected)
    with pytest.raises(ValueError, match="2 heads does not fit a keep mask of 4"):
        allowed.contains(keys[:, :2])


def test_a_foreign_mask_must_be_a_bool_tensor_of_four_dimensions():
    with pytest.raises(TypeError, match="4-D bool"):
        Allowed.from_dense(torch.zeros(1, 1, 2, 2))
    with pytest.raises(TypeError, match="4-D bool"):
        Allowed.from_dense(torch.zeros(2, 2, dtype=torch.bool))


def test_everything_is_everything():
    assert Allowed.everything(5).to_dense(5).all()
    assert Allowed.everything(5).counts.unique().tolist() == [5]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_rows_are_a_slice(case, foreign, step):
    keep = definition(**case)
    if foreign:
        keep[..., ::2] = False
    allowed = Allowed.from_dense(keep) if foreign else make(**case)
    end = case["query_len"]
    begin = end // 2
    rows = allowed.rows(begin, end, step)
    part = keep[:, :, begin:end:step]
    assert torch.equal(rows.to_dense(case["key_len"]).expand(part.shape), part)
    assert torch.equal(rows.first, allowed.first)
    assert rows.bounds[1] == rows.stop[:, 0].tolist()


def test_moving_to_the_device_where_it_is_gives_the_same_object():
    allowed = Allowed.causal(2, 5)
    assert allowed.to("cpu") is allowed
    moved = allowed.to("meta")
    assert moved.device.type == "meta"
    assert moved.bounds == allowed.bounds


def test_limits_are_frozen():
    with pytest.raises(AttributeError):
        Allowed.causal(2, 5).keep = torch.ones(1)
