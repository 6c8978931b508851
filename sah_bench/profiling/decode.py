"""Whole decode steps of a model, dense and with pipelines, eager and captured."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import Allowed, Inputs, Pipeline, Request, compat, registry
from sah_core.attention import Session, check_layers
from sah_core.errors import ContextTooLongError, UnsupportedError
from sah_core.patching import use

from .attention import release
from .forms import Probe
from .rows import CAPTURED, EAGER, DecodeRow, note
from .shapes import DTYPES
from .timing import Copy, Times, graph_of, graph_timer
from .traffic import Traffic

DENSE = "dense: the model's own attention"
BY_ROWS = "dense: group as rows"
FIXED = "fixed length"
NO_CUDA = "CUDA graphs need a CUDA device"
ROOM = 320
"""Tokens of cache beyond the steps: a cache that had to grow would be copied as a whole."""
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    }
}
"""Arguments of transformers' ``LlamaConfig``."""


@attrs.frozen(kw_only=True)
class DecodePlan:
    """What to measure.

    Attributes:
        model: A model by name; None takes ``shape``.
        shape: A key of `MODEL_SHAPES`: random weights.
        layers: Layers to keep of the shape, None for all.
        pipelines: Each as it was written and as it was understood.
        backends: Names to ask for.
        context: Cached tokens.
        batch: Sequences.
        new_tokens: Steps of a round.
        device: Where.
        dtype: Of the weights.
        rounds: Rounds that count.
        warmup: Rounds before them.
    """

    model: str | None
    shape: str | None
    layers: int | None
    pipelines: tuple[tuple[str, Pipeline], ...]
    backends: tuple[str, ...]
    context: int
    batch: int
    new_tokens: int
    device: torch.device
    dtype: str
    rounds: int
    warmup: int

    def measure(self, copy: Copy, begin: Callable[[object], None]) -> list[DecodeRow]:
        """Measure dense and every pipeline on every backend.

        Args:
            copy: The bandwidth of the device.
            begin: Told what starts.
        """
        return measure_decode(self, copy, begin)

    def to_plain(self) -> dict[str, Any]:
        """What was measured, for JSON."""
        return {
            "kind": "decode",
            "model": self.model,
            "shape": self.shape,
            "layers": self.layers,
            "context": self.context,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        name = self.model or f"{self.shape} (random weights)"
        cut = "" if self.layers is None else f", {self.layers} layers"
        return (
            f"{name}{cut}: {self.context} tokens of context, batch {self.batch}, "
            f"{self.new_tokens} steps, {self.dtype}"
        )


@attrs.frozen
class RandomWeights:
    """A model of random weights, as an adapter takes a loaded one."""

    model: Any
    tokenizer: None = None
    source: None = None
    weights_hash: str = "random"


@attrs.frozen
class Piece:
    """The tokens of a made-up prompt: the context and one more."""

    ids: tuple[int, ...]
    context_tokens: int


@attrs.define(eq=False)
class MadeUpContext:
    """A cache of random keys and values, with the attributes of a context that an adapter read.

    How long attention takes depends on their number, not on what they say.
    """

    request: Request
    prompts: list[Piece]
    shared: int
    cache: Any
    base: list[Any]
    seconds: float = 0.0
    session: Session | None = None
    states: dict[str, Any] = attrs.field(factory=dict)
    batch: int = 1

    @property
    def context_tokens(self) -> int:
        """Cached tokens."""
        return self.shared

    @property
    def shareable(self) -> bool:
        """Any pipeline can go on from here."""
        return True


def load(plan: DecodePlan) -> Any:
    """The adapter around the model.

    Raises:
        ContextTooLongError: If the context does not fit into the model.
        UnsupportedError: If the adapter takes no random weights.
    """
    adapter_class = registry.adapters["hf"]
    if plan.model is not None:
        adapter = adapter_class(plan.model, device=str(plan.device), dtype=plan.dtype)
        needed, limit = plan.context + plan.new_tokens + 2, adapter.max_context
        if limit is not None and needed > limit:
            raise ContextTooLongError(needed, limit, f"model {plan.model!r}")
        return adapter
    make = getattr(adapter_class, "of", None)
    if make is None:
        raise UnsupportedError("--model-shape", "the adapter takes no model of random weights")
    return make(RandomWeights(random_model(plan)))


def random_model(plan: DecodePlan) -> Any:
    """A Llama of the shape, its weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    assert plan.shape is not None
    facts = dict(MODEL_SHAPES[plan.shape])
    facts["num_hidden_layers"] = plan.layers or facts["num_hidden_layers"]
    config = LlamaConfig(**facts, max_position_embeddings=plan.context + plan.new_tokens + ROOM)
    torch.manual_seed(0)
    with plan.device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[plan.dtype]).eval()


def make_context(adapter: Any, plan: DecodePlan) -> MadeUpContext:
    """Fill a cache with random numbers."""
    model = adapter.model
    config = compat.text_config(model)
    kv_cache = compat.make_cache(model, plan.context + plan.new_tokens + ROOM)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, kind in enumerate(compat.layer_types(model)):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"profiling layer {index} ({kind})", "it caches no keys")
        shape = (plan.batch, heads, plan.context, head_dim)
        make: dict[str, Any] = {"device": plan.device, "dtype": model.dtype}
        kv_cache.update(torch.randn(shape, **make), torch.randn(shape, **make), index)
    base = compat.snapshot_cache(kv_cache)
    ids = tuple(torch.randint(config.vocab_size, (plan.context + 1,)).tolist())
    request = Request(context="", questions="?")
    prompts = [Piece(ids, plan.context)]
    return MadeUpContext(request, prompts, plan.context, kv_cache, base, batch=plan.batch)


def weights_read(model: Any) -> int:
    """Bytes of the weights that a step reads: all but the rows of the input embedding."""
    total = sum(int(p.numel() * p.element_size()) for p in model.parameters())
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs
    return total if tied else total - int(inputs.numel() * inputs.element_size())


class Steps:
    """Eager decode steps of one pipeline on a made-up context."""

    def __init__(
        self, adapter: Any, plan: DecodePlan, context: MadeUpContext, session: Session | None
    ) -> None:
        self.model = adapter.model
        self.plan = plan
        self.context = context
        self.session = session
        self.argument = compat.cache_argument(type(self.model).forward)
        self.before = None
        if session is not None:
            compat.restore_cache(context.cache, context.base)
            session.end_prefill(dict(self._layers()))
            self.before = session.snapshot()

    def _layers(self) -> Iterator[tuple[int, Inputs]]:
        types = compat.layer_types(self.model)
        heads = int(compat.text_config(self.model).num_attention_heads)
        for layer, key, value in compat.cached_tensors(self.context.cache):
            if types[layer] != "full_attention":
                continue
            yield (
                layer,
                Inputs(
                    query=key.new_empty((key.shape[0], heads, 0, key.shape[3])),
                    key=key,
                    value=value,
                    allowed=Allowed.causal(0, key.shape[2], device=key.device),
                    scaling=key.shape[3] ** -0.5,
                    key_len=key.shape[2],
                    layer=layer,
                    layer_count=len(types),
                    layer_type=types[layer],
                    phase="prefill",
                ),
            )

    def fixed_graph(self) -> Callable[[], float]:
        """A timer of a graph of one step whose length stays that of the context.

        Dense attention over a length that the device alone knows needs a mask, which torch's
        fastest kernels refuse; this is what the fastest of them take.

        Raises:
            UnsupportedError: If the step waits for the device.
        """
        token = torch.zeros((self.plan.batch, 1), dtype=torch.long, device=self.plan.device)

        def step() -> Any:
            compat.restore_cache(self.context.cache, self.context.base)
            return self._step(token)

        with self._patched(self.session):
            return graph_timer(graph_of(step, 1), 1)

    def _patched(self, session: Session | None) -> AbstractContextManager[Any]:
        return nullcontext() if session is None else use(self.model, session, always=True)

    def run(self, count: int, session: Session | None = None) -> float:
        """Decode so many tokens from the end of the context; returns seconds per step."""
        compat.restore_cache(self.context.cache, self.context.base)
        session = session or self.session
        if self.session is not None:
            self.session.restore(self.before)  # type: ignore[arg-type]
            assert session is not None
            session.phase = "decode"
        token = torch.zeros((self.plan.batch, 1), dtype=torch.long, device=self.plan.device)
        with self._patched(session):
            begin = now(self.plan.device)
            for _ in range(count):
                token = self._step(token)
            return (now(self.plan.device) - begin) / count

    def _step(self, token: Tensor) -> Any:
        output = self.model(
            input_ids=token,
            use_cache=True,
            logits_to_keep=1,
            **{self.argument: self.context.cache},
        )
        return output.logits[:, -1:].argmax(-1)


def now(device: torch.device) -> float:
    """The clock once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def measure_decode(
    plan: DecodePlan, copy: Copy, begin: Callable[[object], None]
) -> list[DecodeRow]:
    """Measure dense and every pipeline on every backend.

    Args:
        plan: What to measure.
        copy: The bandwidth of the device.
        begin: Told what starts.
    """
    begin("building the model")
    adapter = load(plan)
    for _, pipeline in plan.pipelines:
        check_layers(pipeline, len(compat.layer_types(adapter.model)))
    begin("filling the cache")
    context = make_context(adapter, plan)
    weights = weights_read(adapter.model)
    rows = [DecodeRow(name=n, pipeline="dense", batch=plan.batch) for n in (DENSE, BY_ROWS)]
    pipelines = [Pipeline.dense(), Pipeline.dense()]
    for text, pipeline in plan.pipelines:
        named = plan.backends if pipeline.backend == "auto" else (pipeline.backend,)
        for backend in () if pipeline.is_dense else named:
            chosen = attrs.evolve(pipeline, backend=backend)
            row = DecodeRow(name=text, pipeline=chosen.text, batch=plan.batch, requested=backend)
            rows.append(row)
            pipelines.append(chosen)
    loops: list[tuple[DecodeRow, Steps]] = []
    for row, pipeline in zip(rows, pipelines, strict=True):
        row.bandwidth, row.weight_bytes = copy.bandwidth, weights
        begin(f"{row.name} on {row.requested}")
        try:
            loops.append((row, eager_steps(row, pipeline, adapter, plan, context)))
        except Exception as error:  # one pipeline must not take the others down
            note(row, error)
            release(plan.device)
    time_eager(loops, plan)
    alive = {id(row) for row, _ in loops}
    loops.clear()
    for row, pipeline in zip(rows, pipelines, strict=True):
        if id(row) in alive:
            release(plan.device)
            begin(f"{row.name} on {row.requested}, captured")
            time_captured(row, pipeline, adapter, plan, context)
    begin("dense, graphs of a fixed length")
    for row in list(rows[:2]):
        release(plan.device)
        rows.insert(2, time_fixed(row, adapter, plan, context))
    for kind in (EAGER, CAPTURED):
        known = [row.seconds(kind) for row in rows if row.pipeline == "dense"]
        found = [seconds for seconds in known if seconds is not None]
        for row in rows if found else ():
            row.dense[kind] = min(found)
    return rows


def time_fixed(row: DecodeRow, adapter: Any, plan: DecodePlan, context: MadeUpContext) -> DecodeRow:
    """A dense row again, as a graph of one step whose length does not grow."""
    fixed = attrs.evolve(row, name=f"{row.name}, {FIXED}", times={}, no_graph="", dense={})
    if plan.device.type != "cuda":
        fixed.no_graph = NO_CUDA
        return fixed
    try:
        timer = Steps(adapter, plan, context, session_of(row, Pipeline.dense(), adapter))
        replay = timer.fixed_graph()
        fixed.times[CAPTURED] = Times(tuple(replay() for _ in range(plan.rounds)))
    except Exception as error:  # whatever a capture raises, the other numbers stand
        fixed.no_graph = f"{type(error).__name__}: {error}"
    finally:
        compat.restore_cache(context.cache, context.base)
    return fixed


def session_of(row: DecodeRow, pipeline: Pipeline, adapter: Any) -> Session | None:
    """What runs the attention of a row; None is the model's own."""
    if row.name == DENSE:
        return None
    return Session(pipeline, compat.layer_types(adapter.model))


def eager_steps(
    row: DecodeRow, pipeline: Pipeline, adapter: Any, plan: DecodePlan, context: MadeUpContext
) -> Steps:
    """Prepare the eager loop of a pipeline and fill in what needs no clock."""
    session = session_of(row, pipeline, adapter)
    steps = Steps(adapter, plan, context, session)
    if session is None or pipeline.is_dense:
        row.backend = "torch" if session is None else "sdpa"
        cached = [(k, v) for _, k, v in compat.cached_tensors(context.cache)]
        total = sum(t.numel() * t.element_size() for pair in cached for t in pair)
        row.traffic, row.density = Traffic(0, total, total), 1.0
    else:
        probe = Probe(session)
        watched = Session(pipeline, session.layer_types, observers=[probe])
        watched.layers, watched.request_state = session.layers, session.request_state
        steps.run(1, watched)
        row.traffic, row.density, row.saving = probe.traffic, probe.density, probe.saving
        # layers that the pipeline leaves dense run on other backends, which save nothing
        used = watched.backends_used
        row.backend = ", ".join(sorted(used or probe.backends))
        if used:
            real = all(registry.backends[name].realised for name in used)
            row.saving = "realised" if real else "simulated"
        for fallback in watched.fallbacks:
            row.fallback = f"{fallback.requested} refuses: {fallback.reason}"
    steps.run(1)
    row.peak = peak_of(steps, plan)
    return steps


def peak_of(steps: Steps, plan: DecodePlan) -> int | None:
    """Bytes taken at most by a step; not known on the CPU."""
    if plan.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(plan.device)
    torch.cuda.reset_peak_memory_stats(plan.device)
    steps.run(1)
    return int(torch.cuda.max_memory_allocated(plan.device) - before)


def time_eager(loops: Sequence[tuple[DecodeRow, Steps]], plan: DecodePlan) -> None:
    """Time the eager loops in interleaved rounds."""
    seconds: dict[int, list[float]] = {}
    for round_ in range(plan.warmup + plan.rounds):
        for index, (_, steps) in enumerate(loops):
            taken = steps.run(plan.new_tokens if round_ >= plan.warmup else 1)
            if round_ >= plan.warmup:
                seconds.setdefault(index, []).append(taken)
    for index, taken_ in seconds.items():
        loops[index][0].times[EAGER] = Times(tuple(taken_))


def time_captured(
    row: DecodeRow, pipeline: Pipeline, adapter: Any, plan: DecodePlan, context: MadeUpContext
) -> None:
    """Time steps that the adapter replays from a CUDA graph; the row says why if there are none."""
    capture = getattr(adapter, "capture_decode", None)
    if plan.device.type != "cuda":
        row.no_graph = NO_CUDA
        return
    if row.name == BY_ROWS:
        row.no_graph = f"see '{row.name}, {FIXED}'"
        return
    if capture is None:
        row.no_graph = "the adapter captures no decode steps"
        return
    compat.restore_cache(context.cache, context.base)
    context.states.clear()
    taken = inspect.signature(capture).parameters
    names = [name for name in ("room", "max_new_tokens") if name in taken]
    room = dict.fromkeys(names, plan.new_tokens + 2)
    try:
        decoder = capture(context, pipeline, **room)
        decoder.step()
        each = max(1, plan.new_tokens // plan.rounds)
        seconds = []
        for _ in range(max(1, plan.new_tokens // each)):
            begin = now(plan.device)
            for _ in range(each):
                decoder.step()
            seconds.append((now(plan.device) - begin) / each)
        row.times[CAPTURED] = Times(tuple(seconds))
    except Exception as error:  # whatever a capture raises, eager numbers stand
        row.no_graph = f"{type(error).__name__}: {error}"
    finally:
        context.states.clear()
        compat.restore_cache(context.cache, context.base)
