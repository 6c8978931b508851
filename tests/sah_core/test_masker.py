"""The seams of the masker contract that the methods to come stand on.

Small maskers of the kinds that are not built in: a choice made once from the last queries of the
context (SnapKV), evictions by accumulated attention (H2O), blocks in a sparse prefill (MInference,
FlexPrefill), heads of two kinds (DuoAttention). Each goes through a `Session` and a real backend,
and is compared with its definition in loops.
"""

from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import (
    Allowed,
    Capabilities,
    Mask,
    Masker,
    Pipeline,
    Request,
    UnsupportedError,
    param,
)
from sah_core.attention import Session
from sah_core.inputs import WINDOW_QUERIES
from sah_core.models import ModelSource
from sah_core.patching import attach
from sah_core.testing import CHECKS
from sah_plugins.adapters.hf import HuggingFaceAdapter
from sah_plugins.adapters.hf.loading import Loaded

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, DIM, GROUP = 4, 2, 8, 2
TYPES = ["full_attention"] * 2


class Kept:
    """Which keys of the context each KV head keeps.

    Attributes:
        keys: int32 ``(batch, kv_heads, 1, keys)``; None until the context is complete.
        context: Keys of the context.
    """

    def __init__(self):
        self.keys, self.context = None, 0

    def reorder(self, rows):
        self.keys = None if self.keys is None else self.keys[rows]

    def snapshot(self):
        return self.keys, self.context

    def restore(self, token):
        self.keys, self.context = token


@attrs.frozen(kw_only=True)
class WindowVotes(Masker):
    """Keep the keys of the context that its last queries look at, per KV head."""

    name: ClassVar[str] = "window-votes"
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"window_queries"}))
    size: int = param(3, minimum=1, help="Keys of the context.")
    window: int = param(4, minimum=1, help="Queries that vote.")

    def init_state(self, layer):
        return Kept()

    def end_prefill(self, state, inputs):
        rows = inputs.window_queries[:, :, -self.window :]
        limits = Allowed.causal(rows.shape[2], inputs.key_len, first=inputs.allowed.first)
        logits = inputs.ops.logits(rows, inputs.key, inputs.scaling)
        logits = logits.masked_fill(~limits.to_dense(inputs.key_len), float("-inf"))
        votes = logits.softmax(-1).nan_to_num(0).sum(2)
        votes = votes.unflatten(1, (inputs.kv_heads, -1)).sum(2, keepdim=True)
        first, stop = (t.view(-1, 1, 1) for t in (inputs.allowed.first, inputs.length))
        state.keys, _ = inputs.ops.masked_topk(votes, self.size, start=first, stop=stop)
        state.context = inputs.key_len

    def add_mask(self, inputs, previous):
        state = inputs.state
        if state.keys is None:
            return Mask.full(inputs.shape)
        new = torch.arange(state.context, inputs.capacity, dtype=torch.int32)
        new = new.expand(*state.keys.shape[:3], -1)
        return previous | Mask.from_indices(inputs.shape, torch.cat([state.keys, new], -1))


class Sums:
    """Attention that each key has received, and whether it is still there."""

    def __init__(self, layer):
        self.sums = torch.zeros(layer.batch, layer.kv_heads, 0)
        self.there = torch.zeros(layer.batch, layer.kv_heads, 0, dtype=torch.bool)

    def reorder(self, rows):
        self.sums, self.there = self.sums[rows], self.there[rows]

    def snapshot(self):
        return self.sums.clone(), self.there.clone()

    def restore(self, token):
        self.sums, self.there = token[0].clone(), token[1].clone()


@attrs.frozen(kw_only=True)
class HeavyHitters(Masker):
    """Keep the keys that have received most attention; what has been let go never comes back."""

    name: ClassVar[str] = "heavy-hitters"
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({"lse"}))
    size: int = param(4, minimum=1, help="Keys that are kept.")

    def init_state(self, layer):
        return Sums(layer)

    def append(self, state, key, value, start):
        new = key.shape[2]
        state.sums = torch.nn.functional.pad(state.sums, (0, new))
        state.there = torch.nn.functional.pad(state.there, (0, new), value=True)

    def add_mask(self, inputs, previous):
        there = inputs.state.there.unsqueeze(2)
        return previous | Mask.from_dense(there.float(), inputs.shape)

    def after_attention(self, state, inputs, mask, lse):
        logits = inputs.ops.logits(inputs.query, inputs.key, inputs.scaling)
        seen = (mask & inputs.allowed).to_dense() > 0
        weights = (logits - lse.unsqueeze(-1)).exp() * seen
        state.sums += weights.sum(2).unflatten(1, (inputs.kv_heads, -1)).sum(2)
        worst = state.sums.masked_fill(~state.there, float("inf")).argsort(-1)
        for index, gone in enumerate((state.there.sum(-1) - self.size).clamp(min=0).flatten()):
            head = divmod(index, inputs.kv_heads)
            state.there[head][worst[head][:gone]] = False


@attrs.frozen(kw_only=True)
class Blocks(Masker):
    """Of every block of queries, the block of keys that their mean looks at, and their own."""

    name: ClassVar[str] = "blocks"
    capabilities: ClassVar[Capabilities] = Capabilities(page_granular=True)
    block: int = param(4, minimum=2, help="Keys and queries of a block.")

    def add_mask(self, inputs, previous):
        block, batch = self.block, inputs.batch
        own = inputs.query_position.div(block, rounding_mode="floor")
        pages = torch.zeros(batch, inputs.kv_heads, inputs.query_len, 2, dtype=torch.int32)
        pages[..., 1] = own.view(1, 1, -1)
        means = torch.stack([part.mean(2) for part in inputs.key.split(block, 2)], 2)
        for number in own.unique().tolist():
            rows = (own[0] == number).nonzero().flatten()
            query = inputs.query[:, :, rows].mean(2).unflatten(1, (inputs.kv_heads, -1)).mean(2)
            scores = (means[:, :, : number + 1] @ query.unsqueeze(-1)).squeeze(-1)
            pages[:, :, rows, 0] = scores.argmax(-1, keepdim=True).int()
        pages[..., 0] = torch.where(pages[..., 0] == pages[..., 1], -1, pages[..., 0])
        return previous | Mask.from_indices(
            inputs.shape, pages, page_size=block, origin=torch.zeros(1, dtype=torch.int32)
        )


@attrs.frozen(kw_only=True)
class TwoKinds(Masker):
    """Some KV heads attend everything, the others a sink and a window."""

    name: ClassVar[str] = "two-kinds"
    retrieving: tuple = (1,)
    sink: int = 1
    window: int = 3

    def add_mask(self, inputs, previous):
        position = inputs.query_position.view(1, 1, -1, 1)
        keys = torch.arange(inputs.capacity, dtype=torch.int32).view(1, 1, 1, -1)
        streaming = (keys < self.sink) | (keys > position - self.window)
        kinds = torch.tensor([head in self.retrieving for head in range(inputs.kv_heads)])
        chosen = streaming | kinds.view(1, -1, 1, 1)
        return previous | Mask.from_indices(inputs.shape, torch.where(chosen, keys, -1))


def sequences(length, batch=1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, length, DIM, generator=draw)
    return query, *(torch.randn(batch, KV_HEADS, length, DIM, generator=draw) for _ in "kv")


def forward(session, data, begin, end, phase):
    """One pass of one layer: ``(batch, rows, heads, head_dim)``."""
    query, key, value = data
    session.phase = phase
    allowed = Allowed.causal(end - begin, end)
    cut = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
    return session.attend(0, *cut, allowed, DIM**-0.5)


def weights(data, head, row, keys):
    """Softmax of one query over some keys, float64."""
    query, key, _ = (t[0].double() for t in data)
    return torch.softmax(key[head // GROUP, keys] @ query[head, row] * DIM**-0.5, 0)


def attended(data, head, row, keys):
    value = data[2][0].double()
    return (weights(data, head, row, keys) @ value[head // GROUP, keys]).float()


@pytest.mark.parametrize("masker", [WindowVotes(), HeavyHitters()], ids=lambda m: m.name)
@pytest.mark.parametrize("check", CHECKS)
def test_the_conformance_kit_takes_maskers_that_look_back(masker, check):
    own_rules = {
        "check_docstring": "it has no module of its own",
        "check_pickling": "it has no module of its own",
        "check_import_weight": "it has no module of its own",
        "check_device": "these examples make tensors on the host",
        "check_no_host_sync": "these examples read numbers on the host",
        "check_captured_decode": "these examples read numbers on the host",
        "check_memory": "these examples use the dense form",
        "check_parameters_round_trip": "they are not registered",
    }
    if check.__name__ in own_rules:
        pytest.skip(own_rules[check.__name__])
    check(masker)


@pytest.mark.parametrize("chunks", [(12,), (5, 7), (10, 1, 1)], ids=str)
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_the_end_of_the_prefill_sees_the_last_queries_of_the_context(chunks, prefill):
    data = sequences(16)
    session = Session(Pipeline.of(WindowVotes(), prefill=prefill), TYPES)
    begin = 0
    for size in chunks:
        forward(session, data, begin, begin + size, "prefill")
        begin += size
    votes = torch.zeros(KV_HEADS, 12, dtype=torch.float64)
    for head in range(HEADS):
        for row in range(8, 12):
            votes[head // GROUP, : row + 1] += weights(data, head, row, range(row + 1))
    kept = votes.topk(3, dim=-1).indices
    snapshot = None
    for rows, phase in ((3, "question"), (1, "decode")):
        output = forward(session, data, begin, begin + rows, phase)
        for row in range(begin, begin + rows):
            for head in range(HEADS):
                keys = [*kept[head // GROUP].tolist(), *range(12, row + 1)]
                expected = attended(data, head, row, keys)
                torch.testing.assert_close(output[0, row - begin, head], expected)
        begin += rows
        snapshot = snapshot or session.snapshot()
    session.restore(snapshot)
    assert torch.equal(forward(session, data, 15, 16, "decode"), output)


def test_as_many_queries_are_kept_as_are_promised_and_those_of_another_text_forgotten():
    data = sequences(WINDOW_QUERIES + 9)
    session = Session(Pipeline.of(WindowVotes(), prefill="sparse"), TYPES)
    forward(session, data, 0, 5, "prefill")
    forward(session, data, 5, WINDOW_QUERIES + 9, "prefill")
    kept = session.layers[0].window
    assert torch.equal(kept, data[0][:, :, 9:])
    other = sequences(7, seed=1)
    forward(session, other, 0, 7, "prefill")
    kept = session.layers[0].window
    assert torch.equal(kept, other[0])


def test_feedback_evicts_keys_for_good():
    data, size, context = sequences(14), 4, 8
    session = Session(Pipeline.of(HeavyHitters(size=size), prefill="sparse"), TYPES)
    sums = torch.zeros(KV_HEADS, 14, dtype=torch.float64)
    there = [set() for _ in range(KV_HEADS)]
    snapshots, outputs = {}, {}
    for begin, end in ((0, context), *((n, n + 1) for n in range(context, 14))):
        for kept in there:
            kept |= set(range(begin, end))
        snapshots[begin] = session.snapshot()
        phase = "decode" if begin else "prefill"
        outputs[begin] = forward(session, data, begin, end, phase)
        for row in range(begin, end):
            for head in range(HEADS):
                keys = sorted(k for k in there[head // GROUP] if k <= row)
                expected = attended(data, head, row, keys)
                torch.testing.assert_close(outputs[begin][0, row - begin, head], expected)
                sums[head // GROUP, keys] += weights(data, head, row, keys)
        for head, kept in enumerate(there):
            while len(kept) > size:
                kept.remove(min(kept, key=lambda k: float(sums[head, k])))
    session.restore(snapshots[11])
    for begin in (11, 12, 13):
        again = forward(session, data, begin, begin + 1, "decode")
        assert torch.equal(again, outputs[begin])


@pytest.mark.parametrize("chunks", [(16,), (8, 8), (8, 4, 4)], ids=str)
@pytest.mark.parametrize("backend", ["gather", "eager"])
def test_a_sparse_prefill_attends_blocks(chunks, backend):
    data, block = sequences(16), 4
    session = Session(Pipeline.of(Blocks(), prefill="sparse"), TYPES, backend=backend)
    query, key, _ = (t[0].double() for t in data)
    begin = 0
    for size in chunks:
        output = forward(session, data, begin, begin + size, "prefill")
        for row in range(begin, begin + size):
            for head in range(HEADS):
                kv, own = head // GROUP, row // block
                rows = range(own * block, own * block + block)
                mean = query[kv * GROUP : kv * GROUP + GROUP, rows].mean((0, 1))
                scores = [
                    float(mean @ key[kv, n * block : n * block + block].mean(0))
                    for n in range(own + 1)
                ]
                chosen = {own, scores.index(max(scores))}
                keys = [k for k in range(row + 1) if k // block in chosen]
                expected = attended(data, head, row, keys)
                torch.testing.assert_close(output[0, row - begin, head], expected)
        begin += size
    assert session.backends_used == {backend}


@pytest.mark.parametrize("backend", ["gather", "eager"])
def test_heads_may_be_of_two_kinds(backend):
    data = sequences(11)
    session = Session(Pipeline.of(TwoKinds()), TYPES, backend=backend)
    forward(session, data, 0, 8, "prefill")
    for begin, end in ((8, 10), (10, 11)):
        output = forward(session, data, begin, end, "question" if begin == 8 else "decode")
        for row in range(begin, end):
            for head in range(HEADS):
                keys = list(range(row + 1))
                if head // GROUP == 0:
                    keys = [k for k in keys if k < 1 or k > row - 3]
                expected = attended(data, head, row, keys)
                torch.testing.assert_close(output[0, row - begin, head], expected)
    assert session.backends_used == {backend}


REQUEST = Request(
    context="the hen and the rat are on the hearth. an ant is in the red tin. ",
    questions=("who is in the tin?", "where is the hen?"),
)
NEW = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def answer(models):
    """Answers a request with a pipeline and the tiny model."""
    source = ModelSource(kind="folder", location="tiny", label="tiny")
    model, tokenizer = models.build("llama"), models.tokenizer()
    loaded = Loaded(model=model, tokenizer=tokenizer, source=source, weights_hash="0")

    def process(pipeline, questions=REQUEST.questions):
        adapter = HuggingFaceAdapter.of(loaded, pipeline)
        request = attrs.evolve(REQUEST, questions=questions)
        return adapter.process_request(request, NEW, {"prefill_chunk_size": 30}).responses

    return process


def test_a_model_answers_with_a_choice_from_the_last_queries_of_a_sparse_prefill(answer):
    everything = Pipeline.of(WindowVotes(size=500), prefill="sparse")
    assert answer(everything) == answer("dense")
    few = Pipeline.of(WindowVotes(), prefill="sparse")
    assert answer(few) != answer("dense")
    assert answer(few) == [answer(few, question) for question in REQUEST.questions]


def test_a_dense_prefill_that_keeps_no_queries_is_refused_with_what_to_do(answer):
    with pytest.raises(UnsupportedError, match=r"last queries of the context.*prefill=sparse"):
        answer(Pipeline.of(WindowVotes()))


@pytest.mark.parametrize("need", ["hidden_states", "query_pre_rope", "key_pre_rope", "typo"])
def test_a_need_that_nothing_gives_is_refused_by_name(need, answer, models):
    @attrs.frozen(kw_only=True)
    class Needy(WindowVotes):
        name: ClassVar[str] = "needy"
        capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({need}))

    pipeline = Pipeline.of(Needy(), prefill="sparse")
    message = f"masker 'needy' is not supported: it needs {need}, .* lse and window_queries are"
    with (
        pytest.raises(UnsupportedError, match=message),
        attach(models.build("llama"), pipeline),
    ):
        pass
    with pytest.raises(UnsupportedError, match=message):
        answer(pipeline)
