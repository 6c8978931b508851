"""The backend `triton` on a real GPU against float64, computed from the dense form of the mask."""

import pytest
import torch

from sah_core.allowed import Allowed
from sah_core.backend import Problem
from sah_core.inputs import Inputs
from sah_core.mask import KeyRange, Mask
from sah_core.ops import REFERENCE, code_width, code_words
from sah_core.randomness import Random
from sah_core.size import Size
from sah_core.state import LayerInfo
from sah_plugins.backends.triton.backend import TritonBackend
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.quest import Quest
from sah_plugins.maskers.sink import Sink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BACKEND = TritonBackend()
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}


def call(batch=2, heads=8, kv_heads=2, query_len=1, key_len=1000, dim=128, value_dim=None, **more):
    torch.manual_seed(more.pop("seed", 0))
    dtype = more.pop("dtype", torch.bfloat16)
    first = more.pop("first", None)
    make = {"device": "cuda", "dtype": dtype}
    query = torch.randn(batch, heads, query_len, dim, **make)
    key = torch.randn(batch, kv_heads, key_len, dim, **make)
    value = torch.randn(batch, kv_heads, key_len, value_dim or dim, **make)
    first = None if first is None else torch.tensor(first, dtype=torch.int32, device="cuda")
    allowed = Allowed.causal(query_len, key_len, first=first, device="cuda")
    given = {"key_len": key_len, "ops": BACKEND.ops, "scaling": dim**-0.5} | more
    return Inputs(query=query, key=key, value=value, allowed=allowed, **given)


def state_for(masker, inputs, upto):
    state = masker.init_state(
        LayerInfo(
            index=0, count=1, batch=inputs.batch, heads=inputs.heads, kv_heads=inputs.kv_heads,
            head_dim=inputs.key.shape[3], value_dim=inputs.value.shape[3],
            capacity=inputs.capacity, first=inputs.allowed.first, dtype=inputs.key.dtype,
            device=inputs.device, ops=inputs.ops,
        )
    )  # fmt: skip
    masker.append(state, inputs.key[:, :, :upto], inputs.value[:, :, :upto], 0)
    return state


def expected(inputs, mask):
    query, key, value = (t.double() for t in (inputs.query, inputs.key, inputs.value))
    key, value = (t.repeat_interleave(inputs.group, 1) for t in (key, value))
    logits = query @ key.transpose(2, 3) * inputs.scaling
    if inputs.softcap is not None:
        logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
    chance = (mask.to_dense() * inputs.allowed.to_dense(key.shape[2])).double()
    logits = torch.where(chance > 0, logits - chance.log(), float("-inf"))
    if inputs.sinks is not None:
        column = inputs.sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    level = logits.logsumexp(-1)
    weights = torch.where(level.unsqueeze(-1) > float("-inf"), logits.softmax(-1), 0.0)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2), level


def check(inputs, mask):
    assert BACKEND.refuses(Problem.of(inputs, mask)) is None
    output, level = BACKEND.attend(inputs, mask)
    right, right_level = expected(inputs, mask)
    error = (output.double() - right).norm() / right.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[inputs.query.dtype], f"relative error {error}"
    torch.testing.assert_close(level.double(), right_level, atol=2e-3, rtol=1e-4)


def mask_of(inputs, heads, *, size=16, capacity=9, chance=False):
    first = inputs.allowed.first.view(-1, 1, 1)
    row = inputs.query_position.unsqueeze(1)
    ranges = [KeyRange(first, first, 20, 0, 20), KeyRange(row, row, 33, -32, 1)]
    lead = (inputs.batch, heads, inputs.query_len)
    there = -(-inputs.capacity // size)
    pages = torch.rand(*lead, there, device="cuda").topk(min(capacity, there)).indices
    count = torch.randint(0, capacity + 1, lead, device="cuda", dtype=torch.int32)
    probability = torch.rand(pages.shape, device="cuda") * 0.9 + 0.1 if chance else None
    selected = Mask.from_indices(
        inputs.shape,
        pages,
        count=count,
        probability=probability,
        page_size=size,
        origin=inputs.allowed.first if size > 1 else None,
    )
    return Mask.from_ranges(inputs.shape, ranges) | selected


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 64), (80, 80), (96, 128), (128, 128), (256, 256)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "shared"), [(8, 2, 2), (8, 2, 8), (4, 4, 4), (16, 1, 1)]
)
def test_types_dimensions_and_groups(dtype, dim, value_dim, heads, kv_heads, shared):
    inputs = call(heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, dtype=dtype)
    check(inputs, mask_of(inputs, shared))


@pytest.mark.parametrize("query_len", [1, 7, 256])
@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("size", [1, 16, 32])
def test_rows_padding_probabilities_and_page_sizes(query_len, chance, size):
    inputs = call(query_len=query_len, first=[0, 123], key_len=700)
    check(inputs, mask_of(inputs, 2, size=size, capacity=12, chance=chance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softcap_and_learned_sinks(dtype):
    inputs = call(softcap=20.0, sinks=torch.randn(8, device="cuda"), dtype=dtype)
    check(inputs, mask_of(inputs, 2, chance=True))


def test_short_contexts_where_ranges_overlap():
    for key_len in (1, 5, 30, 53, 54):
        inputs = call(key_len=key_len)
        check(inputs, mask_of(inputs, 2, capacity=1))


def test_empty_rows_give_zero():
    inputs = call()
    output, level = BACKEND.attend(inputs, Mask.empty(inputs.shape))
    assert not output.any()
    assert torch.isinf(level).all()


def test_strided_caches():
    inputs = call()
    for part in ("key", "value"):
        tensor = getattr(inputs, part).transpose(1, 2).contiguous().transpose(1, 2)
        object.__setattr__(inputs, part, tensor)
    check(inputs, mask_of(inputs, 2))


def test_long_contexts_split_many_ways():
    inputs = call(batch=1, heads=32, kv_heads=8, key_len=40_000)
    for _ in range(3):
        check(inputs, mask_of(inputs, 8, capacity=200))


def same_choice(got, right):
    assert torch.equal(got[1], right[1])
    assert torch.equal(got[0].sort(-1).values, right[0].sort(-1).values)


@pytest.mark.parametrize("candidates", [5, 100, 4096, 8192, 8193, 131_072])
@pytest.mark.parametrize("rounded", [False, True])
def test_top_k_is_exact(candidates, rounded):
    torch.manual_seed(candidates)
    scores = torch.randn(2, 4, 1, candidates, device="cuda") * 3
    if rounded:
        scores = scores.round()
    scores[0, 0, 0, candidates // 20 :] = float("-inf")
    stop = torch.tensor([candidates, candidates * 3 // 4], dtype=torch.int32, device="cuda")
    stop = stop.view(2, 1, 1)
    taken = [KeyRange(stop, stop, 7, -7, 0)]
    for capacity in (1, max(1, candidates // 20), candidates):
        for limits in ({}, {"stop": stop, "taken": taken}):
            got = BACKEND.ops.masked_topk(scores, capacity, **limits)
            same_choice(got, REFERENCE.masked_topk(scores, capacity, **limits))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("ties", [0, 100, 5000])
def test_top_k_of_long_rows_is_exact_whatever_shares_the_leading_bits_of_the_last(spread, ties):
    torch.manual_seed(ties)
    scores = 1.0 + spread * torch.randn(2, 3, 1, 60_000, device="cuda")
    if ties:
        last = scores.sort(descending=True).values[..., 3000:3001]
        scores[..., 20_000 : 20_000 + ties] = last
    count = torch.tensor([0, 2999, 3050], dtype=torch.int32, device="cuda").view(1, 3, 1)
    for limits in ({}, {"count": count}):
        got = BACKEND.ops.masked_topk(scores, 3050, **limits)
        same_choice(got, REFERENCE.masked_topk(scores, 3050, **limits))


@pytest.mark.parametrize("levels", [129, 3000])
def test_top_k_of_few_levels_is_exact(levels):
    torch.manual_seed(levels)
    scores = torch.randint(levels, (2, 4, 1, 50_000), device="cuda").float()
    for capacity in (1, 2500, 50_000):
        got = BACKEND.ops.masked_topk(scores, capacity, levels=levels)
        same_choice(got, REFERENCE.masked_topk(scores, capacity))


@pytest.mark.parametrize("keys", [1000, 50_000])
def test_random_choices_are_exact(keys):
    inputs = call(heads=4, key_len=keys, first=[0, 77])
    place = (Random(seed=9, step=1, layer=3), 4, inputs.query_position, keys, inputs.allowed.first)
    got = BACKEND.ops.random_scores(*place, draw=1)
    assert torch.equal(got, REFERENCE.random_scores(*place, draw=1))
    limits = {"start": inputs.allowed.start, "stop": inputs.allowed.stop}
    got = BACKEND.ops.random_topk(*place, 600, batch=2, draw=1, **limits)
    same_choice(got, REFERENCE.random_topk(*place, 600, batch=2, draw=1, **limits))


@pytest.mark.parametrize("keys", [999, 20_000])
def test_collisions_and_what_is_picked_of_them(keys):
    torch.manual_seed(0)
    make = {"dtype": torch.int16, "device": "cuda"}
    query = torch.randint(30, (2, 8, 150, 1), **make)
    key = torch.randint(30, (2, 2, 150, keys), **make)
    counts = REFERENCE.collisions(query, key)
    assert torch.equal(BACKEND.ops.collisions(query, key), counts)
    draw = torch.rand(2, 8, 1, 1, device="cuda")
    for least in (2, 12):
        right = REFERENCE.pick(counts >= least, 100, None, draw)
        for a, b in zip(BACKEND.ops.pick(counts >= least, 100, None, draw), right, strict=True):
            assert torch.equal(a, b)


def test_cosines_and_logits_of_chosen_keys():
    inputs = call(key_len=3000)
    indices = torch.rand(2, 8, 1, 3000, device="cuda").topk(700).indices.to(torch.int32)
    place = (inputs.query, inputs.key, indices)
    center = torch.randn(2, 2, 128, device="cuda")
    right = REFERENCE.cosines(*place, center)
    torch.testing.assert_close(BACKEND.ops.cosines(*place, center), right, atol=1e-5, rtol=0)
    right = REFERENCE.logits_at(*place, 0.1)
    torch.testing.assert_close(BACKEND.ops.logits_at(*place, 0.1), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("query_len", [1, 9])
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_page_scores(reduction, dtype, query_len, bits):
    inputs = call(dtype=dtype, query_len=query_len)
    low = torch.randn(2, 2, 301, 128, device="cuda", dtype=dtype)
    high = low + torch.rand_like(low)
    got = BACKEND.ops.page_scores(inputs.query, low, high, reduction, bits)
    # on the CPU: a division by a number is a multiplication by its inverse in torch on a GPU
    exact = (t.cpu().float() for t in (inputs.query, low, high))
    right = REFERENCE.page_scores(*exact, reduction, bits).cuda()
    assert (got - right).norm() / right.norm() < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("query_len", [1, 9])
def test_logits(dtype, query_len):
    inputs = call(dtype=dtype, query_len=query_len)
    got = BACKEND.ops.logits(inputs.query, inputs.key, 0.1, 30.0)
    exact = (inputs.query.double().float(), inputs.key.double().float())
    right = REFERENCE.logits(*exact, 0.1, 30.0)
    assert (got - right).norm() / right.norm() < 1e-5


def test_logits_of_two_types():
    inputs = call(dtype=torch.bfloat16)
    got = BACKEND.ops.logits(inputs.query, inputs.key.float(), 0.1)
    right = REFERENCE.logits(inputs.query.float(), inputs.key.float(), 0.1)
    assert (got - right).norm() / right.norm() < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("lists", [2, 8])
def test_labels_are_written_and_read_where_they_lie(dtype, bits, lists):
    inputs = call(dtype=dtype, key_len=901)
    every = torch.arange(128, device="cuda").expand(2, -1)
    some = torch.stack([torch.randperm(128)[:16] for _ in range(lists)]).cuda()

    def written(ops, channels, device):
        heads, count = channels.shape
        words = code_words(count, code_width(bits))
        labels = torch.zeros(2, heads, 1000, words, dtype=torch.int32, device=device)
        affine = torch.zeros(2, heads, 1000, 2, dtype=dtype, device=device)
        key, channels = inputs.key.to(device), channels.to(device)
        ops.label_update(labels, affine, key[:, :, :900], channels, 0, bits)
        at = torch.tensor([900], dtype=torch.int32, device=device)
        ops.label_update(labels, affine, key[:, :, 900:], channels, at, bits)
        return labels.cuda(), affine.cuda()

    for channels in (every, some):
        # on the CPU: a division by a number is a multiplication by its inverse in torch on a GPU
        right = written(REFERENCE, channels, "cpu")
        for got, expected_one in zip(written(BACKEND.ops, channels, "cuda"), right, strict=True):
            assert torch.equal(got, expected_one)
    labels, affine = written(BACKEND.ops, every, "cuda")
    indices = torch.rand(2, 8, 1, 901, device="cuda").topk(300).indices.to(torch.int32)
    place = (inputs.query, labels[:, :, :901], affine[:, :, :901], indices, bits, 0.1, 30.0)
    right = REFERENCE.label_logits_at(*place)
    got = BACKEND.ops.label_logits_at(*place)
    torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key_heads", [2, 8])
def test_signatures_of_new_keys_are_written_where_they_belong(key_heads):
    torch.manual_seed(0)
    layers = [
        (0.1 * torch.randn(key_heads, a, b, device="cuda"), torch.randn(key_heads, 1, b).cuda())
        for a, b in [(128, 128), (128, 128), (128, 32)]
    ]
    key = torch.randn(3, 2, 9, 128, device="cuda", dtype=torch.bfloat16)
    got, right = (torch.zeros(3, key_heads, 20, 1, dtype=torch.int32).cuda() for _ in range(2))
    for words, ops in ((got, BACKEND.ops), (right, REFERENCE)):
        ops.signature_update(words, key[:, :, :8], layers, 4)
        at = torch.tensor([12], dtype=torch.int32, device="cuda")
        ops.signature_update(words, key[:, :, 8:], layers, at)
    assert not got[:, :, :4].any()
    assert not got[:, :, 13:].any()
    # a sum that is 0 but for rounding may have either sign
    assert (got == right).float().mean() > 0.99


@pytest.mark.parametrize("first", [None, [5, 170]])
def test_page_bounds_grow_with_the_keys(first):
    torch.manual_seed(0)
    key = torch.randn(2, 2, 1000, 80, device="cuda", dtype=torch.bfloat16)
    first = None if first is None else torch.tensor(first, dtype=torch.int32, device="cuda")
    low, high = (torch.randn(2, 2, 63, 80, device="cuda").bfloat16() for _ in range(2))
    start = 0
    for new in (700, 1, 1, 1, 290, 7):
        at = start if new > 1 else torch.tensor([start], dtype=torch.int32, device="cuda")
        BACKEND.ops.page_bounds_update(low, high, key[:, :, start : start + new], at, 16, first)
        start += new
    right = REFERENCE.page_bounds(key, 16, first)
    pages = 63 if first is None else 52
    assert torch.equal(low[:, :, :pages], right[0][:, :, :pages])
    assert torch.equal(high[:, :, :pages], right[1][:, :, :pages])


PIPELINES = {
    "quest": [
        Sink(sink_size=16),
        Local(window_size=32),
        Quest(heavy_size=0.1, group_reduction="sum"),
    ],
    "quest per head": [Quest(heavy_size=256, page_size=32)],
    "oracle": [Sink(sink_size=16), Local(window_size=32), OracleTopK(heavy_size=0.05)],
}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_captured_step_follows_the_growing_length(name):
    """One graph of append, selection and attention, replayed while the length grows."""
    steps, room, begin = PIPELINES[name], 2048, 1500
    whole = call(batch=2, heads=8, kv_heads=2, key_len=room, first=[0, 77])
    length = torch.tensor([begin + 1], dtype=torch.int32, device="cuda")
    query = torch.randn(2, 8, 1, 128, device="cuda").bfloat16()
    states = {i: state_for(s, whole, begin) for i, s in enumerate(steps) if s.is_stateful()}

    def step():
        # limits remember what they derived from the length: every pass has its own
        limits = Allowed(
            start=whole.allowed.start, stop=length.view(1, 1, 1), first=whole.allowed.first
        )
        inputs = Inputs(
            query=query, key=whole.key, value=whole.value, allowed=limits, scaling=0.09,
            length=length, ops=BACKEND.ops,
        )  # fmt: skip
        mask = Mask.empty(inputs.shape)
        position = length - 1
        new_key = whole.key.index_select(2, position)
        for i, masker in enumerate(steps):
            if i in states:
                masker.append(states[i], new_key, new_key, position)
                object.__setattr__(inputs, "state", states[i])
            mask = masker.add_mask(inputs, mask)
        return BACKEND.attend(inputs, mask)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for now in range(begin + 1, begin + 60):
        length.fill_(now)
        query.normal_()
        graph.replay()
        key, value = whole.key[:, :, :now], whole.value[:, :, :now]
        limits = Allowed.causal(1, now, first=whole.allowed.first, device="cuda")
        eager = Inputs(
            query=query, key=key, value=value, allowed=limits, scaling=0.09,
            key_len=now, ops=BACKEND.ops,
        )  # fmt: skip
        mask = Mask.empty(eager.shape)
        for masker in steps:
            if masker.is_stateful():
                object.__setattr__(eager, "state", state_for(masker, eager, now))
            mask = masker.add_mask(eager, mask)
        right, _ = expected(eager, mask)
        error = (output.double() - right).norm() / right.norm()
        assert error <= 1e-2, f"at length {now}: {error}"


def test_the_scores_of_a_decode_step_are_not_held_for_all_heads_at_once():
    inputs = call(batch=4, heads=32, kv_heads=8, key_len=131_072)
    masker = OracleTopK(heavy_size=Size(tokens=1024))
    masker.add_mask(inputs, Mask.empty(inputs.shape))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masker.add_mask(inputs, Mask.empty(inputs.shape))
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 4 * 32 * 131_072, f"{taken} bytes, more than one sequence's scores"


def test_overlapping_calls_on_two_streams_do_not_disturb_each_other():
    inputs = call(batch=1, heads=32, kv_heads=8, key_len=20_000)
    mask = mask_of(inputs, 8, capacity=200)
    right, _ = expected(inputs, mask)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            outputs.append(BACKEND.attend(inputs, mask)[0])
    torch.cuda.synchronize()
    for output in outputs:
        assert (output.double() - right).norm() / right.norm() <= 1e-2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_decode_step_waits_for_nothing():
    inputs = call(key_len=4096)
    masker = Quest(heavy_size=Size(tokens=512), group_reduction="sum")
    state = state_for(masker, inputs, 4096)
    object.__setattr__(inputs, "state", state)
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    BACKEND.attend(inputs, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
        BACKEND.attend(inputs, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
