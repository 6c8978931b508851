"""The primitives over small integer codes, against loops."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sah_core import code_ops
from sah_core.ops import REFERENCE

pytestmark = pytest.mark.unit


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["one piece", "small pieces"])
def pieces(request, monkeypatch):
    if request.param == "small pieces":
        monkeypatch.setattr(code_ops, "WORK_BYTES", 1)
        monkeypatch.setattr(code_ops, "CACHE_BYTES", 40)
        monkeypatch.setattr(code_ops, "LEAST_WIDTH", 2)


@pytest.mark.parametrize("bits", [1, 8, 15, 16, 31])
@pytest.mark.parametrize("centred", [False, True])
def test_hash_codes_have_a_bit_per_hyperplane(bits, centred, pieces):
    vectors, planes = draw(2, 3, 5, 4), draw(bits, 2, 4, seed=1)
    center = draw(2, 3, 4, seed=2) if centred else None
    codes = REFERENCE.lsh_codes(vectors, planes, center)
    assert codes.shape == (2, 3, 2, 5)
    assert codes.dtype == code_ops.code_dtype(bits)
    for b in range(2):
        for h in range(3):
            for n in range(5):
                x = vectors[b, h, n] - (center[b, h] if centred else 0)
                for t in range(2):
                    wanted = sum(1 << k for k in range(bits) if float(planes[k, t] @ x) > 0)
                    assert int(codes[b, h, t, n]) == wanted


@pytest.mark.parametrize(("heads", "query_len"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("tables", [7, 300])
def test_collisions_count_the_tables_with_equal_codes(heads, query_len, tables, pieces):
    queries = whole(3, 2, heads, tables, query_len).to(torch.int16)
    keys = whole(3, 2, 2, tables, 11, seed=1).to(torch.int16)
    counts = REFERENCE.collisions(queries, keys)
    assert counts.dtype == (torch.uint8 if tables == 7 else torch.int16)
    for b in range(2):
        for h in range(heads):
            for q in range(query_len):
                same = queries[b, h, :, q, None] == keys[b, h * 2 // heads]
                assert torch.equal(counts[b, h, q].long(), same.sum(0))


@pytest.mark.parametrize("centred", [False, True])
def test_cosines_are_those_of_the_named_keys(centred, pieces):
    # models hand over heads and rows transposed
    query = draw(2, 3, 4, 5).transpose(1, 2)
    key = draw(2, 2, 7, 5, seed=1).to(torch.bfloat16)
    key[0, 0, 2] = 0
    center = draw(2, 2, 5, seed=2) if centred else None
    at = whole(7, 2, 4, 3, 6, seed=3).to(torch.int32)
    cosines = REFERENCE.cosines(query, key, at, center)
    for b in range(2):
        for h in range(4):
            for q in range(3):
                for slot in range(6):
                    x = key[b, h // 2, at[b, h, q, slot]].float()
                    x = x - (center[b, h // 2] if centred else 0)
                    norm = float(x.norm() * query[b, h, q].norm())
                    wanted = float(x @ query[b, h, q]) / norm if norm else 0.0
                    assert float(cosines[b, h, q, slot]) == pytest.approx(wanted, abs=1e-6)


def test_entries_that_are_no_keys_do_not_break_cosines():
    at = torch.full((1, 1, 1, 2), -1, dtype=torch.int32)
    assert REFERENCE.cosines(draw(1, 1, 1, 4), draw(1, 1, 3, 4), at).isfinite().all()


def test_chosen_keys_come_in_order_and_all_of_them_where_they_fit():
    chosen = draw(2, 3, 4, 20) > 0.5
    chosen[0, 0] = False
    indices, kept, total = REFERENCE.pick(chosen, 20, None, torch.rand(2, 3, 4, 1))
    assert torch.equal(kept, chosen.sum(-1, dtype=torch.int32))
    assert torch.equal(total, kept)
    for row, flags in zip(indices.flatten(0, 2), chosen.flatten(0, 2), strict=True):
        wanted = flags.nonzero().flatten().tolist()
        assert row.tolist() == wanted + [-1] * (indices.shape[3] - len(wanted))
    assert indices.shape[3] == kept.max()


@pytest.mark.parametrize(("count", "fit"), [(7, 3), (12, 5), (9, 9), (4, 1), (10, 0)])
def test_of_too_many_chosen_keys_each_stays_for_the_same_share_of_the_draws(count, fit):
    chosen = torch.zeros(1, 1, 1, 15, dtype=torch.bool)
    chosen[..., torch.randperm(15, generator=torch.Generator().manual_seed(0))[:count]] = True
    stays = torch.zeros(15)
    for start in range(count):
        at = torch.full((1, 1, 1, 1), (start + 0.5) / count)
        limit = torch.tensor([[[fit]]], dtype=torch.int32)
        indices, kept, total = REFERENCE.pick(chosen, 11, limit, at)
        assert (int(kept), int(total)) == (fit, count)
        row = indices[0, 0, 0]
        assert (row[fit:] == -1).all()
        assert row[:fit].unique().numel() == fit
        stays[row[:fit].long()] += 1
    assert torch.equal(stays, chosen[0, 0, 0].float() * fit)


@pytest.mark.parametrize("bits", [1, 4])
def test_soft_collisions_sum_the_chance_of_each_code(bits, pieces):
    gains = draw(2, 4, 2, 3, bits) * 2
    codes = whole(2**bits, 2, 2, 3, 9, seed=1).to(torch.uint8)
    scores = REFERENCE.soft_collisions(gains, codes)
    for b in range(2):
        for h in range(4):
            for q in range(2):
                for n in range(9):
                    wanted = 0.0
                    for t in range(3):
                        code = int(codes[b, h // 2, t, n])
                        signs = [1 if code >> k & 1 else -1 for k in range(bits)]
                        odds = [s * float(g) for s, g in zip(signs, gains[b, h, q, t], strict=True)]
                        wanted += math.prod(1 / (1 + math.exp(-x)) for x in odds)
                    assert float(scores[b, h, q, n]) == pytest.approx(wanted, rel=1e-5)


def test_table_scores_add_the_entries_that_the_codes_name():
    tables = draw(2, 4, 3, 2, 8)
    codes = whole(8, 2, 2, 2, 10, seed=1).to(torch.uint8)
    scores = REFERENCE.table_scores(tables, codes)
    for b in range(2):
        for h in range(4):
            for n in range(10):
                a, c = codes[b, h // 2, :, n].tolist()
                wanted = tables[b, h, :, 0, a] + tables[b, h, :, 1, c]
                assert torch.allclose(scores[b, h, :, n], wanted)


def test_the_nearest_centroid_has_the_least_distance(pieces):
    vectors, centroids = draw(2, 3, 50, 4).to(torch.bfloat16), draw(2, 3, 16, 4, seed=1)
    codes = REFERENCE.nearest(vectors, centroids)
    distance = torch.cdist(vectors.double(), centroids.double())
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), distance.argmin(-1))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_temporary_tensors_stay_small_whatever_the_number_of_keys(monkeypatch):
    monkeypatch.setattr(code_ops, "WORK_BYTES", 2**16)
    monkeypatch.setattr(code_ops, "CACHE_BYTES", 2**14)
    keys, tables, bits = 4000, 20, 4
    vectors, planes = draw(1, 1, keys, 4), draw(bits, tables, 4)
    with Largest() as seen:
        codes = REFERENCE.lsh_codes(vectors, planes)
        REFERENCE.collisions(codes[..., :2].contiguous(), codes)
        REFERENCE.nearest(vectors[0, 0], draw(64, 4))
        every = torch.arange(keys, dtype=torch.int32).view(1, 1, 1, keys)
        REFERENCE.cosines(vectors[:, :, :1], vectors, every)
    # the codes themselves are the largest; projections alone would be 16 times as much
    assert seen.bytes <= keys * tables
