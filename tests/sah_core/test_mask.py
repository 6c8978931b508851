"""Masks against their definition: for every place the probability, computed in loops."""

import itertools

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sah_core import Allowed, Inputs, KeyRange, Mask
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.sink import Sink

pytestmark = pytest.mark.unit

SHAPE = (2, 4, 2, 13)
BATCH, HEADS, ROWS, KEYS = SHAPE


def places(shape):
    return itertools.product(*(range(size) for size in shape))


def at(tensor, *index):
    """An element of a tensor whose leading dimensions may be 1."""
    return tensor[tuple(0 if size == 1 else i for i, size in zip(index, tensor.shape, strict=True))]


def of_head(tensor, head, heads):
    """The row of the selection that a query head uses."""
    return head // (heads // tensor.shape[1])


def row_of(mask, b, h, q):
    """The probability of every key of one row, by the definition of each part."""
    heads, key_len = mask.shape[1], mask.shape[3]
    if mask.is_full:
        return [1.0] * key_len
    missed = [1.0] * key_len
    for part in mask.ranges:
        start = int(at(part.start_base, b, 0, q)) + part.start_offset
        stop = int(at(part.stop_base, b, 0, q)) + part.stop_offset
        for key in range(key_len):
            if start <= key < stop:
                missed[key] = 0.0
    s = mask.selected
    if s is not None:
        row = of_head(s.indices, h, heads)
        valid = s.capacity if s.count is None else int(at(s.count, b, row, q))
        origin = 0
        if s.origin is not None and s.page_size > 1:
            origin = int(s.origin[0 if s.origin.shape[0] == 1 else b])
        for slot in range(valid):
            index = int(at(s.indices, b, row, q, slot))
            p = 1.0 if s.probability is None else float(at(s.probability, b, row, q, slot))
            first = index * s.page_size + origin
            for key in range(first, min(first + s.page_size, key_len)) if index >= 0 else ():
                missed[key] *= 1 - p
    if mask.dense is not None:
        row = of_head(mask.dense, h, heads)
        for key in range(key_len):
            missed[key] *= 1 - float(at(mask.dense, b, row, q, key))
    return [1 - m for m in missed]


def definition(mask):
    batch, heads, query_len, _ = mask.shape
    rows = [row_of(mask, *place) for place in places((batch, heads, query_len))]
    return torch.tensor(rows).view(mask.shape)


def distinct(generator, *shape, keys):
    """Random key indices, none twice in a row."""
    return torch.rand(*shape[:-1], keys, generator=generator).argsort(-1)[..., : shape[-1]].int()


def ranges_part(generator, shape=SHAPE, batch=2, rows=ROWS):
    start = torch.randint(-4, shape[3], (batch, 1, rows), generator=generator).int()
    stop = start + torch.randint(-2, 9, start.shape, generator=generator).int()
    return Mask.from_ranges(shape, [KeyRange(start, stop, 9, stop_offset=1)])


def indices_part(generator, *, heads=4, batch=2, rows=ROWS, weighted=False, counted=False, page=1):
    shape = (batch, heads, rows, 3 if page > 1 else 6)
    pages = -(-SHAPE[3] // page)
    return Mask.from_indices(
        SHAPE,
        distinct(generator, *shape, keys=pages),
        count=torch.randint(0, shape[3] + 1, shape[:3], generator=generator).int()
        if counted
        else None,
        probability=torch.rand(shape, generator=generator) * 0.9 + 0.05 if weighted else None,
        page_size=page,
        origin=torch.tensor([0, 3], dtype=torch.int32) if page == 5 else None,
    )


def dense_part(generator, heads=4, batch=2, rows=ROWS):
    dense = torch.rand(batch, heads, rows, SHAPE[3], generator=generator)
    return Mask.from_dense(dense * (dense < 0.4), SHAPE)


PARTS = {
    "empty": lambda g: Mask.empty(SHAPE),
    "full": lambda g: Mask.full(SHAPE),
    "range": ranges_part,
    "range shared by rows": lambda g: ranges_part(g, rows=1),
    "range shared by sequences": lambda g: ranges_part(g, batch=1),
    "indices": indices_part,
    "indices of kv heads": lambda g: indices_part(g, heads=2, counted=True),
    "indices of one head": lambda g: indices_part(g, heads=1, rows=1, batch=1),
    "weighted": lambda g: indices_part(g, weighted=True, counted=True),
    "weighted of kv heads": lambda g: indices_part(g, heads=2, weighted=True),
    "pages": lambda g: indices_part(g, page=4, counted=True),
    "pages of two": lambda g: indices_part(g, page=2),
    "pages with origin": lambda g: indices_part(g, page=5, heads=2),
    "weighted pages": lambda g: indices_part(g, page=5, weighted=True),
    "dense": dense_part,
    "dense of kv heads": lambda g: dense_part(g, heads=2, rows=1),
}


def part(name, seed=0):
    return PARTS[name](torch.Generator().manual_seed(seed))


def allowed_of(kind):
    first = torch.tensor([0, 5], dtype=torch.int32)
    if kind == "causal":
        return Allowed.causal(SHAPE[2], SHAPE[3])
    if kind == "padded":
        return Allowed.causal(SHAPE[2], SHAPE[3], first=first)
    if kind == "windowed":
        return Allowed.causal(SHAPE[2], SHAPE[3], first=first, window=5)
    if kind == "long padding":
        return Allowed.causal(SHAPE[2], SHAPE[3], first=torch.tensor([0, 12], dtype=torch.int32))
    heads = 4 if kind == "keep per head" else 1
    keep = torch.rand(2, heads, *SHAPE[2:], generator=torch.Generator().manual_seed(7)) < 0.6
    keep[1, :, 1] = False
    return Allowed.from_dense(keep)


LIMITS = ("causal", "padded", "windowed", "long padding", "keep", "keep per head")


def keep_of(allowed):
    """Who may be attended, as a dense tensor read place by place."""
    keep = torch.zeros(SHAPE, dtype=torch.bool)
    for b, h, q in places(SHAPE[:3]):
        start, stop = int(at(allowed.start, b, 0, q)), int(at(allowed.stop, b, 0, q))
        keep[b, h, q, start:stop] = True
        if allowed.keep is not None:
            keep[b, h, q] &= allowed.keep[b, h if allowed.keep.shape[1] > 1 else 0, q]
    return keep


def tensors_of(mask):
    tensors = [t for r in mask.ranges for t in (r.start_base, r.stop_base)]
    if mask.selected is not None:
        s = mask.selected
        tensors += [t for t in (s.indices, s.count, s.probability, s.origin) if t is not None]
    return tensors if mask.dense is None else [*tensors, mask.dense]


@pytest.mark.parametrize("name", PARTS)
def test_the_dense_form_is_the_definition(name):
    mask = part(name)
    torch.testing.assert_close(mask.to_dense(), definition(mask))


@pytest.mark.parametrize("name", PARTS)
def test_compressed_rows_round_trip(name):
    mask = part(name)
    pointers, indices, probability = mask.to_csr()
    expected = definition(mask)
    assert pointers.tolist()[-1] == int((expected > 0).sum())
    for row, values in enumerate(expected.flatten(0, 2)):
        begin, end = pointers[row], pointers[row + 1]
        assert indices[begin:end].tolist() == values.nonzero()[:, 0].tolist()
        torch.testing.assert_close(probability[begin:end], values[values > 0])
    back = Mask.from_csr(SHAPE, pointers, indices, probability)
    assert torch.equal(back.to_dense(), mask.to_dense())


def test_compressed_rows_without_any_entry_make_a_mask_that_selects_nothing():
    mask = Mask.from_csr(SHAPE, torch.zeros(17, dtype=torch.long), torch.zeros(0).int())
    assert not mask.to_dense().any()


@pytest.mark.parametrize("name", PARTS)
def test_the_dense_part_becomes_indices_exactly(name):
    mask = part(name) | part("range", 3)
    selected = mask.to_selected()
    assert selected.dense is None
    assert torch.equal(selected.to_dense(), mask.to_dense())


@pytest.mark.parametrize("a", PARTS)
@pytest.mark.parametrize("b", PARTS)
def test_a_union_is_that_of_independent_selections(a, b):
    first, second = part(a, 1), part(b, 2)
    expected = 1 - (1 - definition(first)) * (1 - definition(second))
    torch.testing.assert_close((first | second).to_dense(), expected)


@pytest.mark.parametrize("form", ["selected", "dense", "both"])
def test_a_union_keeps_the_smallest_probability(form):
    """Divided by in the attention, a probability must not be rounded to 0, nor far."""
    chance = torch.tensor([[[[1e-12, 0.3, 0.7]]]])
    keys = torch.tensor([[[[0, 1, 2]]]], dtype=torch.int32)
    first = Mask.from_indices((1, 1, 1, 4), keys, probability=chance)
    other = Mask.from_indices((1, 1, 1, 4), keys[..., 1:2] + 2)
    if form == "dense":
        first = Mask.from_dense(first.to_dense())
    if form != "selected":
        other = Mask.from_dense(other.to_dense())
    for union in (first | other, other | first):
        assert torch.equal(union.to_dense()[..., :3], chance)
        assert torch.equal((union | union).to_dense()[..., 3:], torch.ones(1, 1, 1, 1))


def test_a_union_of_three_and_more_keeps_every_key_once():
    masks = [
        part(n, i) for i, n in enumerate(("weighted", "indices", "pages", "weighted", "range"))
    ]
    expected = 1 - torch.stack([1 - definition(m) for m in masks]).prod(0)
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    torch.testing.assert_close(union.to_dense(), expected)
    keys, _ = union.selected.tokens(SHAPE[3])
    for row in keys.flatten(0, -2).tolist():
        valid = [key for key in row if key >= 0]
        assert len(valid) == len(set(valid))


def test_pages_counted_from_different_keys_unite_by_key():
    pages = part("pages with origin", 1)
    other = attrs.evolve(
        pages, selected=attrs.evolve(pages.selected, origin=torch.tensor([2, 0]).int())
    )
    expected = 1 - (1 - definition(pages)) * (1 - definition(other))
    assert torch.equal((pages | other).to_dense(), expected)


def test_a_disjoint_union_is_the_union():
    indices = torch.arange(12).view(1, 1, 1, 12).int()
    a, b = (Mask.from_indices(SHAPE, i) for i in indices.split(6, dim=-1))
    assert torch.equal(a.union(b, disjoint=True).to_dense(), (a | b).to_dense())


def test_masks_of_other_shapes_do_not_unite():
    with pytest.raises(ValueError, match="cannot unite"):
        Mask.empty(SHAPE) | Mask.empty((2, 4, 2, 14))


def test_indices_whose_heads_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(ValueError, match="3 heads do not divide 4"):
        Mask.from_indices(SHAPE, torch.zeros(2, 3, 2, 1).int())


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", PARTS)
def test_an_intersection_removes_what_is_not_allowed_and_nothing_else(name, limits):
    mask, allowed = part(name), allowed_of(limits)
    torch.testing.assert_close((mask & allowed).to_dense(), definition(mask) * keep_of(allowed))


def test_nothing_after_an_intersection_can_admit_a_forbidden_key_to_the_attention():
    allowed = allowed_of("padded")
    mask = ((Mask.full(SHAPE) & allowed) | Mask.full(SHAPE)) & allowed
    assert not (mask.to_dense() * ~keep_of(allowed)).any()


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", [*PARTS, "all parts"])
def test_counts_and_density_count_each_allowed_key_once(name, limits):
    allowed = allowed_of(limits)
    if name == "all parts":
        mask = part("range", 1) | part("weighted", 2) | part("range", 3) | part("pages", 4)
    else:
        mask = part(name) | part("range", 5)
    keep = keep_of(allowed)
    present = (definition(mask) > 0) & keep
    chosen, total = mask.counts(allowed)
    assert torch.equal(chosen.expand(SHAPE[:3]), present.sum(-1))
    assert torch.equal(total.expand(SHAPE[:3]), keep.sum(-1))
    assert mask.density(allowed) == pytest.approx(int(present.sum()) / int(keep.sum()))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", PARTS)
def test_counts_of_one_part(name, limits):
    mask, allowed = part(name), allowed_of(limits)
    chosen, _ = mask.counts(allowed)
    expected = ((definition(mask) > 0) & keep_of(allowed)).sum(-1)
    assert torch.equal(chosen.expand(SHAPE[:3]), expected)


def test_the_density_where_nothing_is_allowed_is_zero():
    allowed = Allowed.from_dense(torch.zeros(2, 1, ROWS, KEYS, dtype=torch.bool))
    assert Mask.full(SHAPE).density(allowed) == 0.0


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("begin", "end", "step"), [(0, 2, 1), (1, 2, 1), (0, 1, 1), (0, 0, 1), (0, 2, 2), (0, 2, 3)]
)
def test_rows_are_a_slice(name, begin, end, step):
    mask = part(name) | part("range", 4)
    rows = mask.rows(begin, end, step)
    expected = mask.to_dense()[:, :, begin:end:step]
    assert rows.shape == tuple(expected.shape)
    assert torch.equal(rows.to_dense(), expected)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("sequences", [slice(0, 2), slice(1, 2)])
@pytest.mark.parametrize("heads", [slice(0, 4), slice(2, 4)])
def test_a_part_is_a_slice_of_sequences_and_heads(name, sequences, heads):
    mask = part(name) | part("range", 4)
    cut = mask.part(sequences, heads)
    expected = mask.to_dense()[sequences, heads]
    assert cut.shape == tuple(expected.shape)
    assert torch.equal(cut.to_dense(), expected)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_what_is_selected_leaves_the_choice(name, heads):
    mask = part(name) | part("range", 4)
    scores = torch.randn(2, heads, ROWS, KEYS, generator=torch.Generator().manual_seed(1))
    before = scores.clone()
    shown = mask.exclude_from(scores)
    everyone = (definition(mask) > 0).view(2, heads, 4 // heads, ROWS, KEYS).all(2)
    assert torch.equal(shown, torch.where(everyone, float("-inf"), before))
    assert torch.equal(scores, before)


def test_ends_outside_the_keys_leave_the_choice_right_for_one_range():
    base = torch.zeros(1, 1, 1, dtype=torch.int32)
    mask = Mask.from_ranges(
        (1, 1, 1, 8), [KeyRange(base, base, 9, -5, 3), KeyRange(base, base, 9, 6, 40)]
    )
    shown = mask.exclude_from(torch.zeros(1, 1, 1, 8))
    assert shown.isinf()[0, 0, 0].tolist() == [True] * 3 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", [*PARTS, "all parts"])
def test_entries_are_every_selected_and_allowed_key_once(name, limits):
    allowed = allowed_of(limits)
    mask = part(name) if name != "all parts" else part("range", 1) | part("weighted", 2)
    mask = mask if mask.is_full else mask | part("range", 4)
    keys, probability = mask.entries(allowed)
    expected = definition(mask) * keep_of(allowed)
    lead = SHAPE[:3]
    keys = keys.repeat_interleave(HEADS // keys.shape[1], 1).expand(*lead, -1)
    chances = torch.ones(keys.shape)
    if probability is not None:
        chances = probability.repeat_interleave(HEADS // probability.shape[1], 1).expand(keys.shape)
    found = torch.zeros(SHAPE)
    for place in places(lead):
        row = [k for k in keys[place].tolist() if k >= 0]
        assert len(set(row)) == len(row)
        found[place][row] = chances[place][keys[place] >= 0]
    torch.testing.assert_close(found, expected)


def test_an_empty_mask_has_no_entries():
    keys, probability = Mask.empty(SHAPE).entries(allowed_of("padded"))
    assert keys.numel() == 0
    assert probability is None


@pytest.mark.parametrize("name", PARTS)
def test_covers_says_which_keys_lie_in_a_range(name):
    mask = part(name) | part("range", 4) | part("range", 6)
    keys = torch.arange(KEYS).view(1, 1, 1, -1).int()
    ranges = Mask(SHAPE, mask.ranges)
    if not mask.is_full:
        expected = definition(ranges) > 0
        assert torch.equal(mask.covers(keys).expand(SHAPE), expected)


def test_entries_that_are_no_keys_are_ignored():
    indices = torch.tensor([[[[-7, -1, 4, 13, 300]]]], dtype=torch.int32)
    mask = Mask.from_indices(SHAPE, indices)
    allowed = Allowed.causal(ROWS, KEYS)
    assert mask.to_dense().nonzero()[:, 3].unique().tolist() == [4]
    assert mask.counts(allowed)[0].expand(SHAPE[:3]).unique().tolist() == [1]
    assert (mask | part("indices")).to_dense().shape == SHAPE


@pytest.mark.parametrize("name", PARTS)
def test_no_operation_edits_the_tensors_of_a_mask(name):
    mask, other, allowed = part(name), part("weighted", 9), allowed_of("keep")
    before = [t.clone() for t in (*tensors_of(mask), *tensors_of(other), allowed.keep)]
    union = mask | other
    union = union | mask
    _ = mask & allowed, union & allowed_of("padded"), mask.to_csr(), mask.to_selected()
    _ = mask.counts(allowed), mask.rows(1, 2), mask.exclude_from(torch.zeros(SHAPE))
    mask.to_dense().add_(1)
    union.to_dense().add_(1)
    after = [*tensors_of(mask), *tensors_of(other), allowed.keep]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_mask_does_not_change_with_the_tensor_of_a_caller_who_asks_for_the_dense_form():
    dense = torch.zeros(1, 1, 1, 4)
    Mask.from_dense(dense).to_dense().fill_(1.0)
    assert not dense.any()


def test_facts_of_the_forms():
    assert Mask.empty(SHAPE).is_empty
    assert not Mask.full(SHAPE).is_empty
    assert [part(n).is_weighted for n in ("indices", "weighted", "dense", "range")] == [
        False,
        True,
        True,
        False,
    ]
    assert [part(n).heads for n in ("range", "indices of kv heads", "indices", "full")] == [
        1,
        2,
        4,
        1,
    ]
    with pytest.raises(AttributeError):
        Mask.empty(SHAPE).is_full = True


def test_bools_make_a_dense_mask_of_probability_one():
    keep = torch.rand(SHAPE) < 0.5
    assert torch.equal(Mask.from_dense(keep).to_dense(), keep.float())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_sink_and_local_over_a_long_context_need_next_to_no_memory():
    query_len, key_len, heads = 64, 131072, 32
    key = torch.zeros(1, 8, 1, 4).expand(1, 8, key_len, 4)
    query = torch.zeros(1, heads, query_len, 4)
    with Largest() as largest:
        inputs = Inputs(
            query=query,
            key=key,
            value=key,
            allowed=Allowed.causal(query_len, key_len),
            scaling=0.5,
            key_len=key_len,
        )
        mask = Sink(sink_size=128).add_mask(inputs, Mask.empty(inputs.shape))
        mask = Local(window_size=128).add_mask(inputs, mask)
        mask.counts(inputs.allowed)
        density = mask.density(inputs.allowed)
    assert mask.nbytes < 2**20
    assert largest.elements < 2**18  # 1 MB of int32; all pairs of one head would be 2**23
    pairs = sum(key_len - query_len + row + 1 for row in range(query_len))
    assert density == pytest.approx(256 * query_len / pairs)
