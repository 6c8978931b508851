"""The states that maskers keep for the layers of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from sah_core.attention.steps import context_only, layer_info, with_step
from sah_core.errors import UnsupportedError
from sah_core.inputs import WINDOW_QUERIES, Inputs

if TYPE_CHECKING:
    from sah_core.masker import Masker
    from sah_core.pipeline import Pipeline

LayerToken = tuple[int, bool, dict[int, Any], Tensor | None, int]
"""What `LayerState.snapshot` remembers: keys seen, whether the prefill has ended, states, the last
query rows, and how often the sequences had been reordered.
"""


@attrs.define
class LayerState:
    """What a session keeps for one layer of a request.

    Attributes:
        seen: Keys that the states have been shown.
        ended: The end of the prefill has been announced.
        states: State per pipeline step.
        window: The last query rows, where a masker needs them; a new tensor with every call.
        marks: What was before each row of the last pass, by the keys before that row; only where
            proposed tokens are verified.
        batch: Sequences that the states are of, once there are states.
        device: Where the keys live that the states have seen; likewise.
        reorders: How often the sequences were reordered.
    """

    seen: int = 0
    ended: bool = False
    states: dict[int, Any] = attrs.field(factory=dict)
    window: Tensor | None = None
    marks: dict[int, LayerToken] = attrs.field(factory=dict)
    batch: int = 0
    device: torch.device | None = None
    reorders: int = 0

    def snapshot(self) -> LayerToken:
        """Remember the present state; costs what the states cannot cut back by length."""
        states = {i: s.snapshot() for i, s in self.states.items() if s is not None}
        return self.seen, self.ended, states, self.window, self.reorders

    def restore(self, token: LayerToken) -> None:
        """Go back to a snapshot.

        Raises:
            UnsupportedError: If the sequences were reordered after it was taken.
        """
        if token[-1] != self.reorders:
            raise UnsupportedError(
                what="going back to a snapshot from before the sequences were reordered",
                reason="of most states it holds lengths alone; reorder a copy of the states",
            )
        self.seen, self.ended, states, self.window, _ = token
        if not states:
            self.states = {}
        for index, state in states.items():
            self.states[index].restore(state)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order, or some of them several times; see
        `sah_core.state.State`.
        """
        for state in self.states.values():
            if state is not None:
                state.reorder(rows.to(self.device))
        if self.window is not None:
            self.window = self.window.index_select(0, rows.to(self.window.device))
        self.marks.clear()
        self.batch = len(rows)
        self.reorders += 1

    def take_back(self, held: int) -> None:
        """Forget the rows of the last pass whose keys are not among the ``held`` that the cache
        still has.
        """
        if held in self.marks:
            self.restore(self.marks[held])
        self.marks.clear()


@attrs.frozen
class Snapshot:
    """A point to which a session can go back; one live branch at a time."""

    layers: dict[int, LayerToken]
    request_state: dict[Any, Any]


class Upkeep:
    """What shows the states of a layer the keys that they have not seen.

    Args:
        pipeline: The maskers whose states these are.

    Attributes:
        stateful: Positions of the maskers that keep a state.
        needs_window: A masker needs the last query rows.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._steps, self._seed = pipeline.steps, pipeline.seed
        self.stateful = tuple(i for i, s in enumerate(self._steps) if s.is_stateful())
        self._reads_values = any(not self._steps[i].capabilities.keys_only for i in self.stateful)
        self.needs_window = any("window_queries" in s.capabilities.needs for s in self._steps)

    def advance(self, kept: LayerState, inputs: Inputs) -> None:
        """Take in the keys of a call, and announce the end of the prefill when it is over.

        Raises:
            UnsupportedError: If the cache has dropped keys or is of other sequences, or under graph
                capture if the states were not built from the context first.
        """
        if inputs.key_len is None:
            self._append_captured(kept, inputs)
            return
        if kept.states and inputs.batch != kept.batch:
            raise UnsupportedError(
                what=f"a stateful masker in layer {inputs.layer} ({inputs.layer_type})",
                reason=f"the cache has {inputs.batch} sequences, and the masker has taken note of "
                f"{kept.batch}",
            )
        context = inputs.key_len - inputs.query_len
        if context < kept.seen:
            raise UnsupportedError(
                what=f"a stateful masker in layer {inputs.layer} ({inputs.layer_type})",
                reason="the cache has dropped keys that the masker has taken note of",
            )
        if inputs.phase != "prefill" and not kept.ended:
            self._append(kept, inputs, max(context, kept.seen))
            self._end(kept, inputs)
        self._append(kept, inputs, inputs.key_len)

    def remember(self, kept: LayerState, inputs: Inputs) -> Inputs:
        """Keep the last query rows up to those of a call, and put them into it."""
        rows = inputs.query[:, :, -WINDOW_QUERIES:]
        if kept.window is not None and inputs.key_len != inputs.query_len:
            rows = torch.cat([kept.window, rows], dim=2)[:, :, -WINDOW_QUERIES:]
        kept.window = rows.clone()
        return attrs.evolve(inputs, window_queries=kept.window)

    def end_prefill(self, kept: LayerState, inputs: Inputs) -> None:
        """Build the states from the cached context at once."""
        self._append(kept, inputs, inputs.capacity)
        self._end(kept, inputs)

    def _append(self, kept: LayerState, inputs: Inputs, upto: int) -> None:
        if not kept.states:
            kept.states = {
                i: self._steps[i].init_state(layer_info(inputs, i, self._seed))
                for i in self.stateful
            }
            kept.batch, kept.device = inputs.batch, inputs.key.device
        if upto <= kept.seen:
            return
        key = inputs.key[:, :, kept.seen : upto]
        value = inputs.value[:, :, kept.seen : upto]
        for index, state in kept.states.items():
            if state is not None:
                self._steps[index].append(state, key, value, kept.seen)
        kept.seen = upto

    def _append_captured(self, kept: LayerState, inputs: Inputs) -> None:
        if self.stateful and not kept.states:
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
                self._steps[index].append(state, key, value, position)

    def _end(self, kept: LayerState, inputs: Inputs) -> None:
        context = context_only(inputs, kept.seen)
        if self.needs_window:
            context = attrs.evolve(context, window_queries=self._window(kept))
        for index, state in kept.states.items():
            if state is not None:
                step_inputs = with_step(context, index, state, self._seed)
                self._steps[index].end_prefill(state, step_inputs)
        kept.ended = True

    @staticmethod
    def _window(kept: LayerState) -> Tensor:
        if kept.window is None:
            raise UnsupportedError(
                what="a dense prefill for a masker that needs the last queries of the context",
                reason="they are only kept where the pipeline runs; add 'prefill=sparse' to its "
                "options",
            )
        return kept.window


def cannot_reorder(step: Masker, state: Any) -> str:
    """Why what a masker keeps cannot follow sequences that change places; empty if it can."""
    if step.capabilities.shares_layers:
        return "what its layers hand each other in request_state cannot follow"
    if state is not None and not hasattr(state, "reorder"):
        return f"its state ({type(state).__name__}) has no method reorder(rows) to follow by"
    return ""


def copied(request_state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A request's state whose tensors, which maskers write in place, are copies."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in request_state.items()
    }
