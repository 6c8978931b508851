import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from sah_core import Pipeline, attach, compat, hookimpl
from sah_core.attention import Session
from sah_core.errors import ParameterError, SahError, UnsupportedError
from sah_core.patching import use

pytestmark = [
    pytest.mark.unit,
    # gpt-oss: the tiny configuration's context is shorter than its YaRN settings say
    pytest.mark.usefixtures("quiet", "no_grad"),
]

FAMILIES = ("llama", "gemma2", "gemma3", "gpt-oss")
EVERYTHING = ("local(1.0)", "oracle-top-k(1.0)", "sink(10000)")
ALL_LAYERS = "layer_types=[full_attention, sliding_attention]"
CONTEXT, QUESTION = 24, 5


@pytest.fixture(scope="module")
def built(models):
    """Models with transformers' own eager attention, the one that every family supports."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = models.build(family)
            made[family].set_attn_implementation("eager")
        return made[family]

    return get


def empty_cache(model):
    return DynamicCache(config=model.config)


def forward(model, ids, kv_cache=None, **options):
    if kv_cache is not None:
        options[compat.cache_argument(type(model).forward)] = kv_cache
    return model(ids, use_cache=kv_cache is not None, **options).logits


def generate(model, ids, new_tokens=8, **options):
    # no token ends it: every run gives as many tokens
    return model.generate(
        ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=[1000],
        pad_token_id=0,
        **options,
    )[:, ids.shape[1] :]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# Selecting everything


@pytest.mark.parametrize("where", ["layer_types=[full_attention]", ALL_LAYERS])
@pytest.mark.parametrize("backend", ["eager", "gather", "auto"])
@pytest.mark.parametrize("steps", EVERYTHING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_that_selects_everything_equals_dense(
    models, built, family, steps, backend, where
):
    model, ids = built(family), models.tokens(1, CONTEXT + QUESTION)
    dense = forward(model, ids)
    with attach(model, f"{steps} @ prefill=sparse, backend={backend}, {where}"):
        close(forward(model, ids), dense)
        kv_cache = empty_cache(model)
        parts = [forward(model, ids[:, :CONTEXT], kv_cache)]
        parts.append(forward(model, ids[:, CONTEXT:], kv_cache))
        close(torch.cat(parts, 1), dense)


@pytest.mark.parametrize("phases", ["prefill=dense", "prefill=sparse", "question=dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_the_same_tokens_too(models, built, family, phases):
    model, ids = built(family), models.tokens(1, CONTEXT, seed=1)
    dense = generate(model, ids)
    for steps in EVERYTHING:
        with attach(model, f"{steps} @ {phases}, {ALL_LAYERS}") as session:
            assert torch.equal(generate(model, ids), dense)
        assert session.backends_used


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_other_families_work_as_well(models, built, family):
    model, ids = built(family), models.tokens(1, CONTEXT)
    dense = forward(model, ids)
    with attach(model, f"sink(1.0) @ prefill=sparse, {ALL_LAYERS}"):
        close(forward(model, ids), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_changes_something(models, built, family):
    # the tests above would pass if nothing were patched
    model, ids = built(family), models.tokens(1, CONTEXT)
    dense = forward(model, ids)
    with attach(model, "local(2) @ prefill=sparse"):
        assert (forward(model, ids) - dense).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_phases_equal_whatever_the_model_used_before(models, implementation):
    model, ids = models.build("llama", attn_implementation=implementation), models.tokens(2, 30)
    dense = forward(model, ids)
    with attach(model, "local(2)"):
        close(forward(model, ids), dense)


# Causality

SPARSE = (
    "sink(2) | local(4)",
    "sink(1) | local(0.2)",
    "causal | sink(2) | local(3)",
    "sink(2) | local(2) | oracle-top-k(3)",
    "oracle-top-k(0.3)",
)  # quest bounds whole pages, the keys behind a query included: see its definition


@pytest.mark.parametrize("backend", ["eager", "gather"])
@pytest.mark.parametrize("steps", [*SPARSE, *EVERYTHING])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_future_token_never_changes_earlier_logits(models, built, family, steps, backend):
    model, ids = built(family), models.tokens(1, CONTEXT)
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1 - 5) % 100 + 5
    with attach(model, f"{steps} @ prefill=sparse, backend={backend}, {ALL_LAYERS}"):
        one, other = forward(model, ids), forward(model, changed)
    torch.testing.assert_close(one[:, :17], other[:, :17], atol=1e-6, rtol=0)
    assert (one[:, 17:] - other[:, 17:]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("steps", ["dense", *SPARSE[:1], SPARSE[3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunked_prefill_is_causal_and_equals_one_pass(models, built, family, steps, chunk):
    model, ids = built(family), models.tokens(1, CONTEXT)
    pipeline = Pipeline.parse(steps if steps == "dense" else f"{steps} @ prefill=sparse")

    def run(tokens, size):
        kv_cache, parts = empty_cache(model), []
        with attach(model, pipeline, observers=[object()]) as session:
            session.phase = "prefill"
            for piece in tokens.split(size, dim=1):
                parts.append(forward(model, piece, kv_cache))
        return torch.cat(parts, 1)

    whole = run(ids, CONTEXT)
    close(run(ids, chunk), whole)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1 - 5) % 100 + 5
    # the experts of gpt-oss see other batches
    torch.testing.assert_close(
        run(ids, chunk)[:, :20], run(changed, chunk)[:, :20], atol=1e-5, rtol=0
    )


# Batches with padding


def left_padded(models, short, long):
    one, two = models.tokens(1, short, seed=2), models.tokens(1, long, seed=3)
    padded = torch.cat([torch.zeros(1, long - short, dtype=torch.long), one], 1)
    mask = torch.ones(2, long, dtype=torch.long)
    mask[0, : long - short] = 0
    return one, two, torch.cat([padded, two]), mask


@pytest.mark.parametrize("backend", ["eager", "gather"])
@pytest.mark.parametrize(
    "steps",
    ["sink(2) | local(3)", "sink(0.1) | local(0.2) | oracle-top-k(0.2)", "quest(4, page_size=4)"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_single_runs(models, built, family, steps, backend):
    model = built(family)
    one, two, both, mask = left_padded(models, 17, 23)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    pipeline = f"{steps} @ prefill=sparse, backend={backend}"
    with attach(model, pipeline):
        together = forward(model, both, attention_mask=mask, position_ids=position)
    for index, ids in enumerate((one, two)):
        with attach(model, pipeline):
            close(together[index : index + 1, -ids.shape[1] :], forward(model, ids))
    with attach(model, pipeline):
        answers = generate(model, both, attention_mask=mask)
    for index, ids in enumerate((one, two)):
        with attach(model, pipeline):
            assert torch.equal(answers[index], generate(model, ids)[0])


def test_padding_between_context_and_question_is_left_out(models, built):
    model, context = built("llama"), models.tokens(1, 12)
    short, long = models.tokens(1, 2, seed=4), models.tokens(1, 4, seed=5)
    pipeline = "sink(2) | local(3) | oracle-top-k(4)"

    def answer(question):
        kv_cache = empty_cache(model)
        forward(model, context, kv_cache)
        with attach(model, pipeline):
            return forward(model, question, kv_cache)[:, -1]

    kv_cache = empty_cache(model)
    forward(model, context.expand(2, -1), kv_cache)
    questions = torch.cat([torch.cat([torch.zeros_like(short), short], 1), long])
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 12:14] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, 12:]
    for backend in ("eager", "gather"):
        branch = copy.deepcopy(kv_cache)
        with attach(model, f"oracle-top-k(1.0) @ backend={backend}"):
            both = forward(model, questions, branch, attention_mask=mask, position_ids=position)
        branch = copy.deepcopy(kv_cache)
        dense = forward(model, questions, branch, attention_mask=mask, position_ids=position)
        close(both[:, -1], dense[:, -1])
    close(both[1:, -1], dense[1:, -1])
    branch = copy.deepcopy(kv_cache)
    with attach(model, pipeline):
        both = forward(model, questions, branch, attention_mask=mask, position_ids=position)
    close(both[1:, -1], answer(long))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_given_to_forward_is_kept(models, built, kind):
    model, ids = built("llama"), models.tokens(1, 12)
    keep = torch.ones(12, 12, dtype=torch.bool).tril()
    keep[6:, 3] = False
    mask = keep[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    dense = forward(model, ids, attention_mask=additive)
    given = mask if kind == "bool" else additive
    for backend in ("eager", "gather"):
        with attach(model, f"sink(1.0) @ prefill=sparse, backend={backend}"):
            close(forward(model, ids, attention_mask=given), dense)


# Attaching and taking off


def implementations(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {config._attn_implementation for config in configs.values()}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_restored_on_every_exit(models, built, error):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    before, dense = implementations(model), forward(model, ids)

    class Observer:
        @hookimpl
        def sah_mask_built(self):
            if error is not None:
                raise error

    block = attach(model, "local(2) @ prefill=sparse", observers=[Observer()])
    if error is None:
        with block:
            forward(model, ids)
    else:
        with pytest.raises(error), block:
            forward(model, ids)
    assert implementations(model) == before == {"eager"}
    assert torch.equal(forward(model, ids), dense)


def test_blocks_may_be_nested_and_repeated(models, built):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    dense = forward(model, ids)
    with attach(model, "local(2) @ prefill=sparse"):
        narrow = forward(model, ids)
    for _ in range(3):
        with attach(model, "local(2) @ prefill=sparse"):
            assert torch.equal(forward(model, ids), narrow)
            with attach(model, "local(1.0) @ prefill=sparse"):
                close(forward(model, ids), dense)
                with pytest.raises(ZeroDivisionError), attach(model, "sink(1) @ prefill=sparse"):
                    raise ZeroDivisionError
                close(forward(model, ids), dense)
            assert torch.equal(forward(model, ids), narrow)
        assert torch.equal(forward(model, ids), dense)


def test_dense_inside_a_sparse_block_is_dense(models, built):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    dense = forward(model, ids)
    with attach(model, "local(2) @ prefill=sparse"), attach(model, "dense"):
        close(forward(model, ids), dense)


def test_two_models_on_one_configuration_do_not_affect_each_other(models):
    config = models.config("llama")
    one, other = models.build("llama", 0, of=config), models.build("llama", 1, of=config)
    ids = models.tokens(1, CONTEXT)
    dense = forward(one, ids), forward(other, ids)
    with attach(one, "local(2) @ prefill=sparse"):
        assert (forward(one, ids) - dense[0]).abs().max() > 0.1
        close(forward(other, ids), dense[1])
        with attach(other, "sink(1) | local(1) @ prefill=sparse"):
            narrow = forward(other, ids)
        close(forward(other, ids), dense[1])
    with attach(other, "sink(1) | local(1) @ prefill=sparse"):
        assert torch.equal(forward(other, ids), narrow)
        close(forward(one, ids), dense[0])
    assert torch.equal(forward(one, ids), dense[0])
    assert torch.equal(forward(other, ids), dense[1])


def test_blocks_on_one_configuration_may_end_in_any_order(models):
    config = models.config("llama")
    one, other = models.build("llama", 0, of=config), models.build("llama", 1, of=config)
    ids, before = models.tokens(1, CONTEXT), config._attn_implementation
    dense = forward(one, ids), forward(other, ids)
    first, second = (attach(m, "local(2) @ prefill=sparse") for m in (one, other))
    first.__enter__()
    second.__enter__()
    narrow = forward(other, ids)
    first.__exit__(None, None, None)
    assert torch.equal(forward(other, ids), narrow)
    close(forward(one, ids), dense[0])
    second.__exit__(None, None, None)
    assert config._attn_implementation == before
    assert torch.equal(forward(one, ids), dense[0])
    assert torch.equal(forward(other, ids), dense[1])


def test_a_block_leaves_nothing_behind(models):
    model = models.build("llama")
    with attach(model, "local(2)"):
        forward(model, models.tokens(1, 4))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_each_part_of_a_model_gets_its_own_implementation_back(models):
    # what composite models are allowed to be: parts of different implementations
    model = models.build("llama", attn_implementation="eager")
    ids = models.tokens(1, CONTEXT)
    part = copy.copy(model.config)
    part._attn_implementation = "sdpa"
    model.model.layers[1].self_attn.config = part
    before = implementations(model)
    with attach(model, "local(2) @ prefill=sparse"):
        forward(model, ids)
    assert implementations(model) == before == {"eager", "sdpa"}


@pytest.mark.parametrize("lacks", ["_supports_attention_backend", "_can_set_attn_implementation"])
def test_a_model_without_the_attention_interface_is_refused(models, lacks):
    model = models.build("llama")
    answer = False if lacks.startswith("_supports") else classmethod(lambda cls: False)
    model.__class__ = type("Other", (type(model),), {lacks: answer})
    with pytest.raises(UnsupportedError, match="Other"), attach(model, "local(2)"):
        pass
    assert implementations(model) == {"sdpa"}


def test_layers_that_the_model_does_not_have_are_refused(built):
    with pytest.raises(ParameterError), attach(built("llama"), "local(2) @ dense_layers=[2]"):
        pass


def test_an_attention_argument_that_changes_the_meaning_is_refused(models, built):
    model, ids = built("llama"), models.tokens(1, 4)
    with attach(model, "local(2)"), pytest.raises(UnsupportedError, match="position_bias"):
        model(ids, position_bias=torch.zeros(1))


# Where a pipeline applies


class Seen:
    """Records the layers and phases in which masks were built."""

    def __init__(self):
        self.calls = []

    @hookimpl
    def sah_mask_built(self, inputs, mask):
        if not mask.is_full:
            self.calls.append((inputs.phase, inputs.layer))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {("decode", 1)}),
        ("prefill=sparse", {("prefill", 1), ("decode", 1)}),
        ("decode=dense, prefill=sparse", {("prefill", 1)}),
        (ALL_LAYERS, {("decode", 0), ("decode", 1)}),
        (f"{ALL_LAYERS}, dense_layers=[1]", {("decode", 0)}),
        (f"{ALL_LAYERS}, layers=[1]", {("decode", 1)}),
        ("layer_types=[sliding_attention]", {("decode", 0)}),
    ],
)
def test_layers_layer_types_and_phases_say_where_it_is_sparse(models, built, options, expected):
    model, seen = built("gemma3"), Seen()
    pipeline = "sink(1) | local(2)" + (f" @ {options}" if options else "")
    with attach(model, pipeline, observers=[seen]):
        generate(model, models.tokens(1, CONTEXT), 3)
    assert set(seen.calls) == expected


def test_phases_are_inferred_from_shapes(models, built):
    model, seen, kv_cache = built("llama"), Seen(), empty_cache(built("llama"))
    with attach(model, "local(2) @ prefill=sparse, layers=[0]", observers=[seen]):
        for length in (CONTEXT, QUESTION, 1):
            forward(model, models.tokens(1, length), kv_cache)
    assert [phase for phase, _ in seen.calls] == ["prefill", "question", "decode"]


# The cache


def run_through(model, kv_cache, ids):
    kv_cache_logits = [
        forward(model, ids[:, :10], kv_cache),
        forward(model, ids[:, 10:15], kv_cache),
    ]
    kv_cache_logits += [
        forward(model, ids[:, i : i + 1], kv_cache) for i in range(15, ids.shape[1])
    ]
    return torch.cat(kv_cache_logits, 1)


@pytest.mark.parametrize("capacity", [4, 20, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_preallocated_cache_equals_transformers_own_bit_for_bit(
    models, built, family, capacity
):
    model, ids = built(family), models.tokens(2, CONTEXT)
    own, dynamic = compat.make_cache(model, capacity), empty_cache(model)
    assert any(compat.kind_of(layer) == "length" for layer in own.layers)
    assert torch.equal(run_through(model, own, ids), run_through(model, dynamic, ids))
    for one, other in zip(own.layers, dynamic.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert int(one.get_seq_length()) == int(other.get_seq_length())
        assert one.get_mask_sizes(1) == other.get_mask_sizes(1)


def test_cropping_reordering_and_batch_operations_equal_transformers_own(models, built):
    model, ids = built("llama"), models.tokens(3, CONTEXT)
    own, dynamic = compat.make_cache(model, 30), empty_cache(model)
    operations = [
        lambda c: c.crop(-4),
        lambda c: c.reorder_cache(torch.tensor([2, 0, 1])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0, 3, 5])),
    ]
    for kv_cache in (own, dynamic):
        forward(model, ids, kv_cache)
    for operation in operations:
        for kv_cache in (own, dynamic):
            operation(kv_cache)
        for one, other in zip(own.layers, dynamic.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
    logits = [forward(model, ids[:, :2], kv_cache) for kv_cache in (own, dynamic)]
    assert torch.equal(*logits)


def test_a_reset_cache_starts_again(models, built):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    kv_cache = compat.make_cache(model, 30)
    first = forward(model, ids, kv_cache)
    kv_cache.reset()
    assert torch.equal(forward(model, ids, kv_cache), first)


def test_an_unknown_kind_of_cache_layer_is_refused(built):
    kv_cache = empty_cache(built("llama"))
    kv_cache.layers[1] = StaticLayer(max_cache_len=16)
    with pytest.raises(UnsupportedError, match="StaticLayer"):
        compat.snapshot_cache(kv_cache)


def test_a_model_with_an_unknown_kind_of_cache_layer_is_refused(built, monkeypatch):
    class Strange(StaticLayer):
        pass

    def prepare(cache, *args, **kwargs):
        original(cache, *args, **kwargs)
        cache.layers[0] = Strange(max_cache_len=16)

    original = DynamicCache.__init__
    monkeypatch.setattr(DynamicCache, "__init__", prepare)
    with pytest.raises(UnsupportedError, match="Strange"):
        compat.make_cache(built("llama"), 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_goes_back_to_a_snapshot_any_number_of_times(models, built, family):
    model, ids = built(family), models.tokens(1, CONTEXT + QUESTION)
    kv_cache = compat.make_cache(model, 26)
    forward(model, ids[:, :CONTEXT], kv_cache)
    snapshot = compat.snapshot_cache(kv_cache)
    expected = forward(model, ids)[:, CONTEXT:]
    for turn in range(3):
        compat.restore_cache(kv_cache, snapshot)
        assert int(kv_cache.get_seq_length()) == CONTEXT
        close(forward(model, ids[:, CONTEXT:], kv_cache), expected)
        # other tokens, more of them than the sliding window holds
        forward(model, models.tokens(1, 10 + turn, seed=9), kv_cache)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("begin", [0, 3, CONTEXT])
def test_a_snapshot_can_outlast_that_its_tokens_are_written_over(
    models, built, monkeypatch, begin, offloaded
):
    def held():
        return [(keys.clone(), values.clone()) for _, keys, values in compat.cached_tensors(cache)]

    monkeypatch.setattr("sah_core.compat.cache.devices_of", lambda _: [torch.device("cuda")])
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    cache = compat.make_cache(model, 26, offloaded=offloaded)
    forward(model, ids, cache)
    snapshot, before = compat.snapshot_cache(cache), held()
    for turn in range(2):
        compat.keep_displaced(cache, snapshot, begin)
        compat.shorten_cache(cache, begin)
        # more of them than there is room for
        forward(model, models.tokens(1, 40, seed=turn), cache)
        for _ in range(2):
            compat.restore_cache(cache, snapshot)
            for pair, was in zip(held(), before, strict=True):
                assert all(map(torch.equal, pair, was))
    assert snapshot == [CONTEXT] * len(cache.layers)


@pytest.mark.parametrize("family", ["qwen3-next"])
def test_a_cache_that_is_written_in_place_goes_back_by_copy(models, family):
    model, ids = models.build(family), models.tokens(1, CONTEXT + QUESTION)
    kv_cache = compat.make_cache(model, 64)
    forward(model, ids[:, :CONTEXT], kv_cache)
    snapshot = compat.snapshot_cache(kv_cache)
    expected = forward(model, ids)[:, CONTEXT:]
    for _ in range(2):
        compat.restore_cache(kv_cache, snapshot)
        close(forward(model, ids[:, CONTEXT:], kv_cache), expected)


class Outputs(TorchDispatchMode):
    """Records the number of elements that each operation writes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append((str(func.overloadpacket), tuple(result.shape), result))
        return result


def copies(outputs, source_elements):
    names = {
        "aten.cat",
        "aten.clone",
        "aten.copy_",
        "aten.index_select",
        "aten.index",
        "aten._to_copy",
    }
    return [
        (name, shape)
        for name, shape, result in outputs.made
        if name in names and result.numel() >= source_elements
    ]


@pytest.mark.parametrize("steps", ["sink(4) | local(8)", "sink(4) | local(8) | oracle-top-k(8)"])
def test_a_decoded_token_never_copies_the_cache(models, built, steps):
    model, length = built("llama"), 400
    kv_cache = compat.make_cache(model, length + 16)
    forward(model, models.tokens(1, length), kv_cache)
    layer_elements = kv_cache.layers[0].keys.numel()
    with attach(model, f"{steps} @ backend=gather"):
        forward(model, models.tokens(1, 1), kv_cache)
        with Outputs() as outputs:
            forward(model, models.tokens(1, 1, seed=1), kv_cache)
    assert copies(outputs, layer_elements // 2) == []
    own = [(n, s) for n, s, r in outputs.made if len(s) == 4 and s[2] == s[3] == length]
    assert own == []


def test_the_dynamic_cache_does_copy_it(models, built):
    # the measuring instrument of the test above
    model, kv_cache = built("llama"), empty_cache(built("llama"))
    forward(model, models.tokens(1, 400), kv_cache)
    with attach(model, "sink(4) | local(8) @ backend=gather"), Outputs() as outputs:
        forward(model, models.tokens(1, 1), kv_cache)
    assert {name for name, _ in copies(outputs, kv_cache.layers[0].keys.numel() // 2)} == {
        "aten.cat"
    }


def test_no_tensor_of_queries_by_keys_is_made_on_the_way_to_gather(models, built):
    model, length, question = built("llama"), 400, 64
    kv_cache = compat.make_cache(model, length + question)
    forward(model, models.tokens(1, length), kv_cache)
    with attach(model, "sink(4) | local(8) @ backend=gather"), Outputs() as outputs:
        forward(model, models.tokens(1, question), kv_cache)
    square = question * (length + question)
    wide = [(name, shape) for name, shape, _ in outputs.made if shape[-1:] == (length + question,)]
    assert wide == []
    assert [
        n for n, _, r in outputs.made if r.numel() >= square and n.startswith("aten.arange")
    ] == []


# State


def test_a_session_goes_back_to_a_snapshot(models, built):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    pipeline = Pipeline.parse("sink(1) | quest(8, page_size=4)")
    session = Session(pipeline, compat.layer_types(model))
    kv_cache = compat.make_cache(model, 64)
    answers = []
    with use(model, session):
        forward(model, ids, kv_cache)
        cache_snapshot, snapshot = compat.snapshot_cache(kv_cache), session.snapshot()
        for seed in (7, 8, 7):
            compat.restore_cache(kv_cache, cache_snapshot)
            session.restore(snapshot)
            parts = [forward(model, models.tokens(1, 6, seed=seed), kv_cache)]
            parts += [forward(model, models.tokens(1, 1, seed=i), kv_cache) for i in range(5)]
            answers.append(torch.cat(parts, 1))
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_errors_are_one_line(models, built):
    with pytest.raises(SahError) as caught, attach(built("llama"), "local(2) @ layers=[9]"):
        pass
    assert "\n" not in str(caught.value)


def test_a_block_can_be_used_for_one_text_after_another(models, built):
    # what a stateful masker knows of the first text must not reach the second
    model, pipeline = built("llama"), "sink(1) | quest(8, page_size=4) @ prefill=sparse"
    texts = models.tokens(1, CONTEXT), models.tokens(1, CONTEXT + 9, seed=5)
    alone = []
    for ids in texts:
        with attach(model, pipeline):
            alone.append(generate(model, ids))
    with attach(model, pipeline):
        together = [generate(model, ids) for ids in (*texts, texts[0])]
    for one, other in zip((*alone, alone[0]), together, strict=True):
        assert torch.equal(one, other)


def test_a_cache_cropped_behind_the_back_of_a_stateful_masker_is_noticed(models, built):
    model, kv_cache = built("llama"), compat.make_cache(built("llama"), 64)
    with attach(model, "sink(1) | quest(8, page_size=4)"):
        forward(model, models.tokens(1, CONTEXT), kv_cache)
        forward(model, models.tokens(1, 6), kv_cache)
        kv_cache.crop(-4)
        with pytest.raises(UnsupportedError, match="dropped keys"):
            forward(model, models.tokens(1, 2), kv_cache)


# Caches of transformers that are not the adapter's


@pytest.mark.parametrize("pipeline", EVERYTHING)
def test_the_keys_of_a_quantised_cache_are_those_that_it_gives_back(built, models, pipeline):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    # keys are quantised at the end of the context, and again after four more
    config = {"backend": "quanto", "nbits": 2, "q_group_size": 16, "residual_length": 4}
    quantised = {"cache_implementation": "quantized", "cache_config": config}

    def new(**more):
        options = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": [2], **more}
        return model.generate(ids, **options)[0, CONTEXT:].tolist()

    expected = new(**quantised)
    assert expected != new()
    with attach(model, pipeline):
        assert new(**quantised) == expected
    with attach(model, "quest(8, page_size=4)"):
        assert new(**quantised) not in (expected, new())


@pytest.mark.parametrize("name", ["static", "sliding_window"])
def test_a_cache_whose_free_slots_look_like_keys_is_refused(built, models, name):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    with attach(model, "local(4)"), pytest.raises(UnsupportedError, match="fixed length"):
        model.generate(ids, cache_implementation=name, max_new_tokens=4, pad_token_id=0)


class Own(DynamicLayer):
    """A layer of somebody's own."""


class LastFive(Own):
    """One that gives less back than its mask is for."""

    def update(self, *arguments, **options):
        keys, values = super().update(*arguments, **options)
        return keys[:, :, -5:], values[:, :, -5:]


def cache_of(layer):
    kv_cache = DynamicCache()
    kv_cache.layer_class_to_replicate, kv_cache.layers = layer, []
    return kv_cache


def test_a_cache_of_layers_that_are_not_known_is_refused(built, models):
    model, ids = built("llama"), models.tokens(1, CONTEXT)
    expected = forward(model, ids, cache_of(Own))
    with attach(model, "dense"):
        assert torch.equal(forward(model, ids, cache_of(Own)), expected)
    with attach(model, "local(4)"):
        with pytest.raises(UnsupportedError, match="cache layer Own of DynamicCache"):
            forward(model, ids, cache_of(Own))
        assert forward(model, ids, empty_cache(model)).shape == expected.shape


def test_fewer_keys_than_the_mask_is_for_are_noticed(built, models):
    # the decoder alone is no pass of the model, at which caches are looked at
    decoder = built("llama").get_decoder()
    argument = compat.cache_argument(type(decoder).forward)
    with (
        attach(built("llama"), "local(4)"),
        pytest.raises(UnsupportedError, match="gives 5 keys where its mask is for more"),
    ):
        decoder(models.tokens(1, CONTEXT), use_cache=True, **{argument: cache_of(LastFive)})


QUEST = "quest(8, page_size=4)"
TAKEN = {
    "reorder_cache": (torch.tensor([2, 0, 0], dtype=torch.int32), [2, 0, 0]),
    "batch_select_indices": (torch.tensor([False, True, True]), [1, 2]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("method", TAKEN)
@pytest.mark.parametrize("padded", [False, True])
def test_states_follow_the_sequences_of_a_cache_however_they_change_places(
    built, models, method, padded
):
    model, ids = built("llama"), models.tokens(3, CONTEXT + 6)
    real = torch.ones(3, CONTEXT, dtype=torch.long)
    if padded:
        real[1, :9], real[2, :2] = 0, 0

    def read(ids, real, kv_cache, begin, end):
        more = torch.ones(len(ids), end - real.shape[1], dtype=torch.long)
        real = torch.cat([real, more], 1)[:, :end]
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        options = {"attention_mask": real, "position_ids": positions}
        return forward(model, ids[:, begin:end], kv_cache, **options)

    given, rows = TAKEN[method]
    with attach(model, QUEST) as session:
        kv_cache = empty_cache(model)
        read(ids, real, kv_cache, 0, CONTEXT)
        read(ids, real, kv_cache, CONTEXT, CONTEXT + 1)
        getattr(kv_cache, method)(given)
        found = [read(ids[rows], real[rows], kv_cache, n, n + 1) for n in range(25, 30)]
        assert {kept.batch for kept in session.layers.values()} == {len(rows)}
    assert type(kv_cache) is DynamicCache
    with attach(model, QUEST):
        fresh = empty_cache(model)
        read(ids[rows], real[rows], fresh, 0, CONTEXT)
        read(ids[rows], real[rows], fresh, CONTEXT, CONTEXT + 1)
        expected = [read(ids[rows], real[rows], fresh, n, n + 1) for n in range(25, 30)]
    close(torch.cat(found, 1), torch.cat(expected, 1))


@pytest.fixture
def fixed_quest(monkeypatch):
    from sah_plugins.maskers.quest import PageBounds

    monkeypatch.delattr(PageBounds, "reorder")


@pytest.mark.usefixtures("fixed_quest")
def test_a_state_that_cannot_follow_is_refused_and_the_cache_left_as_it_is(built, models):
    model, ids = built("llama"), models.tokens(2, CONTEXT)
    message = r"\(beam search\) with masker 'quest' .*PageBounds\) has no method"
    with attach(model, QUEST):
        with pytest.raises(UnsupportedError, match=message):
            generate(model, ids, num_beams=3)
        kv_cache = empty_cache(model)
        forward(model, ids[:, :-1], kv_cache)
        forward(model, ids[:, -1:], kv_cache)
        before = kv_cache.layers[0].keys.clone()
        with pytest.raises(UnsupportedError, match=message):
            kv_cache.reorder_cache(torch.tensor([1, 0]))
        kv_cache.reorder_cache(torch.tensor([0, 1]))  # nobody changes places
        assert torch.equal(kv_cache.layers[0].keys, before)
    kv_cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(kv_cache.layers[0].keys, before.flip(0))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_cache_is_not_followed_before_the_model_has_run_with_it(built, models, copied):
    model, ids = built("llama"), models.tokens(2, CONTEXT + 2)
    with attach(model, QUEST):
        kv_cache = empty_cache(model)
        forward(model, ids[:, :CONTEXT], kv_cache)
        other = copied(kv_cache)
        with pytest.raises(UnsupportedError, match="of a copy of a cache.*run the model with the"):
            other.reorder_cache(torch.tensor([1, 0]))
        kv_cache = copy.deepcopy(kv_cache)
        forward(model, ids[:, CONTEXT : CONTEXT + 1], kv_cache)
        kv_cache.reorder_cache(torch.tensor([1, 0]))
        found = forward(model, ids.flip(0)[:, CONTEXT + 1 :], kv_cache)
    with attach(model, QUEST):
        expected = forward(model, ids.flip(0)[:, :CONTEXT], fresh := empty_cache(model))
        for n in (CONTEXT, CONTEXT + 1):
            expected = forward(model, ids.flip(0)[:, n : n + 1], fresh)
    close(found, expected)
    other.reorder_cache(torch.tensor([1, 0]))  # outside, it is a cache like any other


def test_a_cache_of_other_sequences_than_the_states_are_of_is_refused(built, models):
    model, ids = built("llama"), models.tokens(2, CONTEXT + 1)
    caches = [empty_cache(model) for _ in range(2)]
    for kv_cache, batch in zip(caches, (1, 2), strict=True):
        forward(model, ids[:batch, :CONTEXT], kv_cache)
    with attach(model, QUEST):
        forward(model, ids[:1, CONTEXT:], caches[0])
        caches[1].crop(-1)
        with pytest.raises(UnsupportedError, match=r"has 2 sequences.*taken note of 1"):
            forward(model, ids[:, CONTEXT - 1 :], caches[1])


def test_a_pipeline_without_states_needs_nothing_to_follow(built, models):
    with attach(built("llama"), "sink(1) | local(8)"):
        assert generate(built("llama"), models.tokens(1, CONTEXT), num_beams=3).shape == (1, 8)


def test_the_caches_of_earlier_texts_are_not_kept(built, models):
    model = built("llama")
    with attach(model, "quest(8, page_size=4)"):
        first = empty_cache(model)
        forward(model, models.tokens(1, CONTEXT), first)
        watched = weakref.ref(first)
        del first
        forward(model, models.tokens(1, CONTEXT), empty_cache(model))
        gc.collect()
        assert watched() is None


@pytest.mark.parametrize("pipeline", ["dense", "local(4)"])
def test_what_is_no_language_model_is_refused(pipeline):
    for model in (None, torch.nn.Linear(2, 2)):
        with (
            pytest.raises(UnsupportedError, match=f"class {type(model).__name__} as a model"),
            attach(model, pipeline),
        ):
            pass


@pytest.mark.parametrize("longer", [True, False])
def test_a_second_text_in_one_block_is_read_as_if_it_were_the_first(built, models, longer):
    model = built("llama")
    texts = [models.tokens(1, 20, seed=1), models.tokens(1, 60, seed=2)]
    first, second = texts if longer else reversed(texts)

    def new(ids):
        made = model.generate(ids, max_new_tokens=8, pad_token_id=0, eos_token_id=[2])
        return made[0, ids.shape[1] :].tolist()

    with attach(model, "quest(8, page_size=4)"):
        expected = new(second)
    with attach(model, "quest(8, page_size=4)"):
        new(first)
        assert new(second) == expected
