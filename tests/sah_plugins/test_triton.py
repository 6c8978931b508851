"""The backend `triton` in the interpreter, on small tensors, against definitions in float64."""

import contextlib
import sys
from importlib.util import find_spec

import pytest
import torch

from sah_core import Allowed, Inputs, KeyRange, Mask
from sah_core.backend import Problem
from sah_core.ops import REFERENCE, code_width
from sah_core.randomness import Random
from sah_plugins.backends.triton.backend import TritonBackend

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed"),
    # numpy, on which the interpreter runs, warns where a GPU does not
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


PACKAGE = "sah_plugins.backends.triton"
KERNELS = (
    "attention",
    "topk",
    "pages",
    "labels",
    "queries",
    "gathered",
    "buckets",
    "samples",
    "ops",
)


def is_of_triton(name):
    """Python modules of triton and our kernels; the extension module can be loaded only once."""
    return name in [f"{PACKAGE}.{part}" for part in KERNELS] or (
        name.split(".")[0] == "triton" and not name.startswith("triton._C") and name != "triton._C"
    )


def forget():
    """Take the modules out, also as attributes of their package, where `from . import` looks."""
    for part in KERNELS:
        vars(sys.modules[PACKAGE]).pop(part, None)
    return {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_triton(name)}


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Kernels interpreted in this module alone: that is decided when they are defined."""
    if torch.cuda.is_available():
        pytest.skip("kernels run for real here, in tests/gpu")
    before = forget()
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    yield
    patch.undo()
    forget()
    for name, module in before.items():
        sys.modules[name] = module
        parent, _, part = name.rpartition(".")
        if parent == PACKAGE:
            setattr(sys.modules[parent], part, module)


@pytest.fixture
def ops():
    return TritonBackend().ops


def call(
    batch=1, heads=4, kv_heads=2, query_len=1, key_len=70, dim=16, value_dim=16, seed=0, **more
):
    torch.manual_seed(seed)
    first = more.pop("first", None)
    dtype = more.pop("dtype", torch.float32)
    query = torch.randn(batch, heads, query_len, dim).to(dtype)
    key = torch.randn(batch, kv_heads, key_len, dim).to(dtype)
    value = torch.randn(batch, kv_heads, key_len, value_dim).to(dtype)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    allowed = Allowed.causal(query_len, key_len, first=first)
    return Inputs(
        query=query, key=key, value=value, allowed=allowed, scaling=0.3, key_len=key_len, **more
    )


def ends(inputs):
    """A sink of 5 and a window of 9 keys, which overlap where the context is short."""
    first = inputs.allowed.first.view(-1, 1, 1)
    row = inputs.query_position.unsqueeze(1)
    ranges = [KeyRange(first, first, 5, 0, 5), KeyRange(row, row, 9, -8, 1)]
    return Mask.from_ranges(inputs.shape, ranges)


def expected(inputs, mask):
    """The weighted attention from its definition, row by row."""
    batch, heads, query_len, key_len = inputs.shape
    chance = (mask.to_dense() * inputs.allowed.to_dense(key_len)).double()
    output = torch.zeros(batch, query_len, heads, inputs.value.shape[3], dtype=torch.float64)
    level = torch.full((batch, heads, query_len), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            key = inputs.key[b, head // inputs.group].double()
            value = inputs.value[b, head // inputs.group].double()
            for row in range(query_len):
                logits = key @ inputs.query[b, head, row].double() * inputs.scaling
                if inputs.softcap is not None:
                    logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
                picked = chance[b, head, row] > 0
                weights = logits[picked].exp() / chance[b, head, row][picked]
                total = weights.sum()
                if inputs.sinks is not None:
                    total = total + inputs.sinks[head].double().exp()
                if total > 0:
                    output[b, row, head] = (weights / total) @ value[picked]
                    level[b, head, row] = total.log()
    return output, level


def check(inputs, mask, tolerance=1e-5, plan=None):
    from sah_plugins.backends.triton.attention import attend

    output, level = attend(inputs, mask, plan)
    right, right_level = expected(inputs, mask)
    assert output.dtype == inputs.query.dtype
    error = (output.double() - right).norm() / right.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error}"
    torch.testing.assert_close(level.double(), right_level, atol=tolerance, rtol=tolerance)


def plan(splits, lanes=16):
    from sah_plugins.backends.triton.attention import Plan

    return Plan(lanes=lanes, splits=splits, warps=4, stages=2)


def pages_of(inputs, heads, size=8, capacity=3, seed=1):
    torch.manual_seed(seed)
    lead = (inputs.batch, heads, inputs.query_len)
    pages = torch.rand(*lead, -(-inputs.capacity // size)).topk(capacity).indices
    return pages.to(torch.int32)


@pytest.mark.parametrize("splits", [1, 4])
def test_ranges_that_overlap_count_each_key_once(splits):
    inputs = call(key_len=11)
    check(inputs, ends(inputs), plan=plan(splits))


def test_ranges_may_reach_beyond_the_keys():
    inputs = call(query_len=2, key_len=7)
    check(inputs, ends(inputs))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("splits", [1, 4])
def test_pages_are_attended_with_or_without_ranges_over_them(heads, splits):
    inputs = call(key_len=61)
    pages = Mask.from_indices(inputs.shape, pages_of(inputs, heads), page_size=8)
    check(inputs, ends(inputs) | pages, plan=plan(splits))


def test_a_selection_shared_by_some_heads_of_a_group_is_understood():
    inputs = call(heads=8, kv_heads=2)
    check(inputs, Mask.from_indices(inputs.shape, pages_of(inputs, 4), page_size=8))


def test_left_padding_counts_and_probabilities_hold_per_sequence_and_row():
    inputs = call(batch=2, heads=2, kv_heads=1, query_len=2, key_len=40, first=[0, 9])
    pages = pages_of(inputs, 1, capacity=3)
    count = torch.tensor([[[3, 0]], [[1, 2]]], dtype=torch.int32)
    chance = torch.rand(pages.shape) * 0.9 + 0.1
    mask = Mask.from_indices(
        inputs.shape,
        pages,
        count=count,
        probability=chance,
        page_size=8,
        origin=inputs.allowed.first,
    )
    check(inputs, mask, plan=plan(2))


def test_single_keys_with_invalid_entries_are_attended():
    inputs = call()
    keys = torch.tensor([3, -1, 69, 12, 4, -1], dtype=torch.int32).expand(1, 4, 1, 6)
    check(inputs, ends(inputs) | Mask.from_indices(inputs.shape, keys))


def test_softcap_and_learned_sinks_are_applied():
    inputs = call(softcap=2.0, sinks=torch.tensor([0.0, 1.5, -2.0, 9.0]))
    check(inputs, ends(inputs), plan=plan(2))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])])
def test_a_row_that_selects_nothing_gives_zero(sinks):
    inputs = call(heads=2, kv_heads=1, sinks=sinks)
    nothing = torch.full((1, 1, 1, 4), -1, dtype=torch.int32)
    for mask in (Mask.empty(inputs.shape), Mask.from_indices(inputs.shape, nothing)):
        check(inputs, mask)


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 40), (80, 16)])
def test_head_dimensions_need_not_be_powers_of_two(dim, value_dim):
    inputs = call(heads=3, kv_heads=1, dim=dim, value_dim=value_dim)
    check(inputs, ends(inputs), plan=plan(2))


def test_half_precision_stays_within_a_hundredth():
    inputs = call(dtype=torch.float16)
    check(inputs, ends(inputs), tolerance=1e-2)


def test_caches_may_have_any_strides():
    inputs = call(batch=2, heads=2, kv_heads=2, key_len=20)
    key = inputs.key.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(2, 2, 20, 48)
    wide[..., :16] = inputs.value
    strided = call(batch=2, heads=2, kv_heads=2, key_len=20)
    object.__setattr__(strided, "key", key)
    object.__setattr__(strided, "value", wide[..., :16])
    check(strided, ends(strided))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"query_len": 257}, "256 query rows"),
        ({"dtype": torch.float64}, "float64"),
        ({"has_dense": True}, "dense part"),
        ({"has_keep": True}, "not an interval"),
        ({"is_full": True}, "everything"),
        ({"head_dim": 512}, "256 channels"),
        ({"range_count": 5}, "4 ranges"),
        ({"mask_heads": 3, "kv_heads": 2, "heads": 6}, "line up"),
        ({}, None),
    ],
)
def test_what_it_cannot_do_it_refuses_with_a_reason(facts, reason):
    inputs = call()
    problem = Problem.of(inputs, ends(inputs))
    for name, value in facts.items():
        object.__setattr__(problem, name, value)
    given = TritonBackend().refuses(problem)
    assert given is None if reason is None else reason in given


def test_without_a_gpu_it_refuses_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    inputs = call()
    assert "cpu" in TritonBackend().refuses(Problem.of(inputs, ends(inputs)))


def same_choice(got, right):
    assert torch.equal(got[1], right[1])
    assert torch.equal(got[0].sort(-1).values, right[0].sort(-1).values)
    slot = torch.arange(got[0].shape[-1])
    assert torch.equal(got[0] >= 0, slot < got[1].unsqueeze(-1))


@pytest.mark.parametrize("length", ["short", "long"])
def test_top_k_takes_ties_limits_counts_and_taken_keys_like_the_reference(ops, monkeypatch, length):
    if length == "long":
        topk = sys.modules["sah_plugins.backends.triton.topk"]
        monkeypatch.setattr(topk, "SHORT", 16)
        monkeypatch.setattr(topk, "CHUNK", 64)
    torch.manual_seed(0)
    scores = torch.randn(2, 1, 2, 100).round(decimals=1)
    scores[0, 0, 0, :60] = float("-inf")
    start = torch.tensor([0, 7], dtype=torch.int32).view(2, 1, 1)
    stop = torch.tensor([90, 100], dtype=torch.int32).view(1, 1, 2)
    count = torch.tensor([5, 20], dtype=torch.int32).view(2, 1, 1)
    taken = [KeyRange(start, start, 4, 0, 4), KeyRange(stop, stop, 4, -4, 0)]
    limits = {"count": count, "start": start, "stop": stop, "taken": taken}
    same_choice(ops.masked_topk(scores, 20, **limits), REFERENCE.masked_topk(scores, 20, **limits))
    same_choice(ops.masked_topk(scores, 120), REFERENCE.masked_topk(scores, 120))


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("levels", [60, 3000])
def test_top_k_of_scores_that_are_few_levels_is_that_of_all_floats(
    ops, monkeypatch, length, levels
):
    if length == "long":
        topk = sys.modules["sah_plugins.backends.triton.topk"]
        monkeypatch.setattr(topk, "SHORT", 16)
        monkeypatch.setattr(topk, "CHUNK", 64)
        monkeypatch.setattr(topk, "SINGLE", 3)
    torch.manual_seed(levels)
    scores = torch.randint(levels, (1, 1, 2, 200)).float()
    scores[0, 0, 0, 7:] = float("-inf")
    scores[0, 0, 1, :9] = levels - 1
    for capacity in (1, 20, 220):
        right = REFERENCE.masked_topk(scores, capacity)
        same_choice(ops.masked_topk(scores, capacity, levels=levels), right)
        same_choice(ops.masked_topk(scores, capacity), right)


@pytest.mark.parametrize("aside", [2, 16])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e4])
def test_top_k_of_long_rows_puts_those_aside_that_share_the_leading_bits_of_the_last(
    ops, monkeypatch, aside, spread
):
    topk = sys.modules["sah_plugins.backends.triton.topk"]
    monkeypatch.setattr(topk, "SHORT", 16)
    monkeypatch.setattr(topk, "CHUNK", 64)
    monkeypatch.setattr(topk, "FEW", aside)
    torch.manual_seed(0)
    scores = 1.0 + spread * torch.randn(2, 2, 2, 300)
    # ties of the last one, more and fewer than there is room for
    scores[0, :, 0, 100:110] = scores[0, :, 0].sort(descending=True).values[:, 20:21]
    scores[1, :, 1, 50:53] = scores[1, :, 1].sort(descending=True).values[:, 24:25]
    count = torch.tensor([0, 23], dtype=torch.int32).view(1, 2, 1)
    for capacity in (1, 23, 310):
        right = REFERENCE.masked_topk(scores, capacity)
        same_choice(ops.masked_topk(scores, capacity), right)
    same_choice(
        ops.masked_topk(scores, 30, count=count), REFERENCE.masked_topk(scores, 30, count=count)
    )


@pytest.mark.parametrize("length", ["short", "long"])
def test_random_choices_are_those_of_the_reference(ops, monkeypatch, length):
    if length == "long":
        topk = sys.modules["sah_plugins.backends.triton.topk"]
        monkeypatch.setattr(topk, "SHORT", 16)
        monkeypatch.setattr(topk, "CHUNK", 128)
    inputs = call(batch=2, heads=2, query_len=1, key_len=300, first=[0, 11])
    allowed = inputs.allowed
    random = Random(seed=7, step=2, layer=3)
    place = (random, 2, inputs.query_position, 300, allowed.first)
    drawn = ops.random_scores(*place, draw=1)
    assert torch.equal(drawn, REFERENCE.random_scores(*place, draw=1))
    row = (random, 2, inputs.query_position, allowed.first)
    assert torch.equal(ops.row_numbers(*row, draw=3), REFERENCE.row_numbers(*row, draw=3))
    count = torch.tensor([5, 20], dtype=torch.int32).view(2, 1, 1)
    limits = {"count": count, "start": allowed.start, "stop": allowed.stop}
    limits["taken"] = [KeyRange(allowed.start, allowed.start, 4, 0, 4)]
    right = REFERENCE.random_topk(*place, 24, batch=2, draw=1, **limits)
    same_choice(ops.random_topk(*place, 24, batch=2, draw=1, **limits), right)


def test_top_k_reads_limits_in_keys_where_candidates_are_pages(ops):
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 1, 20)
    origin = torch.tensor([0, 9], dtype=torch.int32)
    start = torch.tensor([21, 9], dtype=torch.int32).view(2, 1, 1)
    stop = torch.tensor([70, 100], dtype=torch.int32).view(2, 1, 1)
    limits = {"start": start, "stop": stop, "page_size": 8, "origin": origin}
    same_choice(ops.masked_topk(scores, 9, **limits), REFERENCE.masked_topk(scores, 9, **limits))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_page_scores_are_those_of_the_reference(ops, reduction, bits):
    torch.manual_seed(0)
    query = torch.randn(2, 6, 3, 24)
    low = torch.randn(2, 2, 40, 24)
    high = low + torch.rand(2, 2, 40, 24)
    got = ops.page_scores(query, low, high, reduction, bits)
    torch.testing.assert_close(got, REFERENCE.page_scores(query, low, high, reduction, bits))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
def test_keys_of_equal_products_have_equal_scores(ops, reduction):
    # sums that are exact, and a scaling that is not: scaled before they are added up, keys of equal
    # products would be told apart by rounding, and the lower index would not win
    torch.manual_seed(0)
    scaling, heads, kv_heads = 24**-0.5, 6, 2
    query = torch.randint(0, 4, (1, heads, 2, 24)).float()
    key = torch.randint(0, 2, (1, kv_heads, 90, 24)).float()
    for rows in (query, key):  # 4 bits hold such rows as they are
        rows[..., :2] = torch.tensor([0.0, 15.0])
    everywhere = torch.arange(90, dtype=torch.int32).expand(1, kv_heads, 2, 90).contiguous()
    channels = torch.arange(12).expand(kv_heads, 12)
    words, affine = torch.zeros(1, kv_heads, 90, 2, dtype=torch.int32), torch.zeros(1, 2, 90, 2)
    ops.label_update(words, affine, key, channels, 0, 4)
    labels = key[..., :12].contiguous()

    def products(count):
        each = query.unflatten(1, (kv_heads, 3))[..., :count] @ key[:, :, None, :, :count].mT
        reduced = {"none": each.flatten(1, 2), "max": each.amax(2)}
        return reduced.get(reduction, each.sum(2))

    found = [
        (ops.label_scores(query, channels, *how, scaling, kv_heads, reduction), products(12))
        for how in ((words, affine, 4), (labels, None, 16))
    ]
    found.append((ops.page_scores(query, key, key, reduction), products(24)))
    if reduction == "none":
        found.append((ops.logits(query, key, scaling), products(24)))
        found.append((ops.logits_at(query, key, everywhere, scaling), products(24)))
    for scores, right in found:
        for row, wanted in zip(scores.flatten(0, 2), right.flatten(0, 2), strict=True):
            assert len(wanted.unique()) < 60  # there are ties
            assert torch.equal(*(values.unique(return_inverse=True)[1] for values in (row, wanted)))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_those_of_the_reference(ops, softcap):
    inputs = call(heads=6, query_len=3, dim=24, key_len=140)
    got = ops.logits(inputs.query, inputs.key, 0.3, softcap)
    torch.testing.assert_close(got, REFERENCE.logits(inputs.query, inputs.key, 0.3, softcap))


@pytest.mark.parametrize("first", [None, [5, 17]])
@pytest.mark.parametrize("on_device", [False, True])
def test_page_bounds_grow_with_the_keys_like_the_reference(ops, first, on_device):
    torch.manual_seed(0)
    key = torch.randn(2, 2, 40, 24)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    mine = [torch.randn(2, 2, 6, 24) for _ in range(2)]
    right = [t.clone() for t in mine]
    start = 0
    for new in (3, 1, 22, 1, 13):
        part = key[:, :, start : start + new]
        at = torch.tensor([start], dtype=torch.int32) if on_device else start
        ops.page_bounds_update(*mine, part, at, 7, first)
        REFERENCE.page_bounds_update(*right, part, start, 7, first)
        start += new
    pages = 6 if first is None else 4
    for got, wanted in zip(mine, right, strict=True):
        assert torch.equal(got[:, :, :pages], wanted[:, :, :pages])


def test_ops_that_a_kernel_cannot_take_go_to_the_reference(ops):
    scores = torch.randn(1, 1, 1, 30, dtype=torch.float64)
    same_choice(ops.masked_topk(scores, 4), REFERENCE.masked_topk(scores, 4))


@pytest.mark.parametrize("fraction", [0.05, 0.29, 1.0])
def test_a_share_of_the_keys_is_what_the_host_computes(ops, fraction):
    first = torch.tensor([0, 3, 17], dtype=torch.int32)
    for length in (20, 100, 131072):
        keys = [int(fraction * (length - f)) for f in first.tolist()]
        shares = ops.share(torch.tensor([length], dtype=torch.int32), first, fraction)
        assert shares.flatten().tolist() == keys
        pages = ops.share(
            torch.tensor([length], dtype=torch.int32),
            first,
            fraction,
            divisor=16,
            minimum=3,
            maximum=99,
        )
        assert pages.flatten().tolist() == [min(99, max(3, k // 16)) for k in keys]


LABEL_HEADS = [(4, 2, 4), (4, 2, 2), (3, 1, 3)]
"""Query heads, KV heads, and heads that have labels or signatures of their own."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize(("lists", "kv_heads"), [(4, 2), (2, 2), (1, 2)])
def test_labels_are_written_as_the_reference_writes_them(ops, lists, kv_heads, bits, dtype):
    torch.manual_seed(bits)
    key = torch.randn(2, kv_heads, 21, 16).to(dtype)
    key[0, 0, 3] = 1.5
    channels = torch.stack([torch.randperm(16)[:11] for _ in range(lists)])
    heads = max(lists, kv_heads)
    words = -(-11 * code_width(bits) // 32)

    def written(ops):
        labels = torch.zeros(2, heads, 40, words, dtype=torch.int32)
        affine = torch.zeros(2, heads, 40, 2, dtype=dtype)
        ops.label_update(labels, affine, key[:, :, :20], channels, 3, bits)
        at = torch.tensor([23], dtype=torch.int32)
        ops.label_update(labels, affine, key[:, :, 20:], channels, at, bits)
        return labels, affine

    for got, right in zip(written(ops), written(REFERENCE), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [4, 7, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "label_heads"), LABEL_HEADS)
def test_label_scores_are_those_of_the_reference(
    ops, heads, kv_heads, label_heads, bits, reduction
):
    torch.manual_seed(bits)
    query, key = torch.randn(2, heads, 3, 16), torch.randn(2, kv_heads, 45, 16)
    channels = torch.stack([torch.randperm(16)[:5] for _ in range(label_heads)])
    words = -(-5 * code_width(bits) // 32)
    labels, affine = torch.zeros(2, label_heads, 60, 5), None
    if bits < 16:
        labels = torch.zeros(2, label_heads, 60, words, dtype=torch.int32)
        affine = torch.zeros(2, label_heads, 60, 2)
    ops.label_update(labels, affine, key, channels, 0, bits)
    cut = (labels[:, :, :45], None if affine is None else affine[:, :, :45])
    arguments = (query, channels, *cut, bits, 0.3, kv_heads, reduction)
    expected = REFERENCE.label_scores(*arguments)
    assert torch.allclose(ops.label_scores(*arguments), expected, atol=2e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [5, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "key_heads"), LABEL_HEADS)
def test_signatures_agree_in_as_many_bits_as_the_reference_says(
    ops, heads, kv_heads, key_heads, bits, reduction
):
    torch.manual_seed(bits)
    query = ops.pack_signs(torch.randn(2, heads, 3, bits))
    key = ops.pack_signs(torch.randn(2, key_heads, 60, bits))[:, :, :45]
    expected = REFERENCE.hamming_scores(query, key, bits, kv_heads, reduction)
    assert torch.equal(ops.hamming_scores(query, key, bits, kv_heads, reduction), expected)


@pytest.mark.parametrize("widths", [(24, 40, 16, 32), (16, 33, 8, 70)])
def test_signatures_are_those_of_the_reference(ops, widths):
    torch.manual_seed(0)
    layers = [
        (torch.randn(3, a, b), torch.randn(3, 1, b))
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    rows = torch.randn(2, 3, 2, widths[0])
    assert torch.equal(ops.signatures(rows, layers), REFERENCE.signatures(rows, layers))
    half = rows.to(torch.bfloat16)
    assert torch.equal(ops.signatures(half, layers), REFERENCE.signatures(half, layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [2, 6])
def test_signatures_of_new_keys_are_written_where_they_belong(ops, key_heads, dtype):
    torch.manual_seed(0)
    layers = [
        (torch.randn(key_heads, a, b), torch.randn(key_heads, 1, b))
        for a, b in [(24, 40), (40, 16), (16, 70)]
    ]
    key = torch.randn(3, 2, 6, 24).to(dtype)
    rows = key.repeat_interleave(key_heads // 2, dim=1)
    words = torch.zeros(3, key_heads, 20, 3, dtype=torch.int32)
    ops.signature_update(words, key[:, :, :5], layers, 4)
    ops.signature_update(words, key[:, :, 5:], layers, torch.tensor([9], dtype=torch.int32))
    expected = torch.zeros_like(words)
    expected[:, :, 4:10] = REFERENCE.signatures(rows, layers)
    assert torch.equal(words, expected)


@pytest.mark.parametrize("selections", [1, 2, 4])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_from_labels_of_chosen_keys_are_those_of_the_reference(
    ops, selections, bits, softcap
):
    inputs = call(batch=2, dim=24, key_len=90)
    heads = inputs.kv_heads
    labels = torch.zeros(2, heads, 100, -(-24 * code_width(bits) // 32), dtype=torch.int32)
    affine = torch.zeros(2, heads, 100, 2)
    every = torch.arange(24).expand(heads, -1)
    REFERENCE.label_update(labels, affine, inputs.key, every, 0, bits)
    indices = torch.stack([torch.randperm(90)[:70] for _ in range(2 * selections)])
    indices = indices.view(2, selections, 1, 70).to(torch.int32)
    indices[0, 0, 0, 5:9] = -1
    arguments = (inputs.query, labels[:, :, :90], affine[:, :, :90], indices, bits, 0.3, softcap)
    expected = REFERENCE.label_logits_at(*arguments)
    assert torch.allclose(ops.label_logits_at(*arguments), expected, atol=2e-6)


def test_logits_of_two_types_are_multiplied_in_the_one_that_holds_both(ops, monkeypatch):
    inputs = call(dim=16, key_len=30)
    half = inputs.query.to(torch.bfloat16)
    kernel = sys.modules["sah_plugins.backends.triton.pages"].logits
    types = []

    def watched(query, key, *rest):
        types.append((query.dtype, key.dtype))
        return kernel(query, key, *rest)

    monkeypatch.setattr(sys.modules["sah_plugins.backends.triton.pages"], "logits", watched)
    for query, key in ((half, inputs.key), (inputs.query, inputs.key.to(torch.bfloat16))):
        expected = REFERENCE.logits(query, key, 0.3)
        assert torch.allclose(ops.logits(query, key, 0.3), expected, atol=1e-5)
    assert types == [(torch.float32, torch.float32)] * 2


@pytest.mark.parametrize("selections", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_and_cosines_of_chosen_keys_are_those_of_the_reference(ops, selections, softcap):
    inputs = call(batch=2, dim=24, key_len=90)
    indices = torch.stack([torch.randperm(90)[:70] for _ in range(2 * selections)])
    indices = indices.view(2, selections, 1, 70).to(torch.int32)
    indices[1, 0, 0, :9] = -1
    place = (inputs.query, inputs.key, indices)
    right = REFERENCE.logits_at(*place, 0.3, softcap)
    torch.testing.assert_close(ops.logits_at(*place, 0.3, softcap), right)
    if selections == 4:
        inputs.key[0, 0, 3] = 0.0
        for center in (None, torch.randn(2, 2, 24)):
            right = REFERENCE.cosines(*place, center).masked_fill(indices < 0, 0.0)
            got = ops.cosines(*place, center).masked_fill(indices < 0, 0.0)
            torch.testing.assert_close(got, right, atol=2e-6, rtol=0)


@pytest.mark.parametrize("centred", [False, True])
def test_hash_codes_are_those_of_the_reference(ops, centred):
    torch.manual_seed(0)
    vectors, planes = torch.randn(2, 3, 2, 24), torch.randn(10, 37, 24)
    center = torch.randn(2, 3, 24) if centred else None
    right = REFERENCE.lsh_codes(vectors, planes, center)
    assert torch.equal(ops.lsh_codes(vectors, planes, center), right)


@pytest.mark.parametrize(("heads", "tables", "query_len"), [(4, 8, 1), (6, 300, 1), (2, 7, 3)])
def test_collisions_are_counted_like_the_reference(ops, heads, tables, query_len):
    torch.manual_seed(0)
    query = torch.randint(3, (2, heads, tables, query_len), dtype=torch.int16)
    key = torch.randint(3, (2, 2, tables, 80), dtype=torch.int16)[..., :70]
    key[0, 0, :, 5] = query[0, 0, :, 0]
    got, right = ops.collisions(query, key), REFERENCE.collisions(query, key)
    assert got.dtype == right.dtype
    assert torch.equal(got, right)


@pytest.mark.parametrize("limited", [False, True])
def test_what_was_found_is_picked_like_the_reference(ops, monkeypatch, limited):
    monkeypatch.setattr(sys.modules["sah_plugins.backends.triton.buckets"], "CHUNK", 64)
    torch.manual_seed(0)
    chosen = torch.rand(2, 2, 2, 150) < torch.tensor([0.1, 0.9]).view(2, 1, 1, 1)
    chosen[0, 0, 0] = False
    draw = torch.rand(2, 2, 2, 1)
    limit = torch.tensor([30, 17], dtype=torch.int32).view(2, 1, 1) if limited else None
    got, right = ops.pick(chosen, 31, limit, draw), REFERENCE.pick(chosen, 31, limit, draw)
    pad = 31 - right[0].shape[3]
    assert torch.equal(got[0], torch.nn.functional.pad(right[0], (0, pad), value=-1))
    assert torch.equal(got[1], right[1])
    assert torch.equal(got[2], right[2])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_ranges_leave_and_their_keys_are_those_of_the_reference(ops, count):
    inputs = call(batch=2, query_len=3, key_len=30, first=[0, 17])
    first, row = inputs.allowed.first.view(-1, 1, 1), inputs.query_position.unsqueeze(1)
    ranges = [
        KeyRange(first, first, 5, 0, 5),
        KeyRange(row, row, 9, -8, 1),
        KeyRange(row, row, 40, -28, -3),
        KeyRange(first, row, 40, 3, -20),
    ][:count]
    got = ops.residual_count(ranges, inputs.allowed)
    assert torch.equal(got, REFERENCE.residual_count(ranges, inputs.allowed))
    keys = ops.range_entries(ranges, inputs.allowed, 30)
    right = REFERENCE.range_entries(ranges, inputs.allowed, 30)
    assert torch.equal(keys.expand(right.shape), right)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_weights_are_those_of_the_reference(ops, weighted):
    torch.manual_seed(0)
    drawn, sure = 5 * torch.randn(2, 3, 1, 70), 5 * torch.randn(2, 3, 1, 9)
    drawn[0, 0, 0, 40:], drawn[1, 1], sure[1, 1] = (float("-inf"),) * 3
    more = (torch.rand(1, 3, 1, 9) + 0.1, torch.tensor([0.0, 9.0, -3.0])) if weighted else ()
    top, moments = ops.weight_moments(drawn, sure, *more)
    right_top, right = REFERENCE.weight_moments(drawn, sure, *more)
    assert torch.equal(top, right_top)
    torch.testing.assert_close(moments, right, rtol=2e-6, atol=0)


class Elsewhere:
    """What lies on the second GPU."""

    device = torch.device("cuda", 1)


def test_kernels_are_launched_on_the_device_of_their_tensors(ops, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    backend = sys.modules["sah_plugins.backends.triton.backend"]
    assert backend.on_its_device(lambda *args: len(args))(3, Elsewhere(), torch.zeros(1)) == 3
    assert entered == [Elsewhere.device]
    assert backend.on_its_device(len)("abc") == 3
    assert backend.on_its_device(lambda tensor: tensor.sum())(torch.ones(2)) == 2
    assert len(entered) == 1
    primitives = [name for name in vars(type(ops)) if not name.startswith("_")]
    assert "masked_topk" in primitives
    assert all(hasattr(getattr(type(ops), name), "__wrapped__") for name in primitives)
    assert hasattr(TritonBackend.attend, "__wrapped__")
