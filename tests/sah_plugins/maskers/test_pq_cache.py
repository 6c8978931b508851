"""PQCache against its definition, its clustering, and the codes of keys that come later."""

import itertools
import math

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sah_core import Allowed, Inputs, Mask, code_ops
from sah_core.attention import build_mask, context_only, layer_info, with_step
from sah_core.errors import ParameterError
from sah_core.ops import REFERENCE
from sah_core.randomness import Random
from sah_core.testing import CHECKS
from sah_plugins.maskers.pq_cache import PQCache, clustering
from sah_plugins.maskers.pq_cache import codes as codes_module
from sah_plugins.maskers.pq_cache.clustering import Clusters

pytestmark = pytest.mark.unit

SMALL = {"heavy_size": 5, "pq_bits": 2, "kmeans_iter": 4, "init_offset": 2}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "masker",
    [
        PQCache(**SMALL),
        PQCache(heavy_size=0.1, pq_bits=3, pq_group_factor=4, metric="ip", group_reduction="none"),
        PQCache(heavy_size=7, pq_bits=7, kmeans_iter=1),
    ],
    ids=["shared choice", "inner product", "contexts shorter than the codebook"],
)
def test_conformance(masker, check):
    check(masker)


def with_state(masker, inputs, context=None, seed=0):
    """The call with a state that saw the first ``context`` keys as the context."""
    context = inputs.key_len if context is None else context
    state = masker.init_state(layer_info(inputs, 0, seed))
    masker.append(state, inputs.key[:, :, :context], inputs.value[:, :, :context], 0)
    masker.end_prefill(state, with_step(context_only(inputs, context), 0, state, seed))
    rest = inputs.key[:, :, context:]
    masker.append(state, rest, rest, context)
    return attrs.evolve(inputs, state=state)


def sub_vectors(masker, key):
    return key.float().unflatten(-1, (masker.pq_group_factor, -1))


def expected(masker, inputs, previous):
    """Softmax of the estimated logits of each head over its candidates, shared by the group."""
    state, group = inputs.state, inputs.group
    keep = inputs.allowed.to_dense(inputs.key_len).expand(inputs.batch, 1, inputs.query_len, -1)
    taken = previous.to_dense() > 0
    result = torch.zeros(inputs.shape, dtype=torch.bool)
    parts = range(masker.pq_group_factor)
    width = inputs.key.shape[3] // masker.pq_group_factor
    for b in range(inputs.batch):
        first = int(inputs.allowed.first.expand(inputs.batch)[b])
        size = masker.heavy_size.resolve(inputs.key_len - first)
        for kv, row in itertools.product(range(inputs.kv_heads), range(inputs.query_len)):
            weights = []
            for head in range(kv * group, (kv + 1) * group):
                open_ = (keep[b, 0, row] & ~taken[b, head, row]).nonzero().flatten().tolist()
                logits = {}
                for k in open_:
                    dots = [
                        inputs.query[b, head, row, j * width : (j + 1) * width].double()
                        @ state.book.centroids[
                            b, kv, j, int(state.codes.data[b, kv, j, k]), :width
                        ].double()
                        for j in parts
                    ]
                    logits[k] = inputs.scaling * float(sum(dots))
                    if inputs.softcap:
                        logits[k] = inputs.softcap * math.tanh(logits[k] / inputs.softcap)
                total = sum(math.exp(x) for x in logits.values())
                weights.append({k: math.exp(x) / total for k, x in logits.items()})
            if masker.group_reduction == "none":
                choices = [([kv * group + i], w) for i, w in enumerate(weights)]
            else:
                reduce = max if masker.group_reduction == "max" else sum
                keys = set().union(*weights)
                joint = {k: reduce(w.get(k, 0.0) for w in weights) for k in keys}
                choices = [(list(range(kv * group, (kv + 1) * group)), joint)]
            for heads, scores in choices:
                best = sorted(scores, key=lambda k: (-scores[k], k))[:size]
                for head in heads:
                    result[b, head, row, best] = True
    return result | taken & keep.expand(inputs.shape)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("kind", ["empty", "ranges", "both"])
@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_the_selection_is_that_of_the_definition(calls, reduction, kind, metric):
    # as many codes as keys nearly, so that no two keys tie
    masker = PQCache(
        heavy_size=0.2, pq_bits=4, pq_group_factor=4, metric=metric, group_reduction=reduction
    )
    inputs = with_state(masker, calls.make(key_len=24, first=[0, 4], softcap=1.5), 21)
    previous = calls.previous(kind, inputs)
    mask = masker.add_mask(inputs, previous)
    assert mask.heads == (4 if reduction == "none" else 2)
    got = calls.effective(mask, inputs) > 0
    assert torch.equal(got, expected(masker, inputs, previous))


def nearest(masker, state, key):
    """The nearest centroid of every sub-vector by brute force."""
    vectors = sub_vectors(masker, key).permute(0, 1, 3, 2, 4).double()
    if masker.metric == "ip":
        missing = (state.book.reach.double() - vectors.square().sum(-1)).clamp(min=0).sqrt()
        vectors = torch.cat([vectors, missing.unsqueeze(-1)], -1)
    return torch.cdist(vectors, state.book.entries.double()).argmin(-1)


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_context_and_later_keys_have_the_codes_of_their_nearest_centroids(calls, metric):
    masker = PQCache(**SMALL, metric=metric)
    inputs = calls.make(key_len=60)
    state = with_state(masker, inputs, 50).state
    frozen = state.book.centroids.clone()
    assert state.codes.data.dtype == torch.uint8
    assert torch.equal(state.codes.first(60).long(), nearest(masker, state, inputs.key))
    for index in range(50, 60):
        last = inputs.key[:, :, index : index + 1]
        masker.append(state, last, last, torch.tensor([index], dtype=torch.int32))
    assert torch.equal(state.codes.first(60).long(), nearest(masker, state, inputs.key))
    assert torch.equal(state.book.centroids, frozen)


def test_the_inner_product_metric_makes_all_norms_equal(calls):
    masker = PQCache(**SMALL, metric="ip")
    inputs = calls.make(key_len=40)
    state = with_state(masker, inputs).state
    vectors = sub_vectors(masker, inputs.key[:, :, 2:])
    assert torch.allclose(state.book.reach[..., 0], vectors.square().sum(-1).amax(2))
    widened = codes_module.split(inputs.key[:, :, 2:], 2, state.book.reach)
    norms = widened.square().sum(-1)
    assert torch.allclose(norms, state.book.reach.expand(norms.shape), rtol=1e-5)


def clusters_of(key, bits=2, parts=1, metric="euclidean"):
    masker = PQCache(pq_bits=bits, pq_group_factor=parts, metric=metric)
    inputs = call_of(key)
    return Clusters(masker.init_state(layer_info(inputs)), key[0])


def call_of(key):
    """A call that has nothing but keys ``(1, kv_heads, keys, head_dim)``."""
    return Inputs(
        query=key[:, :, :1],
        key=key,
        value=key,
        allowed=Allowed.causal(1, key.shape[2]),
        scaling=1.0,
        key_len=key.shape[2],
    )


@pytest.mark.parametrize("pieces", [False, True])
def test_a_round_of_k_means_takes_the_means_of_the_nearest_keys(monkeypatch, pieces):
    if pieces:
        monkeypatch.setattr(clustering, "WORK_BYTES", 1)
    key = torch.randn(1, 2, 30, 6, generator=torch.Generator().manual_seed(1))
    clusters = clusters_of(key, parts=3)
    start = clusters.at(torch.tensor([3, 8, 20, 29]).expand(2, 3, -1))
    means, codes = clusters.round(start)
    for head, part in itertools.product(range(2), range(3)):
        points = key[0, head, :, 2 * part : 2 * part + 2]
        own = torch.cdist(points, points[[3, 8, 20, 29]]).argmin(1)
        assert torch.equal(codes[head, part].long(), own)
        for entry in range(4):
            assert torch.allclose(means[head, part, entry], points[own == entry].mean(0), atol=1e-6)


def test_an_empty_cluster_moves_to_the_farthest_key():
    points = torch.tensor([0.0, 0.1, 0.2, 5.0, 9.0, 9.1]).view(1, 1, 6, 1)
    clusters = clusters_of(points)
    start = torch.tensor([0.1, 9.0, 100.0, 200.0]).view(1, 1, 4, 1)
    means, codes = clusters.round(start)
    assert codes.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    # 5.0 lies 4.0 from its centroid, and of the others 0.0 and 0.2 and 9.1 lie 0.1 from theirs
    assert means[0, 0, 2].item() == 5.0
    assert means[0, 0, 3].item() != 5.0
    assert means.isfinite().all()


def test_equal_keys_and_few_distinct_ones_are_clustered_without_nan():
    key = torch.ones(1, 1, 50, 4)
    key[:, :, 25:] = 3.0
    centroids = clusters_of(key).centroids(5, Random(), 0)
    assert centroids.isfinite().all()
    gaps = torch.cdist(key[0], centroids[:, 0]).amin(-1)
    assert float(gaps.max()) == 0.0


def test_every_round_of_k_means_brings_the_keys_nearer():
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(8, 4, generator=generator) * 20
    key = (middles.repeat(40, 1) + torch.randn(320, 4, generator=generator)).view(1, 1, 320, 4)
    costs = []
    for rounds in (0, 1, 2, 5, 20):
        centroids = clusters_of(key, bits=3).centroids(rounds, Random(seed=5), 0)
        costs.append(float(torch.cdist(key[0], centroids[:, 0]).amin(-1).square().mean()))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.7 * costs[0]


def test_the_same_seed_gives_the_same_centroids_and_another_one_others(calls):
    inputs = calls.make(key_len=60)
    books = [
        with_state(PQCache(**SMALL), inputs, seed=seed).state.book.centroids for seed in (1, 1, 2)
    ]
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_the_first_keys_do_not_shape_the_centroids(calls):
    masker = PQCache(**SMALL)
    inputs = calls.make(key_len=40)
    moved = inputs.key.clone()
    moved[:, :, :2] += 100
    books = [
        with_state(masker, attrs.evolve(inputs, key=key)).state.book.centroids
        for key in (inputs.key, moved)
    ]
    assert torch.equal(*books)


@pytest.mark.parametrize("first", [None, [0, 5]])
@pytest.mark.parametrize("context", [0, 7, 16])
def test_with_no_more_keys_than_centroids_the_keys_are_the_centroids(calls, first, context):
    masker = PQCache(heavy_size=3, pq_bits=4)
    inputs = with_state(masker, calls.make(key_len=19, query_len=1, first=first), context)
    logits = masker.logits(inputs)
    exact = REFERENCE.logits(inputs.query, inputs.key, inputs.scaling)
    for b, skip in enumerate(first or [0, 0]):
        known = slice(skip, skip + 16)
        assert torch.allclose(logits[b, ..., known], exact[b, ..., known], atol=1e-5)


def test_a_rolled_back_question_leaves_no_trace_in_a_short_codebook(calls):
    masker = PQCache(heavy_size=3, pq_bits=4)
    inputs = calls.make(key_len=20, query_len=1)
    state = with_state(masker, attrs.evolve(inputs, key=inputs.key[:, :, :9], key_len=9)).state
    token = state.snapshot()
    other = torch.randn(2, 2, 11, 8) * 5
    masker.append(state, other, other, 9)
    state.restore(token)
    rest = inputs.key[:, :, 9:]
    masker.append(state, rest, rest, 9)
    fresh = with_state(masker, inputs, 9).state
    assert torch.equal(state.codes.first(20), fresh.codes.first(20))
    assert torch.equal(state.book.entries, fresh.book.entries)


def test_a_state_gone_back_before_the_end_of_the_context_is_clustered_anew(calls):
    masker = PQCache(**SMALL)
    inputs = calls.make(key_len=30)
    state = masker.init_state(layer_info(inputs))
    masker.append(state, inputs.key[:, :, :20], inputs.key[:, :, :20], 0)
    short = attrs.evolve(
        calls.make(key_len=20), key=inputs.key[:, :, :20], value=inputs.value[:, :, :20]
    )
    prefill = attrs.evolve(short, state=state)
    before = masker.add_mask(prefill, Mask.empty(prefill.shape)).to_dense()
    token = state.snapshot()
    masker.end_prefill(state, with_step(context_only(inputs, 20), 0, state))
    first = state.codes.first(20).clone()
    state.restore(token)
    again = masker.add_mask(prefill, Mask.empty(prefill.shape)).to_dense()
    assert torch.equal(before, again)
    masker.end_prefill(state, with_step(context_only(inputs, 20), 0, state))
    assert torch.equal(state.codes.first(20), first)


def test_a_length_on_the_device_selects_what_a_host_length_does(calls):
    for bits in (2, 6):
        masker = PQCache(heavy_size=0.3, pq_bits=bits)
        inputs = with_state(masker, calls.make(query_len=1, first=[0, 6]), 19)
        wanted = calls.effective(masker.add_mask(inputs, Mask.empty(inputs.shape)), inputs)
        captured = calls.captured(inputs)
        state = masker.init_state(layer_info(captured))
        masker.append(state, inputs.key[:, :, :19], inputs.value[:, :, :19], 0)
        masker.end_prefill(state, with_step(context_only(inputs, 19), 0, state))
        last = inputs.key[:, :, 19:]
        masker.append(state, last, last, torch.tensor([19], dtype=torch.int32))
        captured = attrs.evolve(captured, state=state)
        mask = masker.add_mask(captured, Mask.empty(captured.shape))
        assert torch.equal(calls.effective(mask, captured)[..., :20], wanted)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                is_view = any(
                    isinstance(a, torch.Tensor)
                    and a.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                    for a in args
                )
                if not is_view:
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_clustering_takes_bounded_memory(monkeypatch, metric):
    for module in (clustering, codes_module, code_ops):
        monkeypatch.setattr(module, "WORK_BYTES", 2**16)
    keys = 6000
    key = torch.randn(1, 1, keys, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = call_of(key)
    masker = PQCache(pq_bits=6, pq_group_factor=2, kmeans_iter=2, metric=metric)
    state = masker.init_state(layer_info(inputs))
    masker.append(state, key, key, 0)
    with Largest() as seen:
        masker.end_prefill(state, with_step(context_only(inputs, keys), 0, state))
    # 8 bytes per key, as the random numbers that choose the first centroids and the distances
    # take; distances to all centroids would be 512, the keys in float32 64
    assert seen.bytes <= 8 * keys + 2**16


def test_half_precision_keys_are_clustered_in_float32(calls):
    inputs = calls.make(key_len=40, dtype=torch.bfloat16)
    masker = PQCache(**SMALL)
    half = with_state(masker, inputs)
    whole = with_state(masker, attrs.evolve(inputs, key=inputs.key.float()))
    assert torch.equal(half.state.book.centroids, whole.state.book.centroids)


def test_estimated_logits_follow_the_true_ones(calls):
    inputs = calls.make(key_len=400, head_dim=16)
    exact = REFERENCE.logits(inputs.query, inputs.key, inputs.scaling).flatten(0, 2)
    agreement = []
    for bits in (2, 5, 8):
        masker = PQCache(pq_bits=bits, pq_group_factor=4, init_offset=0)
        found = masker.logits(with_state(masker, inputs)).flatten(0, 2)
        pairs = [torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(exact, found, strict=True)]
        agreement.append(float(sum(pairs)) / len(pairs))
    assert agreement == sorted(agreement)
    assert agreement[1] > 0.8
    assert agreement[2] > 0.95


def test_the_same_masker_twice_selects_twice_as_many(calls):
    masker = PQCache(**SMALL | {"group_reduction": "none"})
    inputs = calls.make(key_len=40)
    once = calls.effective(build_mask((masker,), inputs), inputs)
    twice = calls.effective(build_mask((masker, masker), inputs), inputs)
    assert (once.sum(-1) == 5).all()
    assert (twice.sum(-1) == 10).all()


def test_a_head_that_cannot_be_cut_is_refused(calls):
    inputs = calls.make(head_dim=6)
    with pytest.raises(ParameterError, match="pq_group_factor = 4 .* divisor .* 6"):
        PQCache(pq_group_factor=4).init_state(layer_info(inputs))


def test_bytes_read_are_the_codes(calls):
    assert PQCache(pq_group_factor=4).bytes_read(calls.make()) == 2 * 2 * 20 * 4
