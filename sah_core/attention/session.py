"""One attention call of a running request: state, mask, backend."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import pluggy
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.attention.backends import Choice, Fallback
from sah_core.attention.states import LayerState, Snapshot, Upkeep, cannot_reorder, copied
from sah_core.attention.steps import (
    add_step,
    as_alone,
    build_mask,
    leading_position_only,
    with_step,
)
from sah_core.backend import Backend
from sah_core.errors import ParameterError, UnsupportedError
from sah_core.hookspecs import PROJECT, ObserverSpec
from sah_core.inputs import PHASES, Inputs, Phase
from sah_core.mask import KeyRange, Mask
from sah_core.masker import Masker
from sah_core.weights import attention_weights

if TYPE_CHECKING:
    from sah_core.pipeline import Pipeline


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
        choice: Which backend runs.
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
        self.length: Tensor | None = None
        self.request_state: dict[Any, Any] = {}
        self.layers: dict[int, LayerState] = {}
        self.observer_seconds = 0.0
        self.backends_used: set[str] = set()
        self.choice = Choice(needs_lse=any("lse" in s.capabilities.needs for s in pipeline.steps))
        self._passes: int | None = None
        self._question: int | None = None
        self._last_layer = -1
        self._upkeep = Upkeep(pipeline)
        self._feedback = tuple(
            i
            for i, s in enumerate(pipeline.steps)
            if type(s).after_attention is not Masker.after_attention
        )
        self._leading = leading_position_only(pipeline.steps)
        self._prefix: tuple[Allowed, tuple[int, int, int, int], Mask] | None = None
        self.hook: Any = None
        if observers:
            self.hook = hooks_of(observers)
            self._watch_mask = bool(self.hook.sah_mask_built.get_hookimpls())
            self._watch_output = bool(self.hook.sah_attention_computed.get_hookimpls())

    @property
    def fallbacks(self) -> list[Fallback]:
        """Backends that refused, each reason once."""
        return self.choice.fallbacks

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
        weights: list[Tensor] | None = None,
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
            weights: Takes the weights with which the keys were attended,
                ``(batch, heads, query_len, key_len)`` in the type of the query; None where nobody
                asks for them.

        Returns:
            ``(batch, query_len, heads, value_dim)``.
        """
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
            key_len=key.shape[2] if self.length is None else None,
            length=self.length,
            softcap=softcap,
            sinks=sinks,
            layer=layer,
            layer_count=len(self.layer_types),
            layer_type=layer_type,
            phase=phase,
            request_state=self.request_state,
        )
        if self._question is None:
            return self._attend(inputs, weights)
        return self._verify(inputs, self._question if self._passes == 1 else 0, weights)

    def _verify(self, inputs: Inputs, question: int, weights: list[Tensor] | None) -> Tensor:
        """A pass over ``question`` rows of a question and proposed tokens behind them, which are
        decoded as they would be one by one: each sees the keys up to its own, and the states as
        they then are.
        """
        layer, layer_type, rows = inputs.layer, inputs.layer_type, inputs.query_len
        one_by_one = self.pipeline.is_sparse(layer, layer_type, "decode")
        keeps = one_by_one and (self._upkeep.stateful or self._upkeep.needs_window)
        if keeps and layer_type != "full_attention":
            raise UnsupportedError(
                what=f"verifying proposed tokens in layer {layer} ({layer_type})",
                reason="what a masker keeps of them cannot be taken back where a cache drops keys",
            )
        held = inputs.capacity - rows
        if layer in self.layers:
            self.layers[layer].take_back(held)
        parts: list[Tensor] = []
        ends: list[int] = []
        taken: list[Tensor] | None = None if weights is None else []
        if question:
            ends.append(min(question, rows))
            parts.append(self._attend(as_alone(inputs, 0, ends[0], "question"), taken))
        step = 1 if one_by_one else max(1, rows - question)
        for begin in range(question, rows, step):
            if keeps:
                kept = self.layers.setdefault(layer, LayerState())
                kept.marks[held + begin] = kept.snapshot()
            ends.append(begin + step)
            parts.append(self._attend(as_alone(inputs, begin, begin + step, "decode"), taken))
        if weights is not None and taken is not None:
            weights.append(joined_rows(taken, [rows - end for end in ends], inputs.capacity))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, inputs: Inputs, weights: list[Tensor] | None) -> Tensor:
        if self.pipeline.is_sparse(inputs.layer, inputs.layer_type, inputs.phase):
            return self._attend_sparsely(inputs, weights)
        self._forget_other_text(inputs)
        self.remember(inputs)
        mask = full_mask(inputs)
        backend = self.choice.backend_for(inputs, mask, requested="auto", feedback=False)
        return self._run(inputs, mask, backend, weights)

    def _attend_sparsely(self, inputs: Inputs, weights: list[Tensor] | None) -> Tensor:
        inputs = inputs.with_ops(self.choice.ops_for(inputs, self.requested))
        states = self.advance(inputs) if self._upkeep.stateful else {}
        inputs = self.remember(inputs)
        mask = self.mask_for(inputs, states)
        backend = self.choice.backend_for(inputs, mask, requested=self.requested)
        self.backends_used.add(backend.name)
        return self._run(inputs, mask, backend, weights, told=self.listens)

    def _run(
        self,
        inputs: Inputs,
        mask: Mask,
        backend: Backend,
        weights: list[Tensor] | None,
        *,
        told: bool = False,
    ) -> Tensor:
        """Execute a mask under the eyes of observers, and tell the maskers that asked for it."""
        watched = self.hook is not None and inputs.phase in self.pipeline.phases
        if watched and self._watch_mask:
            self.observe("sah_mask_built", inputs=inputs, mask=mask)
        output, lse = backend.attend(inputs, mask)
        if weights is not None:
            weights.append(attention_weights(inputs, mask)[0].to(inputs.query.dtype))
        if told:
            self.attended(inputs, mask, lse)
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

    @property
    def listens(self) -> bool:
        """Whether a masker asks to be told of the attention that was computed."""
        return bool(self._feedback)

    def attended(self, inputs: Inputs, mask: Mask, lse: Tensor | None) -> None:
        """Tell the maskers that ask for it what was attended.

        Args:
            inputs: The call.
            mask: The mask of the whole pipeline.
            lse: Its log-sum-exp ``(batch, heads, query_len)``; None unless a masker needs it.
        """
        kept = self.layers.get(inputs.layer)
        for index in self._feedback:
            state = None if kept is None else kept.states.get(index)
            self.pipeline.steps[index].after_attention(state, inputs, mask, lse)

    def forget_pass(self) -> None:
        """Drop what was computed for the last forward pass."""
        self._prefix = None

    def start_question(self, verified: int | None = None) -> None:
        """The context is complete: the next forward pass is a question, whatever its length.

        Args:
            verified: Tokens of the question, where passes may hold proposed tokens behind it that
                are only verified (assisted decoding). Their rows are then decoded one by one, and
                when the cache drops the keys of rejected tokens, so do the states. None where every
                pass holds what its phase says.
        """
        self._question = verified
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
            mask = add_step(steps[index], step_inputs, mask)
        return mask

    def observe(self, name: str, **arguments: Any) -> None:
        """Call one observer hook and keep its time apart; nothing happens without observers."""
        if self.hook is None:
            return
        begin = time.perf_counter()
        getattr(self.hook, name)(**arguments)
        self.observer_seconds += time.perf_counter() - begin

    def advance(self, inputs: Inputs) -> dict[int, Any]:
        """Show the states of a layer the keys that they have not seen."""
        self._forget_other_text(inputs)
        kept = self.layers.setdefault(inputs.layer, LayerState())
        self._upkeep.advance(kept, inputs)
        return kept.states

    def _forget_other_text(self, inputs: Inputs) -> None:
        """Forget what was kept if all keys of a call are new: they are those of another text."""
        kept = self.layers.get(inputs.layer)
        if kept is not None and kept.seen and inputs.key_len == inputs.query_len:
            self.reset()

    def remember(self, inputs: Inputs) -> Inputs:
        """The call with the last query rows up to its own, which are kept for those that follow;
        the call itself where no masker needs them.
        """
        if not self._upkeep.needs_window:
            return inputs
        layer = inputs.layer, inputs.layer_type
        if not any(self.pipeline.is_sparse(*layer, phase) for phase in PHASES):
            return inputs
        return self._upkeep.remember(self.layers.setdefault(inputs.layer, LayerState()), inputs)

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
            if self._upkeep.stateful and not kept.ended and inputs.key_len is not None:
                ops = self.choice.ops_for(inputs, self.requested)
                self._upkeep.end_prefill(kept, inputs.with_ops(ops))

    def snapshot(self) -> Snapshot:
        """Remember the present state; costs what the states cannot cut back by length."""
        layers = {layer: kept.snapshot() for layer, kept in self.layers.items()}
        return Snapshot(layers, copied(self.request_state))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        for layer in list(self.layers):
            if layer not in snapshot.layers:
                del self.layers[layer]
            else:
                self.layers[layer].restore(snapshot.layers[layer])
                self.layers[layer].marks.clear()
        self.request_state.clear()
        self.request_state.update(copied(snapshot.request_state))
        self._prefix = None

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order, or some of them several times, as the cache does
        (`sah_core.state.State`); snapshots from before are void.

        Args:
            rows: What each sequence was before, int64 ``(sequences,)``.

        Raises:
            UnsupportedError: If a masker keeps what cannot follow; then nothing has changed.
        """
        self._check_order()
        for kept in self.layers.values():
            kept.reorder(rows)
        self._prefix = None

    def branched(self, rows: Tensor) -> dict[int, LayerState]:
        """A copy of what is kept of every layer, its sequences taken as by `reorder`.

        Raises:
            UnsupportedError: As `reorder`.
        """
        self._check_order()
        made = {}
        for layer, kept in self.layers.items():
            made[layer] = copy.deepcopy(kept)
            made[layer].reorder(rows)
        return made

    def _check_order(self) -> None:
        for states in ({}, *(kept.states for kept in self.layers.values())):
            for index, step in enumerate(self.pipeline.steps):
                reason = cannot_reorder(step, states.get(index))
                if reason:
                    raise UnsupportedError(
                        what=f"reordering sequences (beam search) with masker {step.name!r}",
                        reason=f"{reason}; use num_beams=1",
                    )

    def reset(self) -> None:
        """Forget the request."""
        self.layers.clear()
        self.request_state.clear()
        self._prefix = None


def hooks_of(observers: Sequence[object]) -> pluggy.HookRelay:
    """The observer hooks of some objects, called in their order."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(ObserverSpec)
    for observer in reversed(observers):
        manager.register(observer)
    manager.check_pending()
    return manager.hook


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


def joined_rows(parts: Sequence[Tensor], behind: Sequence[int], keys: int) -> Tensor:
    """The weights of calls over some rows each as those of one call over all of them.

    Args:
        parts: Weights ``(batch, heads, rows, keys of the call)``.
        behind: Per part the keys behind those of its call.
        keys: Keys of the whole call.
    """
    return torch.cat(
        [
            torch.nn.functional.pad(part, (keys - after - part.shape[3], after))
            for part, after in zip(parts, behind, strict=True)
        ],
        dim=2,
    )


def full_mask(inputs: Inputs) -> Mask:
    """Every allowed key; inside a capture as a range, since its end lives on the device."""
    if inputs.key_len is not None:
        return Mask.full(inputs.shape)
    allowed = inputs.allowed
    return Mask.from_ranges(inputs.shape, [KeyRange(allowed.start, allowed.stop, inputs.capacity)])


def infer_phase(query_len: int, key_len: int) -> Phase:
    """The phase of a call outside a request."""
    if query_len == key_len:
        return "prefill"
    return "decode" if query_len == 1 else "question"
