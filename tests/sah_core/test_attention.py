"""Sessions with maskers and backends made for the purpose."""

import logging
import time
from typing import Any, ClassVar

import attrs
import pytest
import torch

from sah_core import (
    Allowed,
    Backend,
    Capabilities,
    KeyRange,
    Mask,
    Masker,
    ParameterError,
    Pipeline,
    UnsupportedError,
    hookimpl,
    registry,
)
from sah_core.attention import Session, check_layers, infer_phase
from sah_core.state import GrowingBuffer

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, DIM = 4, 2, 8


class Diary:
    """A state that is the keys seen, and a journal of what happened to it."""

    def __init__(self, layer):
        self.layer = layer
        self.keys = GrowingBuffer()
        self.calls: list[tuple[Any, ...]] = []

    def snapshot(self):
        return self.keys.snapshot(), list(self.calls)

    def restore(self, token):
        self.keys.restore(token[0])
        self.calls = list(token[1])


@attrs.frozen(kw_only=True)
class Witness(Masker):
    """Writes down what it is shown; selects everything."""

    name: ClassVar[str] = "witness"
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"lse"}))
    seen: list = attrs.field(factory=list, eq=False)

    def init_state(self, layer):
        return Diary(layer)

    def append(self, state, key, value, start):
        assert start == state.keys.length
        state.keys.append(torch.cat([key, value], dim=-1))
        state.calls.append(("append", start, key.shape[2]))

    def end_prefill(self, state, inputs):
        assert torch.equal(state.keys.view[..., :DIM], inputs.key)
        state.calls.append(("end", inputs.key_len, inputs.key.shape[2], inputs.query_len))

    def add_mask(self, inputs, previous):
        assert torch.equal(state_keys(inputs.state), inputs.key)
        self.seen.append((inputs.phase, inputs.layer, inputs.random.step, inputs.random.seed))
        return Mask.full(inputs.shape)

    def after_attention(self, state, inputs, mask, lse):
        state.calls.append(("after", inputs.phase, tuple(lse.shape)))


def state_keys(state):
    return state.keys.view[..., :DIM]


@attrs.frozen(kw_only=True)
class Counted(Masker):
    """Depends on positions alone; counts how often it is asked."""

    name: ClassVar[str] = "counted"
    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)
    calls: list = attrs.field(factory=list, eq=False)

    def add_mask(self, inputs, previous):
        self.calls.append(inputs.layer)
        position = inputs.query_position.unsqueeze(1)
        own = Mask.from_ranges(inputs.shape, [KeyRange(position, position, 1, stop_offset=1)])
        return previous | own


@attrs.frozen(kw_only=True)
class Nothing(Masker):
    name: ClassVar[str] = "nothing"

    def add_mask(self, inputs, previous):
        return previous


@attrs.frozen(kw_only=True)
class Looks(Masker):
    """Keeps the last queries that it is shown; selects everything."""

    name: ClassVar[str] = "looks"
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"window_queries"}))
    seen: list = attrs.field(factory=list, eq=False)

    def add_mask(self, inputs, previous):
        self.seen.append(inputs.window_queries)
        return Mask.full(inputs.shape)


def tensors(key_len, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, key_len, DIM, generator=generator)
    key, value = (torch.randn(batch, KV_HEADS, key_len, DIM, generator=generator) for _ in "kv")
    return query, key, value


def run(session, data, begin, end, layers=(0,), phase=None):
    """One forward pass over keys ``begin`` to ``end`` of a sequence."""
    query, key, value = data
    allowed = Allowed.causal(end - begin, end)
    session.phase = phase
    return [
        session.attend(
            layer, query[:, :, begin:end], key[:, :, :end], value[:, :, :end], allowed, DIM**-0.5
        )
        for layer in layers
    ]


def dense(data, begin, end):
    """Causal attention in float64, row by row."""
    query, key, value = (t.double() for t in data)
    output = torch.zeros(query.shape[0], end - begin, HEADS, DIM, dtype=torch.float64)
    for b in range(query.shape[0]):
        for head in range(HEADS):
            for row in range(begin, end):
                kv = head // (HEADS // KV_HEADS)
                logits = key[b, kv, : row + 1] @ query[b, head, row] * DIM**-0.5
                output[b, row - begin, head] = logits.softmax(0) @ value[b, kv, : row + 1]
    return output


def session_of(*maskers, layers=2, observers=(), **options):
    types = ["full_attention"] * layers
    return Session(Pipeline.of(*maskers, **options), types, observers=observers)


CHUNKS = {
    "prefill at once, question, tokens": [("prefill", 9), ("question", 4), ("decode", 1)],
    "prefill in chunks": [("prefill", n) for n in (3, 1, 5)] + [("question", 4), ("decode", 1)],
    "prefill token by token": [("prefill", 1)] * 9 + [("question", 1)] + [("decode", 1)] * 4,
    "question in chunks": [("prefill", 9), ("question", 2), ("question", 2), ("decode", 1)],
}


@pytest.mark.parametrize("sparse_prefill", [False, True])
@pytest.mark.parametrize("passes", CHUNKS.values(), ids=CHUNKS)
def test_states_see_every_key_once_and_in_order_and_the_end_of_the_context_once(
    passes, sparse_prefill
):
    options = {"prefill": "sparse"} if sparse_prefill else {}
    witness = Witness()
    session = session_of(Nothing(), witness, seed=5, **options)
    data = tensors(14)
    end = 0
    for phase, size in passes:
        begin, end = end, end + size
        for output in run(session, data, begin, end, (0, 1), phase):
            torch.testing.assert_close(output, dense(data, begin, end).float())
    for layer in (0, 1):
        state = session.layers[layer].states[1]
        assert state.layer.index == layer
        assert torch.equal(state.keys.view, torch.cat(data[1:], dim=-1))
        appended = [c for c in state.calls if c[0] == "append"]
        starts = [start for _, start, _ in appended]
        assert starts == [sum(size for *_, size in appended[:i]) for i in range(len(appended))]
        [ended] = [i for i, c in enumerate(state.calls) if c[0] == "end"]
        assert state.calls[ended] == ("end", 9, 9, 0)
        assert sum(c[2] for c in state.calls[:ended] if c[0] == "append") == 9
    phases = [phase for phase, *_ in witness.seen]
    wanted = [phase for phase, _ in passes if sparse_prefill or phase != "prefill"]
    assert phases == [phase for phase in wanted for _ in range(2)]
    assert {(step, seed) for *_, step, seed in witness.seen} == {(1, 5)}
    after = [c for c in session.layers[0].states[1].calls if c[0] == "after"]
    assert [phase for _, phase, _ in after] == wanted


class Followed(Diary):
    """A diary that follows sequences which change places."""

    def reorder(self, rows):
        self.keys.reorder(rows)
        self.calls.append(("reorder", rows.tolist()))


@attrs.frozen(kw_only=True)
class Follows(Witness):
    name: ClassVar[str] = "follows"

    def init_state(self, layer):
        return Followed(layer)


ROWS = torch.tensor([2, 0, 0, 1])


def test_states_and_last_queries_of_all_layers_follow_the_sequences():
    looks = Looks()
    session = session_of(Follows(), looks)
    data = tensors(14, batch=3)
    run(session, data, 0, 9, (0, 1), "prefill")
    run(session, data, 9, 11, (0, 1), "question")
    session.reorder(ROWS)
    taken = tuple(tensor[ROWS] for tensor in data)
    for end in (12, 13, 14):  # the masker compares its keys with those of the call
        for output in run(session, taken, end - 1, end, (0, 1), "decode"):
            torch.testing.assert_close(output, dense(taken, end - 1, end).float())
        assert torch.equal(looks.seen[-1], taken[0][:, :, :end])
    for kept in session.layers.values():
        assert kept.batch == 4
        assert kept.states[0].calls.count(("reorder", ROWS.tolist())) == 1


def test_a_snapshot_from_before_sequences_changed_places_is_refused():
    session, data = session_of(Follows()), tensors(12, batch=3)
    run(session, data, 0, 9, phase="prefill")
    run(session, data, 9, 10, phase="decode")
    before = session.snapshot()
    session.reorder(ROWS)
    after = session.snapshot()
    with pytest.raises(UnsupportedError, match="before the sequences were reordered.*a copy"):
        session.restore(before)
    taken = tuple(tensor[ROWS] for tensor in data)
    for _ in range(2):
        run(session, taken, 10, 11, phase="decode")
        session.restore(after)


def test_a_copy_of_the_states_goes_its_own_way():
    session, data = session_of(Follows()), tensors(12, batch=3)
    run(session, data, 0, 9, phase="prefill")
    run(session, data, 9, 10, phase="decode")
    before, own = session.snapshot(), session.layers
    session.layers = session.branched(ROWS)
    taken = tuple(tensor[ROWS] for tensor in data)
    run(session, taken, 10, 11, phase="decode")
    session.reorder(torch.tensor([3, 3]))
    session.layers = own
    session.restore(before)
    run(session, data, 10, 11, phase="decode")
    assert [call[0] for call in own[0].states[0].calls].count("reorder") == 0


def test_what_cannot_follow_is_refused_and_nothing_has_changed():
    session, data = session_of(Follows(), Witness()), tensors(12, batch=3)
    run(session, data, 0, 9, phase="prefill")
    session.reorder(ROWS)  # nothing is kept yet
    run(session, data, 9, 10, phase="decode")
    for action in (session.reorder, session.branched):
        with pytest.raises(
            UnsupportedError,
            match=r"with masker 'witness' is not supported: its state \(Diary\) has no method "
            r"reorder\(rows\) to follow by; use num_beams=1",
        ):
            action(ROWS)
    assert ("reorder", ROWS.tolist()) not in session.layers[0].states[0].calls
    run(session, data, 10, 11, phase="decode")


def test_choices_that_layers_share_cannot_follow():
    @attrs.frozen(kw_only=True)
    class Sharing(Nothing):
        name: ClassVar[str] = "sharing"
        capabilities: ClassVar[Capabilities] = Capabilities(shares_layers=True)

    with pytest.raises(UnsupportedError, match="'sharing'.*hand each other in request_state"):
        session_of(Sharing()).reorder(ROWS)


def test_states_can_be_built_from_the_cached_context_at_once():
    witness = Witness()
    session = session_of(witness)
    data = tensors(12)
    run(session, data, 0, 8, phase="prefill")
    assert not session.layers
    seen = []

    class Spy(Witness):
        def add_mask(self, inputs, previous):
            seen.append(inputs)
            return previous

    run(session_of(Spy(), prefill="sparse"), data, 0, 8, phase="prefill")
    call = attrs.evolve(seen[0].rows(0, 0), state=None)
    session.end_prefill({0: call})
    session.end_prefill({0: call})
    state = session.layers[0].states[0]
    assert state.calls == [("append", 0, 8), ("end", 8, 8, 0)]
    run(session, data, 8, 10, phase="question")
    assert state.calls[2:] == [("append", 8, 2), ("after", "question", (1, HEADS, 2))]


def test_a_dense_layer_keeps_no_state():
    session = session_of(Witness(), dense_layers=[0])
    data = tensors(6)
    run(session, data, 0, 5, (0, 1), "prefill")
    run(session, data, 5, 6, (0, 1), "question")
    assert list(session.layers) == [1]


def joined(context, rest, length):
    """A sequence that begins as one and goes on as another."""
    return tuple(
        torch.cat([c[:, :, :length], r[:, :, length:]], dim=2)
        for c, r in zip(context, rest, strict=True)
    )


def test_a_restored_session_goes_on_as_a_fresh_one():
    session = session_of(Witness(), prefill="sparse")
    context = tensors(13)
    run(session, context, 0, 8, (0, 1), "prefill")
    base = session.snapshot()
    for seed in (1, 2, 1):
        data = joined(context, tensors(13, seed), 8)
        fresh = session_of(Witness(), prefill="sparse")
        run(fresh, data, 0, 8, (0, 1), "prefill")
        session.restore(base)
        assert session.request_state == {}
        session.request_state["answer"] = seed
        for begin, end, phase in ((8, 12, "question"), (12, 13, "decode")):
            outputs = run(session, data, begin, end, (0, 1), phase)
            for a, b in zip(outputs, run(fresh, data, begin, end, (0, 1), phase), strict=True):
                assert torch.equal(a, b)
        assert diaries(session) == diaries(fresh)


def diaries(session):
    return {layer: kept.states[0].calls for layer, kept in session.layers.items()}


def test_a_snapshot_after_the_context_keeps_its_states():
    session = session_of(Witness())
    data = tensors(12)
    run(session, data, 0, 8, phase="prefill")
    run(session, data, 8, 9, phase="question")
    session.request_state["kept"] = [1]
    token = session.snapshot()
    calls = list(session.layers[0].states[0].calls)
    run(session, data, 9, 12, (0, 1), phase="question")
    session.request_state["new"] = 1
    session.restore(token)
    assert session.request_state == {"kept": [1]}
    assert list(session.layers) == [0]
    assert session.layers[0].states[0].calls == calls
    other = joined(data, tensors(12, 7), 9)
    run(session, other, 9, 12, phase="question")
    assert torch.equal(state_keys(session.layers[0].states[0]), other[1])


def test_tensors_of_the_request_go_back_to_what_they_were_as_often_as_one_likes():
    session = session_of(Witness())
    session.request_state["rows"] = torch.tensor(3)
    token = session.snapshot()
    for _ in range(3):
        session.request_state["rows"].add_(4)
        session.restore(token)
        assert int(session.request_state["rows"]) == 3


def test_the_last_queries_go_back_with_the_session():
    masker, data = Looks(), tensors(12)
    session = session_of(masker, prefill="sparse")
    run(session, data, 0, 8, phase="prefill")
    token = session.snapshot()
    for seed in (1, 2):
        other = joined(data, tensors(12, seed), 8)
        session.restore(token)
        run(session, other, 8, 11, phase="question")
        assert torch.equal(masker.seen[-1], other[0][:, :, :11])


def test_reset_forgets_the_request():
    session = session_of(Witness())
    data = tensors(9)
    run(session, data, 2, 8, phase="question")
    session.request_state["a"] = 1
    session.reset()
    assert not session.layers
    assert not session.request_state
    run(session, data, 3, 9, phase="question")
    assert torch.equal(state_keys(session.layers[0].states[0]), data[1])


def test_leading_steps_that_depend_on_positions_run_once_per_forward_pass():
    first, second, late = Counted(), Counted(), Counted()
    session = session_of(first, second, Nothing(), late, layers=3)
    data = tensors(9)
    run(session, data, 5, 7, (0, 1, 2), "question")
    assert first.calls == second.calls == [0]
    assert late.calls == [0, 1, 2]
    run(session, data, 7, 8, (0, 1, 2), "decode")
    run(session, data, 8, 9, (0, 1, 2), "decode")
    assert first.calls == [0, 0, 0]


def test_what_is_kept_of_the_leading_steps_is_never_stale():
    session = session_of(Counted())
    data = tensors(9)
    for begin, end in ((4, 6), (6, 8), (7, 8), (4, 6)):
        output = run(session, data, begin, end, (0, 1), "question")
        own = data[2][:, :, begin:end].repeat_interleave(HEADS // KV_HEADS, dim=1)
        for layer in output:
            torch.testing.assert_close(layer, own.transpose(1, 2))


def test_what_is_kept_of_the_leading_steps_is_not_taken_for_a_batch_with_other_padding():
    sink = registry.maskers["sink"](sink_size=1)
    session = session_of(sink)
    query, key, value = tensors(9)
    for padding in (0, 3, 5):
        allowed = Allowed.causal(1, 9, first=torch.tensor([padding], dtype=torch.int32))
        output = session.attend(0, query[:, :, 8:], key, value, allowed, DIM**-0.5)
        expected = value[:, :, padding : padding + 1].repeat_interleave(HEADS // KV_HEADS, dim=1)
        torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "layer_types", "phase", "sparse"),
    [
        ({}, ("full_attention",) * 3, "prefill", []),
        ({}, ("full_attention",) * 3, "question", [0, 1, 2]),
        ({}, ("full_attention",) * 3, "decode", [0, 1, 2]),
        ({"prefill": "sparse"}, ("full_attention",) * 3, "prefill", [0, 1, 2]),
        ({"question": "dense"}, ("full_attention",) * 3, "question", []),
        ({"dense_layers": [0, 2]}, ("full_attention",) * 3, "decode", [1]),
        ({"layers": [1]}, ("full_attention",) * 3, "decode", [1]),
        ({}, ("sliding_attention", "full_attention", "sliding_attention"), "decode", [1]),
        (
            {"layer_types": ["sliding_attention"]},
            ("sliding_attention", "full_attention", "sliding_attention"),
            "decode",
            [0, 2],
        ),
    ],
)
def test_a_pipeline_runs_where_and_when_it_says(options, layer_types, phase, sparse):
    witness = Witness()
    session = Session(Pipeline.of(witness, **options), layer_types)
    run(session, tensors(6), 4, 6, (0, 1, 2), phase)
    assert [layer for _, layer, *_ in witness.seen] == sparse


def test_layer_types_that_the_model_lacks_are_refused():
    pipeline = Pipeline.of(Witness(), layer_types=["foo"])
    with pytest.raises(ParameterError, match=r"layer_types = \['foo'\].*have: full_attention"):
        Session(pipeline, ["full_attention"] * 2)
    Session(Pipeline.of(Witness()), ["sliding_attention"] * 2)  # the default asks for nothing
    Session(Pipeline.of(Witness(), layer_types=["foo", "full_attention"]), ["full_attention"])


def test_layers_that_the_model_lacks_are_refused():
    for option in ("dense_layers", "layers"):
        pipeline = Pipeline.of(Witness(), **{option: [1, 4]})
        with pytest.raises(ParameterError, match=f"{option}.*4.*below 4") as caught:
            Session(pipeline, ["full_attention"] * 4)
        assert caught.value.value == 4
        check_layers(pipeline, 5)


def test_the_phase_outside_a_request_follows_from_the_shapes():
    assert [infer_phase(*s) for s in ((5, 5), (1, 1), (1, 5), (2, 5))] == [
        "prefill",
        "prefill",
        "decode",
        "question",
    ]


def test_in_a_request_the_first_pass_is_the_question_however_short():
    witness = Witness()
    session = session_of(witness)
    data = tensors(12)
    run(session, data, 0, 6, (0, 1), "prefill")
    session.start_question()
    for begin, end in ((6, 7), (7, 8), (8, 10), (10, 11)):
        run(session, data, begin, end, (0, 1))
    phases = [phase for phase, layer, *_ in witness.seen if layer == 0]
    assert phases == ["question", "decode", "question", "decode"]
    session.start_question()
    run(session, data, 11, 12, (0, 1))
    assert witness.seen[-1][0] == "question"


# Backends


class Picky(Backend):
    """Refuses what its attribute says."""

    name: ClassVar[str] = "picky"
    rank: ClassVar[int] = 1000

    def refuses(self, problem):
        return None if problem.query_len == 1 else "only one query row"

    def attend(self, inputs, mask):
        shape = (inputs.batch, inputs.query_len, inputs.heads, inputs.value.shape[3])
        return torch.full(shape, 42.0), None


class Lazy(Picky):
    name: ClassVar[str] = "lazy"
    rank: ClassVar[int] = -1

    def refuses(self, problem):
        return "never today"


class Unbuildable(Picky):
    name: ClassVar[str] = "unbuildable"
    rank: ClassVar[int] = 2000

    def __init__(self):
        raise OSError("no such device")


@pytest.fixture
def register():
    names = []

    def add(cls, distribution="local"):
        registry.backends.register(cls.name, cls, distribution)
        names.append((cls.name, distribution))

    yield add
    for name, distribution in names:
        registry.backends.unregister(name, distribution)


def test_auto_takes_the_capable_backend_of_the_highest_rank(register):
    register(Picky)
    session = session_of(Counted())
    data = tensors(8)
    assert (run(session, data, 7, 8, phase="decode")[0] == 42).all()
    assert session.backends_used == {"picky"}
    assert not (run(session, data, 4, 6, phase="question")[0] == 42).any()
    assert len(session.backends_used) == 2
    assert session.fallbacks == []


@pytest.mark.parametrize("masker", [Counted(), Nothing()])
def test_a_backend_that_refuses_is_replaced_visibly(register, caplog, masker):
    register(Lazy)
    session = session_of(masker, backend="lazy")
    data = tensors(8)
    with caplog.at_level(logging.WARNING, "sah_core.attention"):
        for begin in (5, 6, 7):
            run(session, data, begin, 8, (0, 1), "question")
    [fallback] = session.fallbacks
    assert (fallback.requested, fallback.reason) == ("lazy", "never today")
    assert fallback.used in session.backends_used
    [record] = [r for r in caplog.records if "lazy" in r.getMessage()]
    assert record.getMessage().startswith("backend lazy refuses (never today); ")


def test_a_backend_that_takes_some_calls_takes_those(register):
    register(Picky)
    session = session_of(Counted(), backend="picky")
    data = tensors(8)
    run(session, data, 5, 7, phase="question")
    assert (run(session, data, 7, 8, phase="decode")[0] == 42).all()
    assert [f.reason for f in session.fallbacks] == ["only one query row"]


def test_a_call_that_every_backend_refuses_says_why(monkeypatch):
    class OnlyLazy:
        def names(self):
            return ("lazy", "picky")

        def __getitem__(self, name):
            return {"lazy": Lazy, "picky": Picky}[name]

    monkeypatch.setattr(registry, "backends", OnlyLazy())
    session = session_of(Counted())
    with pytest.raises(UnsupportedError) as caught:
        run(session, tensors(8), 5, 8, phase="question")
    assert "layer 0 on cpu" in str(caught.value)
    assert "lazy: never today" in caught.value.reason
    assert "picky: only one query row" in caught.value.reason


def test_a_backend_that_cannot_be_made_is_left_out_and_named(register, caplog):
    register(Unbuildable)
    session = session_of(Counted())
    with caplog.at_level(logging.WARNING, "sah_core.attention"):
        for begin in (5, 6, 7):
            run(session, tensors(8), begin, 8, phase="question")
    messages = [r.getMessage() for r in caplog.records]
    assert messages == ["backend unbuildable is left out: no such device"]
    with pytest.raises(OSError, match="no such device"):
        session.choice.backend_for(*call_and_mask(), requested="unbuildable")


def call_and_mask():
    seen = []

    @attrs.frozen(kw_only=True)
    class Keep(Masker):
        name: ClassVar[str] = "keep"

        def add_mask(self, inputs, previous):
            seen.append((inputs, previous))
            return previous

    run(session_of(Keep()), tensors(4), 3, 4, phase="decode")
    return seen[0]


def test_two_backends_of_one_name_do_not_stop_the_others(register, caplog):
    register(Picky, "one")
    register(Picky, "two")
    session = session_of(Counted())
    with caplog.at_level(logging.WARNING, "sah_core.attention"):
        run(session, tensors(8), 7, 8, phase="decode")
    assert "picky" not in session.backends_used
    assert any("picky is left out" in r.getMessage() for r in caplog.records)


def test_maskers_and_their_states_get_the_ops_of_the_backend(register):
    class Own(Picky):
        name: ClassVar[str] = "own"
        ops = object()

        def refuses(self, problem):
            return None

    seen = []

    @attrs.frozen(kw_only=True)
    class Asks(Witness):
        name: ClassVar[str] = "asks"

        def init_state(self, layer):
            seen.append(layer.ops)
            return super().init_state(layer)

        def add_mask(self, inputs, previous):
            seen.append(inputs.ops)
            return previous

        def after_attention(self, state, inputs, mask, lse):
            pass

    register(Own)
    run(session_of(Asks()), tensors(5), 4, 5, phase="decode")
    assert seen == [Own.ops, Own.ops]


# Observers


class Watcher:
    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.masks, self.outputs = [], []

    @hookimpl
    def sah_mask_built(self, inputs, mask):
        time.sleep(self.seconds)
        self.masks.append((inputs.phase, inputs.layer, mask.is_full))

    @hookimpl
    def sah_attention_computed(self, output, backend):
        self.outputs.append((tuple(output.shape), backend))


def test_observers_see_the_layers_of_sparse_phases_and_no_others():
    watcher = Watcher()
    session = session_of(Counted(), dense_layers=[0], observers=[watcher], question="dense")
    data = tensors(10)
    run(session, data, 0, 8, (0, 1), "prefill")
    run(session, data, 8, 9, (0, 1), "question")
    assert watcher.masks == watcher.outputs == []
    run(session, data, 9, 10, (0, 1), "decode")
    assert watcher.masks == [("decode", 0, True), ("decode", 1, False)]
    assert [shape for shape, _ in watcher.outputs] == [(1, 1, HEADS, DIM)] * 2
    assert watcher.outputs[1][1] in session.backends_used


def test_a_dense_pipeline_is_observed_where_a_sparse_one_would_be():
    watcher = Watcher()
    session = Session(Pipeline.dense(), ["full_attention"], observers=[watcher])
    data = tensors(9)
    run(session, data, 0, 8, phase="prefill")
    run(session, data, 8, 9, phase="question")
    assert watcher.masks == [("question", 0, True)]
    assert session.backends_used == set()


def test_the_time_of_observers_is_kept_apart():
    session = session_of(Counted(), observers=[Watcher(0.02), Watcher(0.02)])
    assert session.observer_seconds == 0.0
    run(session, tensors(8), 7, 8, (0, 1), "decode")
    assert session.observer_seconds >= 0.08


def test_observers_are_called_in_the_order_given():
    order = []

    class First:
        @hookimpl
        def sah_mask_built(self):
            order.append(1)

    class Second:
        @hookimpl
        def sah_mask_built(self):
            order.append(2)

    run(session_of(Counted(), observers=[First(), Second()]), tensors(8), 7, 8, phase="decode")
    assert order == [1, 2]


def test_without_observers_nothing_is_observed():
    session = session_of(Counted())
    session.observe("sah_request_begin", request=None, pipeline=None)
    run(session, tensors(8), 7, 8, phase="decode")
    assert session.observer_seconds == 0.0


def test_the_tensors_of_the_caller_are_not_changed():
    session = session_of(Witness(), prefill="sparse")
    data = tensors(9)
    before = [t.clone() for t in data]
    run(session, data, 0, 8, (0, 1), "prefill")
    run(session, data, 8, 9, (0, 1), "question")
    assert all(torch.equal(a, b) for a, b in zip(before, data, strict=True))


@attrs.frozen(kw_only=True)
class Returns(Masker):
    """Returns whatever it holds."""

    name: ClassVar[str] = "returns"
    what: Any = None

    def add_mask(self, inputs, previous):
        return self.what


@pytest.mark.parametrize("steps", [[], [Counted()]])
@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (None, TypeError, "returns: add_mask returned NoneType, no Mask; return previous united"),
        (torch.ones(3), TypeError, "returns: add_mask returned Tensor, no Mask"),
        (
            Mask.full((1, 1, 1, 9)),
            ValueError,
            r"of shape \(1, 1, 1, 9\), not \(1, 4, 2, 6\); build",
        ),
    ],
)
def test_what_a_masker_returns_is_looked_at(steps, what, error, message):
    pipeline = Pipeline.of(*steps, Returns(what=what))
    session = Session(pipeline, ("full_attention",), backend="eager")
    session.phase = "question"
    query, key = torch.zeros(1, HEADS, 2, DIM), torch.zeros(1, KV_HEADS, 6, DIM)
    with pytest.raises(error, match=message):
        session.attend(0, query, key, key, Allowed.causal(2, 6), 1.0)
