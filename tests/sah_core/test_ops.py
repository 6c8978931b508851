"""The scoring primitives against loops."""

import math

import pytest
import torch

from sah_core import KeyRange
from sah_core.ops import REFERENCE, round_to_bits
from sah_core.randomness import Random

pytestmark = pytest.mark.unit

INF = float("inf")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def int32(*values, shape):
    return torch.tensor(values, dtype=torch.int32).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("heads", "kv_heads", "query_len"), [(4, 4, 1), (4, 2, 3), (6, 1, 2)])
def test_logits_are_scaled_dot_products_per_head(dtype, softcap, heads, kv_heads, query_len):
    query = torch.randn(2, heads, query_len, 8, generator=generator()).to(dtype)
    key = torch.randn(2, kv_heads, 7, 8, generator=generator(1)).to(dtype)
    logits = REFERENCE.logits(query, key, 0.3, softcap)
    assert logits.dtype == torch.float32
    for b in range(2):
        for h in range(heads):
            for q in range(query_len):
                for k in range(7):
                    dot = float(query[b, h, q].double() @ key[b, h * kv_heads // heads, k].double())
                    dot *= 0.3
                    expected = dot if softcap is None else math.tanh(dot / softcap) * softcap
                    assert float(logits[b, h, q, k]) == pytest.approx(expected, abs=1e-5)


def few_levels(*shape, seed):
    """Numbers whose products and sums float32 holds exactly, so that many of them are equal."""
    return torch.randint(-2, 3, shape, generator=generator(seed)).float()


def levels_of(scores):
    return [len(set(row)) for row in scores.flatten(0, -2).tolist()]


def test_keys_of_equal_products_have_equal_logits_whatever_the_scaling():
    query, key = few_levels(1, 4, 2, 8, seed=1), few_levels(1, 2, 200, 8, seed=2)
    exact = levels_of(REFERENCE.logits(query, key, 1.0))
    assert levels_of(REFERENCE.logits(query, key, 0.3)) == exact


@pytest.mark.parametrize("lists", [2, 6])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
def test_keys_of_equal_products_have_equal_label_scores_whatever_the_scaling(reduction, lists):
    query, key = few_levels(1, 6, 2, 8, seed=1), few_levels(1, 2, 200, 8, seed=2)
    channels = torch.arange(5).expand(lists, 5)
    labels = torch.empty(1, lists, 200, 5)
    REFERENCE.label_update(labels, None, key, channels, 0, 16)

    def scores(scaling, reduction):
        return REFERENCE.label_scores(query, channels, labels, None, 16, scaling, 2, reduction)

    exact = levels_of(scores(1.0, "sum" if reduction == "mean" else reduction))
    assert levels_of(scores(5**-0.5, reduction)) == exact


def test_pages_of_equal_sums_have_equal_means():
    query, bounds = few_levels(1, 6, 2, 8, seed=1), few_levels(2, 1, 2, 200, 8, seed=2)
    low, high = bounds.amin(0), bounds.amax(0)
    exact = levels_of(REFERENCE.page_scores(query, low, high, "sum"))
    assert levels_of(REFERENCE.page_scores(query, low, high, "mean")) == exact


def best(scores, capacity, *, count=None, start=None, stop=None, taken=(), page=1, origin=None):
    """Row by row: sort the candidates by falling score and rising index."""
    rows = []
    batch, heads, query_len, candidates = scores.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(query_len):

                def of(tensor, default, b=b, h=h, q=q):
                    return (
                        default
                        if tensor is None
                        else int(tensor.expand(batch, heads, query_len)[b, h, q])
                    )

                zero = 0 if origin is None else int(origin.expand(batch)[b])
                low, high = of(start, 0), of(stop, 10**9)
                open_ = []
                for index in range(candidates):
                    keys = range(index * page + zero, (index + 1) * page + zero)
                    inside = any(low <= key < high for key in keys)
                    gone = any(of(r.start, 0) <= keys[0] < of(r.stop, 0) for r in taken)
                    score = float(scores[b, h, q, index])
                    if inside and not gone and score > -INF:
                        open_.append((-score, index))
                width = min(capacity, of(count, capacity))
                rows.append({index for _, index in sorted(open_)[:width]})
    return rows


def check(scores, capacity, **options):
    before = scores.clone()
    indices, chosen = REFERENCE.masked_topk(scores, capacity, **options)
    assert torch.equal(scores, before)
    assert indices.dtype == chosen.dtype == torch.int32
    assert indices.shape == (*scores.shape[:3], capacity)
    options["page"] = options.pop("page_size", 1)
    expected = best(scores, capacity, **options)
    for row, number, wanted in zip(
        indices.flatten(0, 2).tolist(), chosen.flatten().tolist(), expected, strict=True
    ):
        assert set(row[:number]) == wanted
        assert number == len(wanted)
        assert row[number:] == [-1] * (capacity - number)


def scores_of(kind, shape=(2, 3, 2, 17)):
    scores = torch.randn(shape, generator=generator(5))
    if kind == "ties":
        scores = torch.randint(0, 3, shape, generator=generator(6)).float()
    if kind == "all equal":
        scores = torch.zeros(shape)
    if kind == "holes":
        scores[torch.rand(shape, generator=generator(7)) < 0.7] = -INF
    if kind == "rows of holes":
        scores[:, :, 0] = -INF
        scores[0, 0, 1, 3:] = -INF
    if kind == "ties beside rows of few":
        scores[:, :, 0] = 0.0
        scores[:, :, 1, :14] = -INF
    if kind == "zeros of both signs":
        scores = torch.where(scores > 0, 0.0, -0.0)
    return scores


KINDS = (
    "distinct",
    "ties",
    "all equal",
    "holes",
    "rows of holes",
    "ties beside rows of few",
    "zeros of both signs",
)
POSITION = int32(15, 16, shape=(1, 1, 2))
OPTIONS = {
    "plain": {},
    "count of each row": {"count": torch.randint(0, 6, (2, 3, 2), generator=generator(8)).int()},
    "count of each sequence": {"count": int32(1, 4, shape=(2, 1, 1))},
    "one limit": {"start": int32(3, shape=(1, 1, 1)), "stop": int32(12, shape=(1, 1, 1))},
    "limits of each row": {"start": int32(0, 5, shape=(2, 1, 1)), "stop": POSITION + 1},
    "nothing allowed": {"start": int32(4, shape=(1, 1, 1)), "stop": int32(4, shape=(1, 1, 1))},
    "limits past the ends": {
        "start": int32(-3, shape=(1, 1, 1)),
        "stop": int32(90, shape=(1, 1, 1)),
    },
    "taken once": {
        "taken": [
            KeyRange(int32(0, shape=(1, 1, 1)), int32(0, shape=(1, 1, 1)), 4, -2, 4),
            KeyRange(int32(16, shape=(1, 1, 1)), int32(16, shape=(1, 1, 1)), 4, -3, 5),
        ]
    },
    "taken in each row": {
        "start": int32(2, 0, shape=(2, 1, 1)),
        "stop": POSITION + 1,
        "taken": [KeyRange(POSITION, POSITION, 4, -3, 1)],
        "count": int32(5, 2, shape=(2, 1, 1)),
    },
    "head limits": {"stop": int32(17, 5, 1, shape=(1, 3, 1))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("capacity", [0, 1, 5, 17, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_candidates_are_chosen_and_of_equal_ones_the_lower_index(kind, capacity, options):
    if "count" in options:
        options = options | {"count": options["count"].clamp(max=capacity)}
    check(scores_of(kind), capacity, **options)


PAGES = {
    "plain": {},
    "origin": {"origin": int32(0, 3, shape=(2,))},
    "limits": {
        "origin": int32(0, 3, shape=(2,)),
        "start": int32(0, 3, shape=(2, 1, 1)),
        "stop": int32(17, 18, shape=(1, 1, 2)),
    },
    "limits inside pages": {"start": int32(6, shape=(1, 1, 1)), "stop": int32(9, shape=(1, 1, 1))},
    "window before the origin": {
        "origin": int32(9, 0, shape=(2,)),
        "start": int32(2, shape=(1, 1, 1)),
        "stop": int32(11, 12, shape=(1, 1, 2)),
    },
    "nothing allowed": {"start": int32(6, shape=(1, 1, 1)), "stop": int32(6, shape=(1, 1, 1))},
    "nothing allowed in one row": {
        "start": int32(6, 0, shape=(2, 1, 1)),
        "stop": int32(6, 7, shape=(1, 1, 2)),
    },
}


@pytest.mark.parametrize("options", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_a_page_is_a_candidate_if_any_of_its_keys_is_allowed(capacity, options):
    check(scores_of("ties", (2, 3, 2, 5)), capacity, page_size=4, **options)


@pytest.mark.parametrize("first", [None, (0, 0), (0, 5), (13, 2)])
@pytest.mark.parametrize(("key_len", "page"), [(14, 4), (16, 4), (3, 8), (1, 1)])
def test_page_bounds_are_the_extremes_of_the_keys_of_each_page(first, key_len, page):
    key = torch.randn(2, 3, key_len, 4, generator=generator())
    padding = None if first is None else torch.tensor(first, dtype=torch.int32)
    low, high = REFERENCE.page_bounds(key, page, padding)
    pages = -(-key_len // page)
    assert low.shape == high.shape == (2, 3, pages, 4)
    for b in range(2):
        begin = 0 if first is None else first[b]
        for index in range(pages):
            rows = key[b, :, begin + index * page : begin + (index + 1) * page]
            if rows.shape[1]:
                assert torch.equal(low[b, :, index], rows.amin(1))
                assert torch.equal(high[b, :, index], rows.amax(1))
            else:
                assert (low[b, :, index] == INF).all()
                assert (high[b, :, index] == -INF).all()


@pytest.mark.parametrize("chunks", [(23,), (1,) * 23, (5, 1, 1, 9, 7), (4, 4, 4, 4, 7)])
@pytest.mark.parametrize("first", [None, (0, 6), (22, 3)])
@pytest.mark.parametrize("on_device", [False, True])
def test_bounds_taken_in_by_chunks_are_those_of_all_keys(chunks, first, on_device):
    key = torch.randn(2, 2, 23, 4, generator=generator())
    padding = None if first is None else torch.tensor(first, dtype=torch.int32)
    low, high = (torch.full((2, 2, 6, 4), 77.0) for _ in range(2))
    start = 0
    for size in chunks:
        where = torch.tensor([start], dtype=torch.int32) if on_device else start
        part = key[:, :, start : start + size]
        REFERENCE.page_bounds_update(low, high, part, where, 4, padding)
        start += size
    for b in range(2):
        begin = 0 if first is None else first[b]
        for index in range(-(-(23 - begin) // 4)):
            rows = key[b, :, begin + index * 4 : begin + (index + 1) * 4]
            assert torch.equal(low[b, :, index], rows.amin(1))
            assert torch.equal(high[b, :, index], rows.amax(1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("bits", [16, 3, 1])
def test_page_scores_are_the_upper_bound_of_each_page(reduction, bits):
    query = torch.randn(2, 4, 2, 5, generator=generator())
    low = torch.randn(2, 2, 3, 5, generator=generator(1))
    high = low + torch.rand(2, 2, 3, 5, generator=generator(2))
    scores = REFERENCE.page_scores(query, low, high, reduction, bits)
    if bits < 16:
        low, high = round_to_bits(low, bits), round_to_bits(high, bits)
    assert bits > 1 or bool((low > high).any()), "rounding swaps some bounds"
    bounds = torch.zeros(2, 4, 2, 3, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for q in range(2):
                for p in range(3):
                    bounds[b, h, q, p] = sum(
                        max(x * a, x * c)
                        for x, a, c in zip(
                            query[b, h, q].tolist(),
                            low[b, h // 2, p].tolist(),
                            high[b, h // 2, p].tolist(),
                            strict=True,
                        )
                    )
    grouped = bounds.view(2, 2, 2, 2, 3)
    expected = {
        "none": bounds,
        "sum": grouped.sum(2),
        "mean": grouped.mean(2),
        "max": grouped.amax(2),
    }[reduction]
    torch.testing.assert_close(scores, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rounding_goes_to_the_nearest_of_the_levels_between_the_extremes(bits):
    tensor = torch.randn(3, 7, generator=generator())
    tensor[1] = 4.0
    rounded = round_to_bits(tensor, bits)
    for row, values in zip(tensor.tolist(), rounded.tolist(), strict=True):
        low, high = min(row), max(row)
        step = (high - low) / (2**bits - 1)
        levels = [low + i * step for i in range(2**bits)]
        for x, y in zip(row, values, strict=True):
            assert abs(y - x) <= min(abs(level - x) for level in levels) + 1e-5


def fewest(scores, top_p, *, start=0, stop=None, taken=()):
    """Of one row: the candidates by falling score until their mass reaches the share."""
    inside = range(len(scores))[start:stop]
    order = [k for k in inside if scores[k] > -INF and k not in taken]
    order.sort(key=lambda k: (-scores[k], k))
    whole, reached = sum(math.exp(scores[k]) for k in order), 0.0
    for count, key in enumerate(order):
        if reached >= top_p * whole and top_p < 1:
            return order[:count]
        reached += math.exp(scores[key])
    return order


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 30, 700])
def test_top_p_takes_the_fewest_candidates_that_hold_the_mass(top_p, count):
    scores = torch.randn(2, 3, 2, count, generator=generator()) * 2
    scores[..., ::7] = -INF
    scores[:, 1] = scores[:, 1].round()
    start, stop = int32(0, 4, shape=(2, 1, 1)), int32(count, count - 1, shape=(1, 1, 2))
    zero = int32(0, shape=(1, 1, 1))
    taken = [KeyRange(zero, zero, 3, 1, 4)]
    limits = {"start": start, "stop": stop, "taken": taken}
    indices, chosen, overflow = REFERENCE.masked_topp(scores, top_p, **limits)
    assert not overflow.any()
    clipped, some, more = REFERENCE.masked_topp(scores, top_p, 5, **limits)
    assert clipped.shape[-1] == 5
    for b in range(2):
        for h in range(3):
            for q in range(2):
                row = scores[b, h, q].double().tolist()
                first, last = int(start[b]), int(stop[0, 0, q])
                wanted = fewest(row, top_p, start=first, stop=last, taken=range(1, 4))
                assert indices[b, h, q, : len(wanted)].tolist() == wanted
                assert (indices[b, h, q, len(wanted) :] == -1).all()
                assert int(chosen[b, h, q]) == len(wanted)
                assert clipped[b, h, q].tolist() == (wanted + [-1] * 5)[:5]
                assert int(some[b, h, q]) == min(5, len(wanted))
                assert bool(more[b, h, q]) == (len(wanted) > 5)


def test_top_p_of_rows_without_candidates_is_nothing():
    scores = torch.full((1, 2, 1, 5), -INF)
    for capacity in (None, 3):
        indices, chosen, overflow = REFERENCE.masked_topp(scores, 1.0, capacity)
        assert not (indices >= 0).any()
        assert not chosen.any()
        assert not overflow.any()


def test_top_p_without_room_overflows_wherever_there_is_a_candidate():
    scores = torch.randn(1, 2, 1, 5, generator=generator())
    scores[:, 1] = -INF
    indices, chosen, overflow = REFERENCE.masked_topp(scores, 0.5, 0)
    assert indices.shape[-1] == 0
    assert not chosen.any()
    assert overflow.flatten().tolist() == [True, False]


def test_top_p_does_not_change_the_scores():
    scores = torch.randn(1, 1, 1, 20, generator=generator())
    before = scores.clone()
    REFERENCE.masked_topp(scores, 0.5, start=int32(3, shape=(1, 1, 1)))
    assert torch.equal(scores, before)


def indices_of(heads, rows, count, key_len):
    order = torch.rand(2, heads, rows, key_len, generator=generator(3)).argsort(-1)
    indices = order[..., :count].int()
    indices[..., -1] = -1
    return indices


AT = [(4, 2, 4, 1, 1), (4, 2, 2, 1, 1), (4, 2, 1, 1, 1), (4, 4, 4, 3, 3), (4, 2, 2, 3, 1)]


@pytest.mark.parametrize(("heads", "kv_heads", "own", "query_len", "rows"), AT)
@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_logits_at_indices_are_those_of_all_keys(
    heads, kv_heads, own, query_len, rows, count, softcap
):
    query = torch.randn(2, heads, query_len, 8, generator=generator())
    key = torch.randn(2, kv_heads, 12, 8, generator=generator(1))
    indices = indices_of(own, rows, count, 12)
    found = REFERENCE.logits_at(query, key, indices, 0.3, softcap)
    whole = REFERENCE.logits(query, key, 0.3, softcap)
    assert found.shape == (2, heads, query_len, count)
    for b in range(2):
        for h in range(heads):
            for q in range(query_len):
                places = indices[b, h * own // heads, q if rows > 1 else 0].tolist()
                expected = [float(whole[b, h, q, k]) if k >= 0 else -INF for k in places]
                assert found[b, h, q].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "own", "query_len", "rows"), AT)
@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize(("bits", "softcap"), [(4, None), (2, 0.7)])
def test_logits_from_labels_are_those_of_the_rounded_keys(
    heads, kv_heads, own, query_len, rows, count, bits, softcap
):
    query = torch.randn(2, heads, query_len, 8, generator=generator())
    key = torch.randn(2, kv_heads, 12, 8, generator=generator(1))
    labels = torch.zeros(2, kv_heads, 12, 1, dtype=torch.int32)
    affine = torch.zeros(2, kv_heads, 12, 2)
    channels = torch.arange(8).expand(kv_heads, 8)
    REFERENCE.label_update(labels, affine, key, channels, 0, bits)
    indices = indices_of(own, rows, count, 12)
    found = REFERENCE.label_logits_at(query, labels, affine, indices, bits, 0.3, softcap)
    rounded = round_to_bits(key, bits)
    expected = REFERENCE.logits_at(query, rounded, indices, 0.3, softcap)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "own", "query_len", "rows"), AT)
@pytest.mark.parametrize("count", [3, 12])
def test_moments_are_sums_over_the_chosen_values(heads, kv_heads, own, query_len, rows, count):
    value = torch.randn(2, kv_heads, 12, 5, generator=generator())
    indices = indices_of(own, rows, count, 12)
    weights = torch.rand(2, heads, query_len, count, generator=generator(1))
    weights[..., -1] = 0
    first, second = REFERENCE.moments_at(value, indices, weights)
    for b in range(2):
        for h in range(heads):
            for q in range(query_len):
                places = indices[b, h * own // heads, q if rows > 1 else 0, :-1].tolist()
                chosen = value[b, h * kv_heads // heads, places].double()
                w = weights[b, h, q, :-1].double().unsqueeze(1)
                assert first[b, h, q].tolist() == pytest.approx(
                    (w * chosen).sum(0).tolist(), abs=1e-5
                )
                square = float((w * chosen).square().sum())
                assert float(second[b, h, q]) == pytest.approx(square, abs=1e-5)


@pytest.mark.parametrize("query_len", [1, 3])
def test_no_chosen_keys_have_no_logits_and_moments_of_zero(query_len):
    query, key = torch.ones(2, 4, query_len, 8), torch.ones(2, 2, 12, 8)
    nothing = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    assert REFERENCE.logits_at(query, key, nothing, 1.0).shape == (2, 4, query_len, 0)
    first, second = REFERENCE.moments_at(key, nothing, torch.zeros(2, 4, query_len, 0))
    assert torch.equal(first, torch.zeros(2, 4, query_len, 8))
    assert torch.equal(second, torch.zeros(2, 4, query_len))


def test_random_scores_count_positions_from_the_first_real_key():
    random = Random(seed=3, step=1, layer=2)
    rows, first = int32(6, 7, shape=(1, 2)), int32(0, 5, shape=(2,))
    scores = REFERENCE.random_scores(random, 4, rows, 8, first, draw=1)
    assert scores.shape == (2, 4, 2, 8)
    alone = REFERENCE.random_scores(random, 4, rows - 5, 3, int32(0, shape=(1,)), draw=1)
    assert torch.equal(scores[1:, ..., 5:], alone)
    assert not torch.equal(scores[:1], REFERENCE.random_scores(random, 4, rows, 8, first[:1]))
