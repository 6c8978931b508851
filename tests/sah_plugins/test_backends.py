"""Backends against the definition of weighted attention in float64."""

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sah_core import Allowed, Inputs, KeyRange, Mask
from sah_core.backend import Problem
from sah_plugins.backends import gather
from sah_plugins.backends.eager import Eager
from sah_plugins.backends.gather import Gather
from sah_plugins.backends.sdpa import Sdpa
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.sink import Sink

pytestmark = pytest.mark.unit

KEYS = 37


def generator(seed):
    return torch.Generator().manual_seed(seed)


def call(
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    query_len=3,
    key_len=KEYS,
    dim=8,
    value_dim=8,
    limits="causal",
    softcap=None,
    sinks=False,
    dtype=torch.float32,
    strided=False,
):
    query = torch.randn(batch, heads, query_len, dim, generator=generator(1))
    room = key_len + 11 if strided else key_len
    key = torch.randn(batch, kv_heads, room, dim, generator=generator(2))
    value = torch.randn(batch, kv_heads, room, value_dim, generator=generator(3))
    return Inputs(
        query=query.to(dtype),
        key=key.to(dtype)[:, :, :key_len],
        value=value.to(dtype)[:, :, :key_len],
        allowed=limits_of(limits, batch, heads, query_len, key_len),
        scaling=0.7,
        key_len=key_len,
        softcap=softcap,
        sinks=torch.randn(heads, generator=generator(4)) * 2 if sinks else None,
    )


def limits_of(kind, batch, heads, query_len, key_len):
    if kind == "causal":
        return Allowed.causal(query_len, key_len)
    if kind == "windowed":
        return Allowed.causal(query_len, key_len, window=6)
    first = torch.tensor([0, key_len - 4, 5][:batch], dtype=torch.int32)
    if kind == "padded":
        return Allowed.causal(query_len, key_len, first=first)
    if kind == "padded and windowed":
        return Allowed.causal(query_len, key_len, first=first, window=6)
    if kind == "one padded":
        return Allowed.causal(query_len, key_len, first=first[1:2])
    if kind == "everything":
        return Allowed.everything(key_len)
    rows = heads if kind == "keep per head" else 1
    keep = torch.rand(batch, rows, query_len, key_len, generator=generator(5)) < 0.6
    keep[0, :, 0] = False
    return Allowed.from_dense(keep)


LIMITS = (
    "causal",
    "windowed",
    "padded",
    "padded and windowed",
    "one padded",
    "everything",
    "keep",
    "keep per head",
)


def distinct(shape, keys, seed=6):
    order = torch.rand(*shape[:-1], keys, generator=generator(seed)).argsort(-1)
    return order[..., : shape[-1]].int()


def ranges(inputs):
    first = inputs.allowed.first.view(-1, 1, 1)
    row = inputs.query_position.unsqueeze(1)
    parts = [KeyRange(first, first, 5, -2, 3), KeyRange(row, row, 7, -6, 1)]
    return Mask.from_ranges(inputs.shape, [*parts, KeyRange(row, row, 3, -8, -5)])


def indices(inputs, *, heads=None, rows=None, batch=None, weighted=False, page=1, count=9):
    heads = heads or inputs.heads
    candidates = -(-inputs.capacity // page)
    count = min(count, candidates)
    shape = (batch or inputs.batch, heads, rows or inputs.query_len, count)
    chosen = distinct(shape, candidates)
    return Mask.from_indices(
        inputs.shape,
        chosen,
        count=torch.randint(0, count + 1, shape[:3], generator=generator(7)).int(),
        probability=torch.rand(shape, generator=generator(8)) * 0.9 + 0.05 if weighted else None,
        page_size=page,
        origin=inputs.allowed.first if page > 1 else None,
    )


def dense_form(inputs, **changes):
    mask = indices(inputs, weighted=True, **changes)
    return Mask.from_dense(mask.to_dense(), inputs.shape)


FORMS = {
    "empty": lambda i: Mask.empty(i.shape),
    "full": lambda i: Mask.full(i.shape),
    "ranges": ranges,
    "empty ranges": lambda i: Mask.from_ranges(
        i.shape, [KeyRange(i.query_position[:, None], i.query_position[:, None], 0, 1, 1)]
    ),
    "no entry": lambda i: Mask.from_indices(i.shape, torch.zeros(1, 1, 1, 0).int()),
    "indices": indices,
    "indices of kv heads": lambda i: indices(i, heads=i.kv_heads),
    "indices of one head": lambda i: indices(i, heads=1),
    "indices shared by rows": lambda i: indices(i, heads=i.kv_heads, rows=1),
    "indices shared by all": lambda i: indices(i, heads=1, rows=1, batch=1),
    "weighted": lambda i: indices(i, weighted=True),
    "weighted of kv heads": lambda i: indices(i, weighted=True, heads=i.kv_heads),
    "weighted of one head": lambda i: indices(i, weighted=True, heads=1, rows=1),
    "pages": lambda i: indices(i, page=5, count=4),
    "weighted pages of kv heads": lambda i: indices(
        i, page=5, count=4, weighted=True, heads=i.kv_heads
    ),
    "ranges and indices": lambda i: ranges(i) | indices(i),
    "ranges and weighted pages": lambda i: ranges(i) | indices(i, page=4, count=3, weighted=True),
    "dense": dense_form,
    "dense and the rest": lambda i: ranges(i) | dense_form(i) | indices(i, heads=1),
}


def definition(inputs, mask):
    """``sum_i (e^l_i / p_i) v_i / sum_i (e^l_i / p_i)`` of every row, and the log of the sum."""
    batch, heads, query_len, key_len = inputs.shape
    probability = mask.to_dense().double()
    keep = inputs.allowed.to_dense(key_len).expand(inputs.shape)
    query, key, value = (t.double() for t in (inputs.query, inputs.key, inputs.value))
    output = torch.zeros(batch, query_len, heads, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, query_len), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(query_len):
                total = 0.0
                if inputs.sinks is not None:
                    total = inputs.sinks[h].double().exp()
                weighted = torch.zeros(value.shape[3], dtype=torch.float64)
                for k in range(key_len):
                    p = probability[b, h, q, k]
                    if keep[b, h, q, k] and p > 0:
                        logit = query[b, h, q] @ key[b, h // inputs.group, k] * inputs.scaling
                        if inputs.softcap is not None:
                            logit = torch.tanh(logit / inputs.softcap) * inputs.softcap
                        weight = logit.exp() / p
                        total = total + weight
                        weighted += weight * value[b, h // inputs.group, k]
                if total > 0:
                    output[b, q, h] = weighted / total
                    lse[b, h, q] = total.log()
    return output, lse


def exact(inputs, mask):
    """The reference in float64, itself tested against the definition."""
    wide = attrs.evolve(
        inputs,
        query=inputs.query.double(),
        key=inputs.key.double(),
        value=inputs.value.double(),
    )
    return Eager().attend(wide, mask)


def assert_agrees(result, expected, atol=1e-5):
    output, lse = result
    torch.testing.assert_close(output.double(), expected[0].double(), atol=atol, rtol=0)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected[1].double(), atol=atol, rtol=1e-5)


def by_indices(inputs, mask):
    """What `gather` does on a GPU: ranges as indices, nothing waits for the device."""
    mask = mask.to_selected()
    if mask.is_full:
        allowed = inputs.allowed
        mask = Mask.from_ranges(
            inputs.shape, [KeyRange(allowed.start, allowed.stop, inputs.capacity)]
        )
    output, lse = gather.attend_block(inputs, mask, by_slices=False)
    return output.transpose(1, 2), lse


WAYS = {"gather": Gather().attend, "gather by indices": by_indices}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_eager_is_the_definition(form, limits):
    inputs = call(limits=limits, query_len=2, key_len=13, value_dim=5)
    mask = FORMS[form](inputs)
    assert_agrees(Eager().attend(inputs, mask), definition(inputs, mask))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("form", ["empty", "full", "weighted", "ranges"])
def test_eager_takes_softcap_and_sinks_as_defined(form, sinks, softcap):
    inputs = call(softcap=softcap, sinks=sinks, key_len=13, limits="padded")
    mask = FORMS[form](inputs)
    assert_agrees(Eager().attend(inputs, mask), definition(inputs, mask))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_gather_agrees_with_eager_on_every_form_and_limit(form, limits, way):
    inputs = call(limits=limits)
    mask = FORMS[form](inputs)
    assert_agrees(way(inputs, mask), exact(inputs, mask))


SHAPES = {
    "one row": {"query_len": 1},
    "one row of one sequence": {"query_len": 1, "batch": 1},
    "as many kv heads": {"heads": 3, "kv_heads": 3},
    "one kv head": {"heads": 6, "kv_heads": 1, "query_len": 1},
    "other value size": {"value_dim": 3},
    "strided": {"strided": True},
    "strided, other value size, one row": {"strided": True, "value_dim": 12, "query_len": 1},
    "one key": {"query_len": 1, "key_len": 1},
    "prefill": {"query_len": KEYS},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True, "query_len": 1},
    "softcap and sinks": {"softcap": 0.8, "sinks": True},
    "three sequences": {"batch": 3, "sinks": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("limits", ["causal", "padded", "keep"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "form",
    ["empty", "full", "ranges", "weighted of kv heads", "ranges and weighted pages", "dense"],
)
def test_gather_agrees_with_eager_on_every_shape(form, shape, limits, way):
    inputs = call(limits=limits, **shape)
    mask = FORMS[form](inputs)
    assert_agrees(way(inputs, mask), exact(inputs, mask))


@pytest.mark.parametrize("layout", ["heads last", "wider rows", "offset", "expanded heads"])
@pytest.mark.parametrize("form", ["indices", "ranges and indices"])
def test_gather_reads_keys_in_any_layout(layout, form):
    inputs = call()
    key, value = inputs.key, inputs.value
    if layout == "heads last":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value)]
    elif layout == "wider rows":
        views = [torch.cat([t, t], dim=3)[..., 8:] for t in (key, value)]
    elif layout == "offset":
        views = [torch.cat([t[:, :, :3] + 9, t], dim=2)[:, :, 3:] for t in (key, value)]
    else:
        views = [t[:, :1].expand(-1, 2, -1, -1) for t in (key, value)]
    inputs = attrs.evolve(inputs, key=views[0], value=views[1])
    mask = FORMS[form](inputs)
    assert_agrees(Gather().attend(inputs, mask), exact(inputs, mask))


@pytest.mark.parametrize("limits", ["causal", "padded"])
def test_gather_in_blocks_of_rows_is_gather_at_once(limits, monkeypatch):
    inputs = call(limits=limits, query_len=20)
    for form in ("ranges", "indices", "ranges and weighted pages", "weighted"):
        mask = FORMS[form](inputs)
        whole = Gather().attend(inputs, mask)
        with monkeypatch.context() as patch:
            patch.setattr(gather, "ROWS", 3)
            patch.setattr(gather, "ROW_BYTES", 1)
            assert_agrees(Gather().attend(inputs, mask), whole)


@pytest.mark.parametrize("form", ["full", "ranges", "weighted", "ranges and weighted pages"])
@pytest.mark.parametrize("backend", [Eager(), Gather()], ids=lambda b: b.name)
def test_half_precision_is_within_one_percent_of_float64(backend, form):
    inputs = call(dtype=torch.bfloat16, dim=32, value_dim=32, limits="padded")
    mask = FORMS[form](inputs)
    output, _ = backend.attend(inputs, mask)
    expected, _ = exact(inputs, mask)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", [Eager(), Gather()], ids=lambda b: b.name)
def test_float64_stays_float64(backend):
    inputs = call(dtype=torch.float64)
    mask = FORMS["ranges and indices"](inputs)
    output, _ = backend.attend(inputs, mask)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, definition(inputs, mask)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", [Eager(), Gather(), Sdpa()], ids=lambda b: b.name)
@pytest.mark.parametrize("factor", [30.0, 300.0])
def test_huge_logits_neither_overflow_nor_vanish(backend, factor):
    inputs = call()
    inputs = attrs.evolve(inputs, query=inputs.query * factor)
    mask = Mask.full(inputs.shape)
    output, _ = backend.attend(inputs, mask)
    torch.testing.assert_close(output.double(), exact(inputs, mask)[0], atol=1e-3, rtol=0)
    sparse = FORMS["weighted"](inputs)
    if backend.name != "sdpa":
        torch.testing.assert_close(
            backend.attend(inputs, sparse)[0].double(), exact(inputs, sparse)[0], atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("backend", [Eager(), Gather()], ids=lambda b: b.name)
@pytest.mark.parametrize(
    "form", ["empty", "empty ranges", "no entry", "ranges", "indices", "dense"]
)
def test_a_row_that_selects_nothing_is_zero_and_never_nan(backend, form):
    inputs = call(limits="padded", query_len=6)
    mask = FORMS[form](inputs)
    output, lse = backend.attend(inputs, mask)
    assert output.isfinite().all()
    present = (mask.to_dense() > 0) & inputs.allowed.to_dense(KEYS)
    nothing = ~present.any(-1)
    assert nothing.any()
    assert (output.transpose(1, 2)[nothing] == 0).all()
    assert (lse[nothing] == float("-inf")).all()


@pytest.mark.parametrize("backend", [Eager(), Gather()], ids=lambda b: b.name)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_probability_of_zero_is_not_attended(backend, heads):
    inputs = call()
    keys = torch.tensor([2, 5, 9, 11], dtype=torch.int32).expand(1, heads, 1, 4)
    chance = torch.tensor([0.5, 0.0, 0.2, 1.0]).expand(1, heads, 1, 4)
    found, _ = backend.attend(inputs, Mask.from_indices(inputs.shape, keys, probability=chance))
    there = keys[..., [0, 2, 3]], chance[..., [0, 2, 3]]
    fewer = Mask.from_indices(inputs.shape, there[0], probability=there[1])
    torch.testing.assert_close(found, Eager().attend(inputs, fewer)[0])


@pytest.mark.parametrize("backend", [Eager(), Gather(), Sdpa()], ids=lambda b: b.name)
def test_backends_do_not_write_to_their_inputs(backend):
    inputs = call(limits="padded", strided=True)
    mask = Mask.full(inputs.shape) if backend.name == "sdpa" else ranges(inputs) | indices(inputs)
    before = [t.clone() for t in (inputs.query, inputs.key, inputs.value)]
    backend.attend(inputs, mask)
    after = (inputs.query, inputs.key, inputs.value)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Dense attention


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    "shape",
    [
        {"query_len": 1},
        {"query_len": 3},
        {"query_len": 3, "heads": 3, "kv_heads": 3},
        {"query_len": KEYS},
        {"query_len": KEYS, "value_dim": 3, "strided": True},
        {"query_len": 5, "batch": 1, "heads": 6, "kv_heads": 1},
        {"query_len": 20, "batch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [512, 4])
def test_sdpa_agrees_with_eager_on_full_masks(shape, limits, rows, monkeypatch):
    monkeypatch.setattr("sah_plugins.backends.sdpa.ROWS", rows)
    if limits == "one padded" and shape.get("batch") == 1:
        shape = shape | {"batch": 2}
    inputs = call(limits=limits, **shape)
    mask = Mask.full(inputs.shape)
    output, lse = Sdpa().attend(inputs, mask)
    assert lse is None
    assert output.shape == (inputs.batch, inputs.query_len, inputs.heads, inputs.value.shape[3])
    torch.testing.assert_close(output.double(), exact(inputs, mask)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("limits", ["causal", "windowed"])
@pytest.mark.parametrize("query_len", [1, 3])
def test_sdpa_takes_outputs_that_lie_by_rows(limits, query_len, monkeypatch):
    """Some kernels of a GPU lay their output out as ``(batch, rows, heads, channels)``."""
    from sah_plugins.backends import sdpa

    kernel = torch.nn.functional.scaled_dot_product_attention

    def by_rows(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    inputs = call(query_len=query_len, limits=limits)
    full = Mask.full(inputs.shape)
    right = Sdpa().attend(inputs, full)[0]
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", by_rows)
    assert torch.equal(Sdpa().attend(inputs, full)[0], right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sdpa_keeps_the_type_of_the_query(dtype):
    inputs = call(dtype=dtype, query_len=KEYS)
    mask = Mask.full(inputs.shape)
    output, _ = Sdpa().attend(inputs, mask)
    expected, _ = exact(inputs, mask)
    assert output.dtype == dtype
    assert (output.double() - expected).norm() <= 1e-2 * expected.norm()


def problem_of(form="full", needs_lse=False, **options):
    inputs = call(**options)
    return Problem.of(inputs, FORMS[form](inputs), needs_lse=needs_lse)


def test_sdpa_refuses_what_it_cannot_do():
    refuses = Sdpa().refuses
    assert refuses(problem_of()) is None
    assert refuses(problem_of(limits="keep")) is None
    assert refuses(problem_of("ranges")) == "only dense attention"
    assert refuses(problem_of(softcap=2.0)) == "no softcap"
    assert refuses(problem_of(sinks=True)) == "no learned sinks"
    assert refuses(problem_of(needs_lse=True)) == "gives no log-sum-exp"


def test_gather_refuses_dense_masks_under_graph_capture_only():
    problem = problem_of("dense")
    assert Gather().refuses(problem) is None
    assert "host sync" in Gather().refuses(attrs.evolve(problem, captured=True))
    assert Gather().refuses(attrs.evolve(problem_of("weighted"), captured=True)) is None
    assert Eager().refuses(problem) is None


# Cost


class Watch(TorchDispatchMode):
    """Remembers the largest result of an operation that is no view, and copies of the cache."""

    def __init__(self):
        super().__init__()
        self.largest = (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, (tensor.numel(), str(func)))
        return result


def long_call(query_len, key_len=8192, heads=4, kv_heads=2, dim=8):
    key = torch.randn(1, kv_heads, key_len + 64, dim, generator=generator(0))[:, :, :key_len]
    return Inputs(
        query=torch.randn(1, heads, query_len, dim, generator=generator(1)),
        key=key,
        value=key,
        allowed=Allowed.causal(query_len, key_len),
        scaling=0.3,
        key_len=key_len,
    )


@pytest.mark.parametrize("query_len", [1, 64])
def test_nothing_of_the_size_of_queries_times_keys_is_made_on_the_way_to_gather(query_len):
    inputs = long_call(query_len)
    with Watch() as watch:
        mask = Sink(sink_size=16).add_mask(inputs, Mask.empty(inputs.shape))
        mask = Local(window_size=32).add_mask(inputs, mask)
        output, _ = Gather().attend(inputs, mask)
    # 16 + 32 keys a row, and a block of rows reads the union of its windows
    assert watch.largest[0] <= inputs.heads * query_len * (16 + 32 + query_len), watch
    assert watch.largest[0] < query_len * inputs.capacity
    torch.testing.assert_close(output, Eager().attend(inputs, mask)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("query_len", [1, 8])
@pytest.mark.parametrize("page", [1, 16])
def test_the_cost_of_gather_follows_the_selection(query_len, page, way):
    inputs = long_call(query_len, key_len=32768)
    entries = 64 // page
    mask = indices(inputs, page=page, count=entries, weighted=True)
    position = inputs.query_position.unsqueeze(1)
    mask = mask | Mask.from_ranges(inputs.shape, [KeyRange(position, position, 32, -31, 1)])
    with Watch() as watch:
        way(inputs, mask)
    gathered = inputs.heads * query_len * (64 + 32) * inputs.query.shape[3]
    assert watch.largest[0] <= gathered, watch.largest
    assert watch.largest[0] < inputs.capacity


def test_a_full_mask_needs_no_mask_tensor_in_sdpa():
    for query_len in (1, 2048):
        inputs = long_call(query_len, key_len=2048)
        with Watch() as watch:
            Sdpa().attend(inputs, Mask.full(inputs.shape))
        assert watch.largest[0] <= inputs.heads * 2048 * inputs.query.shape[3], watch.largest
