"""One attention call of a running request: state, mask, backend.

A `Session` belongs to one pipeline on one model. It knows nothing of any model library:
`sah_core.patching` feeds it the tensors of each layer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import pluggy
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.backend import Backend, Problem
from sah_core.errors import ParameterError, UnsupportedError
from sah_core.hookspecs import PROJECT, ObserverSpec
from sah_core.inputs import Inputs, Phase
from sah_core.mask import KeyRange, Mask
from sah_core.masker import Masker
from sah_core.ops import Ops
from sah_core.randomness import Random
from sah_core.state import LayerInfo

if TYPE_CHECKING:
    from sah_core.pipeline import Pipeline

log = logging.getLogger(__name__)


def layer_info(inputs: Inputs, step: int = 0, seed: int = 0) -> LayerInfo:
    """What the masker at position ``step`` of the pipeline may know of the layer of a call when it
    creates its state.
    """
    padded = inputs.key_len is None or any(inputs.allowed.first_host)
    return LayerInfo(
        index=inputs.layer,
        count=inputs.layer_count,
        batch=inputs.batch,
        heads=inputs.heads,
        kv_heads=inputs.kv_heads,
        head_dim=inputs.key.shape[3],
        value_dim=inputs.value.shape[3],
        capacity=buffer_length(inputs.key),
        first=inputs.allowed.first if padded else None,
        dtype=inputs.key.dtype,
        device=inputs.key.device,
        ops=inputs.ops,
        random=Random(seed=seed, step=step, layer=inputs.layer),
    )


def with_step(inputs: Inputs, step: int, state: Any, seed: int = 0) -> Inputs:
    """The call as the masker at position ``step`` of the pipeline sees it."""
    return attrs.evolve(
        inputs, state=state, random=Random(seed=seed, step=step, layer=inputs.layer)
    )


def context_only(inputs: Inputs, keys: int) -> Inputs:
    """A call without query rows over the first ``keys`` keys, as `Masker.end_prefill` sees it."""
    allowed = inputs.allowed.rows(0, 0)
    if allowed.keep is not None:
        allowed = attrs.evolve(allowed, keep=allowed.keep[..., :keys])
    return attrs.evolve(
        inputs,
        query=inputs.query[:, :, :0],
        key=inputs.key[:, :, :keys],
        value=inputs.value[:, :, :keys],
        allowed=allowed,
        query_position=inputs.query_position[:, :0],
        key_len=keys,
        length=None,
    )


def build_mask(
    steps: Sequence[Masker], inputs: Inputs, states: Mapping[int, Any] | None = None, seed: int = 0
) -> Mask:
    """Run the maskers of a pipeline one after the other.

    Args:
        steps: The maskers.
        inputs: The attention call.
        states: State per step for the steps that keep one. Without it (golden files, conformance
            checks, a call outside any request) states are built here by ``append`` and
            ``end_prefill`` over all keys.
        seed: Seed of the pipeline.

    Returns:
        The mask after the last step, not yet intersected with what may be attended.
    """
    mask = Mask.empty(inputs.shape)
    for index, masker in enumerate(steps):
        if states is not None:
            state = states.get(index)
        else:
            state = masker.init_state(layer_info(inputs, index, seed))
            if state is not None:
                masker.append(state, inputs.key, inputs.value, 0)
                context = context_only(inputs, inputs.capacity)
                masker.end_prefill(state, with_step(context, index, state, seed))
        mask = masker.add_mask(with_step(inputs, index, state, seed), mask)
    return mask


@attrs.define
class LayerState:
    """What a session keeps for one layer of a request.

    Attributes:
        seen: Keys that the states have been shown.
        ended: The end of the prefill has been announced.
        states: State per pipeline step.
    """

    seen: int = 0
    ended: bool = False
    states: dict[int, Any] = attrs.field(factory=dict)


@attrs.frozen
class Snapshot:
    """A point to which a session can go back; one live branch at a time."""

    layers: dict[int, tuple[int, bool, dict[int, Any]]]
    request_state: dict[Any, Any]


@attrs.frozen
class Fallback:
    """A backend that was asked for and refused.

    Attributes:
        requested: The backend that refused.
        reason: Why.
        used: The backend that ran instead.
    """

    requested: str
    reason: str
    used: str


class Session:
    """A pipeline at work on one model.

    Args:
        pipeline: What to run, and where.
        layer_types: Attention type of every layer of the model.
        backend: Backend for sparse calls, by name; ``auto`` is the fastest capable one. Defaults to
            the pipeline's.
        observers: Objects with observer hooks; without any, nothing is paid for them.

    Attributes:
        phase: Phase of the coming calls; None infers it: inside a request the first forward pass
            after `start_question` and every pass of several rows are the question; outside one, all
            keys new is a prefill, one new key is decoding, anything between is a question.
        length: Valid keys as a device tensor, set under graph capture only.
        observer_seconds: Time spent in observers, to be left out of timings.
        fallbacks: Backends that refused, each reason once.
        backends_used: Names of the backends that executed sparse calls.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        layer_types: Sequence[str],
        *,
        backend: str | None = None,
        observers: Sequence[object] = (),
    ) -> None:
        check_layers(pipeline, len(layer_types))
        _check_layer_types(pipeline, layer_types)
        self.pipeline = pipeline
        self.layer_types = tuple(layer_types)
        self.requested = backend or pipeline.backend
        self.phase: Phase | None = None
        self._passes: int | None = None
        self._last_layer = -1
        self.length: Tensor | None = None
        self.request_state: dict[Any, Any] = {}
        self.layers: dict[int, LayerState] = {}
        self.observer_seconds = 0.0
        self.fallbacks: list[Fallback] = []
        self.backends_used: set[str] = set()
        self._chosen: dict[tuple[str, Problem, bool], Backend] = {}
        self._ops: dict[Any, Ops] = {}
        self._backends: dict[str, Backend | None] = {}
        self._prefix: tuple[Allowed, tuple[int, int, int, int], Mask] | None = None
        self._stateful = tuple(i for i, s in enumerate(pipeline.steps) if s.is_stateful())
        self._reads_values = any(
            not pipeline.steps[i].capabilities.keys_only for i in self._stateful
        )
        self._feedback = tuple(
            i
            for i, s in enumerate(pipeline.steps)
            if type(s).after_attention is not Masker.after_attention
        )
        self._needs_lse = any("lse" in s.capabilities.needs for s in pipeline.steps)
        self._leading = leading_position_only(pipeline.steps)
        self.hook: Any = None
        if observers:
            manager = pluggy.PluginManager(PROJECT)
            manager.add_hookspecs(ObserverSpec)
            for observer in reversed(observers):
                manager.register(observer)
            manager.check_pending()
            self.hook = manager.hook
            self._watch_mask = bool(manager.hook.sah_mask_built.get_hookimpls())
            self._watch_output = bool(manager.hook.sah_attention_computed.get_hookimpls())

    # A call

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Allowed,
        scaling: float,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention of one layer.

        Args:
            layer: Layer index.
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``, the new keys last.
            value: ``(batch, kv_heads, key_len, value_dim)``.
            allowed: Who may be attended.
            scaling: Factor on ``q . k``.
            softcap: Logit cap, or None.
            sinks: Learned sink logits ``(heads,)``, or None.

        Returns:
            ``(batch, query_len, heads, value_dim)``.
        """
        key_len = key.shape[2] if self.length is None else None
        layer_type = self.layer_types[layer] if layer < len(self.layer_types) else "full_attention"
        if layer <= self._last_layer and self._passes is not None:
            self._passes += 1
        self._last_layer = layer
        phase = self.phase or self.infer_phase(query.shape[2], key.shape[2])
        inputs = Inputs(
            query=query,
            key=key,
            value=value,
            allowed=allowed,
            scaling=scaling,
            key_len=key_len,
            length=self.length,
            softcap=softcap,
            sinks=sinks,
            layer=layer,
            layer_count=len(self.layer_types),
            layer_type=layer_type,
            phase=phase,
            request_state=self.request_state,
        )
        sparse = self.pipeline.is_sparse(layer, layer_type, phase)
        if not sparse:
            mask = full_mask(inputs)
            backend = self.backend_for(inputs, mask, requested="auto", feedback=False)
        else:
            inputs = attrs.evolve(inputs, ops=self.ops_for(inputs))
            states = self.advance(inputs) if self._stateful else {}
            mask = self.mask_for(inputs, states)
            backend = self.backend_for(inputs, mask, requested=self.requested)
            self.backends_used.add(backend.name)
        watched = self.hook is not None and phase in self.pipeline.phases
        if watched and self._watch_mask:
            self.observe("sah_mask_built", inputs=inputs, mask=mask)
        output, lse = backend.attend(inputs, mask)
        if sparse:
            for index in self._feedback:
                state = self.layers[layer].states.get(index) if layer in self.layers else None
                self.pipeline.steps[index].after_attention(state, inputs, mask, lse)
        if watched and self._watch_output:
            self.observe(
                "sah_attention_computed",
                inputs=inputs,
                mask=mask,
                output=output,
                lse=lse,
                backend=backend.name,
            )
        return output

    def forget_pass(self) -> None:
        """Drop what was computed for the last forward pass."""
        self._prefix = None

    def start_question(self) -> None:
        """The context is complete: the next forward pass is a question, whatever its length."""
        self.phase = None
        self._passes = 0
        self._last_layer = len(self.layer_types)

    def infer_phase(self, query_len: int, key_len: int) -> Phase:
        """The phase of a call whose phase was not set."""
        if self._passes is not None:
            return "question" if self._passes == 1 or query_len > 1 else "decode"
        return infer_phase(query_len, key_len)

    def mask_for(self, inputs: Inputs, states: Mapping[int, Any]) -> Mask:
        """The pipeline's mask; leading steps that depend on positions alone run once per forward
        pass.
        """
        steps, seed = self.pipeline.steps, self.pipeline.seed
        if not self._leading:
            return build_mask(steps, inputs, states, seed)
        known = self._prefix
        if known is not None and known[0] is inputs.allowed and known[1] == inputs.shape:
            mask = known[2]
        else:
            mask = build_mask(steps[: self._leading], inputs, {}, seed)
            self._prefix = (inputs.allowed, inputs.shape, mask)
        for index in range(self._leading, len(steps)):
            step_inputs = with_step(inputs, index, states.get(index), seed)
            mask = steps[index].add_mask(step_inputs, mask)
        return mask

    def observe(self, name: str, **arguments: Any) -> None:
        """Call one observer hook and keep its time apart; nothing happens without observers."""
        if self.hook is None:
            return
        begin = time.perf_counter()
        getattr(self.hook, name)(**arguments)
        self.observer_seconds += time.perf_counter() - begin

    # State

    def advance(self, inputs: Inputs) -> dict[int, Any]:
        """Show the states of a layer the keys that they have not seen."""
        kept = self.layers.get(inputs.layer)
        if kept is not None and kept.seen and inputs.key_len == inputs.query_len:
            self.reset()  # all keys are new: another text, for which nothing has been kept
            kept = None
        if kept is None:
            kept = self.layers[inputs.layer] = LayerState()
        if inputs.key_len is None:
            self._append_captured(kept, inputs)
            return kept.states
        context = inputs.key_len - inputs.query_len
        if context < kept.seen:
            raise UnsupportedError(
                what=f"a stateful masker in layer {inputs.layer} ({inputs.layer_type})",
                reason="the cache has dropped keys that the masker has taken note of",
            )
        if inputs.phase == "prefill":
            self._append(kept, inputs, inputs.key_len)
            return kept.states
        if not kept.ended:
            self._append(kept, inputs, max(context, kept.seen))
            self._end(kept, inputs)
        self._append(kept, inputs, inputs.key_len)
        return kept.states

    def end_prefill(self, layers: Mapping[int, Inputs]) -> None:
        """Build the states of all layers from the cached context at once.

        Args:
            layers: Per layer a call without query rows over the cached keys and values.
        """
        for layer, inputs in layers.items():
            if not self.pipeline.is_sparse(layer, inputs.layer_type, "decode") and not (
                self.pipeline.is_sparse(layer, inputs.layer_type, "question")
            ):
                continue
            kept = self.layers.setdefault(layer, LayerState())
            if self._stateful and not kept.ended and inputs.key_len is not None:
                with_ops = attrs.evolve(inputs, ops=self.ops_for(inputs))
                self._append(kept, with_ops, inputs.key_len)
                self._end(kept, with_ops)

    def _append(self, kept: LayerState, inputs: Inputs, upto: int) -> None:
        steps = self.pipeline.steps
        if not kept.states:
            seed = self.pipeline.seed
            kept.states = {
                i: steps[i].init_state(layer_info(inputs, i, seed)) for i in self._stateful
            }
        if upto <= kept.seen:
            return
        key = inputs.key[:, :, kept.seen : upto]
        value = inputs.value[:, :, kept.seen : upto]
        for index, state in kept.states.items():
            if state is not None:
                steps[index].append(state, key, value, kept.seen)
        kept.seen = upto

    def _append_captured(self, kept: LayerState, inputs: Inputs) -> None:
        if self._stateful and not kept.states:
            raise UnsupportedError(
                what=f"captured decoding of layer {inputs.layer}",
                reason="its states must be built from the context first",
            )
        position = inputs.allowed.memo.get("new key")
        if position is None:
            position = inputs.allowed.memo["new key"] = inputs.length - inputs.query_len
        key = inputs.key.index_select(2, position)
        value = inputs.value[:, :, :0]
        if self._reads_values:
            value = inputs.value.index_select(2, position)
        for index, state in kept.states.items():
            if state is not None:
                if hasattr(state, "reserve"):
                    state.reserve(inputs.capacity)
                self.pipeline.steps[index].append(state, key, value, position)

    def _end(self, kept: LayerState, inputs: Inputs) -> None:
        context = context_only(inputs, kept.seen)
        for index, state in kept.states.items():
            if state is not None:
                step_inputs = with_step(context, index, state, self.pipeline.seed)
                self.pipeline.steps[index].end_prefill(state, step_inputs)
        kept.ended = True

    def snapshot(self) -> Snapshot:
        """Remember the present state; costs what the states cannot cut back by length."""
        layers = {
            layer: (
                kept.seen,
                kept.ended,
                {i: s.snapshot() for i, s in kept.states.items() if s is not None},
            )
            for layer, kept in self.layers.items()
        }
        return Snapshot(layers, copied(self.request_state))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        for layer in list(self.layers):
            if layer not in snapshot.layers:
                del self.layers[layer]
                continue
            kept = self.layers[layer]
            kept.seen, kept.ended, tokens = snapshot.layers[layer]
            if not tokens:
                kept.states = {}
            for index, token in tokens.items():
                kept.states[index].restore(token)
        self.request_state.clear()
        self.request_state.update(copied(snapshot.request_state))
        self._prefix = None

    def reset(self) -> None:
        """Forget the request."""
        self.layers.clear()
        self.request_state.clear()
        self._prefix = None

    # Backends

    def ops_for(self, inputs: Inputs) -> Ops:
        """The scoring primitives of the backend that is expected to run, asked once per kind of
        call: layers and steps differ in the number of keys alone.
        """
        facts = (
            inputs.query.shape,
            inputs.query.dtype,
            inputs.query.device,
            inputs.key.shape[1],
            inputs.value.shape[3],
            inputs.allowed.keep is None,
            inputs.softcap is None,
            inputs.sinks is None,
            inputs.key_len is None,
        )
        if facts not in self._ops:
            nothing = Mask.empty(inputs.shape)
            backend = self.backend_for(inputs, nothing, requested=self.requested, quiet=True)
            self._ops[facts] = backend.ops
        return self._ops[facts]

    def backend_for(
        self,
        inputs: Inputs,
        mask: Mask,
        *,
        requested: str,
        quiet: bool = False,
        feedback: bool = True,
    ) -> Backend:
        """The backend for a call.

        Args:
            inputs: The call.
            mask: What it selects.
            requested: The backend to take if it accepts, else the capable one of the highest rank
                runs; ``auto`` has no preference.
            quiet: Do not note a fallback.
            feedback: The log-sum-exp is wanted where a masker of the pipeline needs it.

        Raises:
            UnsupportedError: If no backend accepts.
        """
        problem = Problem.of(inputs, mask, needs_lse=self._needs_lse and feedback)
        known = self._chosen.get((requested, problem, quiet))
        if known is not None:
            return known
        reasons: list[str] = []
        for name in candidates(requested, self._backends):
            backend = self._backends[name]
            if backend is None:
                continue
            reason = backend.refuses(problem)
            if reason is None:
                if requested not in ("auto", name) and not quiet:
                    self._note(Fallback(requested, reasons[0], name))
                self._chosen[requested, problem, quiet] = backend
                return backend
            reasons.append(f"{name}: {reason}" if name != requested else reason)
        raise UnsupportedError(
            what=f"attention of layer {inputs.layer} on {problem.device}",
            reason="; ".join(reasons) or "no backend is installed",
        )

    def _note(self, fallback: Fallback) -> None:
        if fallback not in self.fallbacks:
            self.fallbacks.append(fallback)
            log.warning(
                "backend %s refuses (%s); %s runs instead",
                fallback.requested,
                fallback.reason,
                fallback.used,
            )


def check_layers(pipeline: Pipeline, count: int) -> None:
    """Refuse layer indices that the model does not have."""
    for option in ("dense_layers", "layers"):
        for layer in getattr(pipeline, option) or ():
            if layer >= count:
                raise ParameterError(
                    "Pipeline", option, layer, f"layer indices below {count}, the model's layers"
                )


def _check_layer_types(pipeline: Pipeline, known: Sequence[str]) -> None:
    """Refuse layer types that were asked for and of which the model has none."""
    asked = pipeline.layer_types
    is_default = asked == attrs.fields(type(pipeline)).layer_types.default
    if known and not is_default and not set(asked) & set(known):
        expected = f"types that layers of the model have: {', '.join(dict.fromkeys(known))}"
        raise ParameterError("Pipeline", "layer_types", list(asked), expected)


def full_mask(inputs: Inputs) -> Mask:
    """Every allowed key; inside a capture as a range, since its end lives on the device."""
    if inputs.key_len is not None:
        return Mask.full(inputs.shape)
    allowed = inputs.allowed
    return Mask.from_ranges(inputs.shape, [KeyRange(allowed.start, allowed.stop, inputs.capacity)])


def buffer_length(key: Tensor) -> int:
    """Keys that fit into the buffer that ``key`` is the filled part of."""
    steps = key.stride()
    if steps[3] == 1 and steps[2] == key.shape[3] and steps[1] % steps[2] == 0:
        return max(key.shape[2], steps[1] // steps[2])
    return key.shape[2]


def candidates(requested: str, made: dict[str, Backend | None]) -> list[str]:
    """Backend names in the order to try.

    Args:
        requested: The name of the first, or ``auto``.
        made: Takes an instance of each backend, None for one that cannot be made.

    Returns:
        The names of the backends that could be made.
    """
    from sah_core import registry

    if requested != "auto" and made.get(requested) is None:
        made[requested] = registry.backends[requested]()
    for name in registry.backends.names():
        if name not in made:
            try:
                made[name] = registry.backends[name]()
            except Exception as error:  # a foreign class may raise anything
                made[name] = None
                log.warning("backend %s is left out: %s", name, error)
    usable = {name: backend.rank for name, backend in made.items() if backend is not None}
    ranked = sorted(usable, key=lambda name: (-usable[name], name))
    if requested == "auto":
        return ranked
    return [requested, *(n for n in ranked if n != requested)]


def leading_position_only(steps: Sequence[Masker]) -> int:
    """How many steps at the start of the pipeline depend on positions alone."""
    count = 0
    for step in steps:
        if not step.capabilities.position_only or step.is_stateful():
            break
        count += 1
    return count


def infer_phase(query_len: int, key_len: int) -> Phase:
    """The phase of a call outside a request."""
    if query_len == key_len:
        return "prefill"
    return "decode" if query_len == 1 else "question"


def copied(request_state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A request's state whose tensors, which maskers write in place, are copies."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in request_state.items()
    }
