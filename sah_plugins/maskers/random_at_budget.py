"""Random at budget: as many random keys as another pipeline selects, the control for its choice.

A control: what a method gains over this one, it gains by which keys it chooses and not by how many.
Differs from no paper: it is a definition.

The named pipeline runs beside, with its own state and random numbers, exactly as it would alone;
per sequence, query head and query row its selected keys are counted, and that many are drawn
uniformly, without replacement, from the allowed keys that are not selected yet. By default each has
probability 1, as a deterministic choice of that size would; ``weighted`` makes it the unbiased
sampler with ``p = count / left``.

Costs what the named pipeline costs, and a random number per key and query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from sah_core import Capabilities, Inputs, Mask, Masker, Pipeline, PipelineError, hookimpl, param
from sah_core.attention import build_mask, cannot_reorder, with_step
from sah_core.selection import join_rows, residual_count, row_pieces, sample
from sah_core.state import LayerInfo

BYTES_PER_KEY = 32
"""Of one query row and head: a float32 number and the 64-bit words that it is mixed from."""

DRAW = 1000
"""Keeps these random numbers apart from those of a sampler in the named pipeline."""


class StepStates:
    """The states of the named pipeline's steps in one layer, as they are if some of them cannot
    follow sequences that change places.

    Attributes:
        steps: State per step for the steps that keep one.
    """

    def __init__(self, steps: dict[int, Any]) -> None:
        self.steps = steps

    def reserve(self, keys: int) -> None:
        """Make room in every state that can."""
        for state in self.steps.values():
            if hasattr(state, "reserve"):
                state.reserve(keys)

    def snapshot(self) -> dict[int, Any]:
        """A snapshot per step."""
        return {index: state.snapshot() for index, state in self.steps.items()}

    def restore(self, token: dict[int, Any]) -> None:
        """Go back, every step to its snapshot."""
        for index, state in self.steps.items():
            state.restore(token[index])


class Reorderable(StepStates):
    """The states of steps all of which can follow."""

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences of every step in another order."""
        for state in self.steps.values():
            state.reorder(rows)


@attrs.frozen(kw_only=True)
class RandomAtBudget(Masker):
    """Select as many random keys as ``pipeline`` selects in the same place."""

    name: ClassVar[str] = "random-at-budget"
    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True)

    pipeline: str = param(type=str, help="Text of the pipeline whose keys are counted, quoted.")
    weighted: bool = param(
        False, help="Give each key its inclusion probability instead of 1: an unbiased estimate."
    )

    def __attrs_post_init__(self) -> None:
        steps_of(self.pipeline)

    @classmethod
    def example(cls, folder: Any) -> Self:
        """The control of a small top-k behind a sink."""
        return cls(pipeline="sink(4) | value-aware-top-k(8)")

    def artifacts(self) -> Mapping[str, Path]:
        """The files of the named pipeline's steps."""
        return {
            f"{index}.{name}": path
            for index, step in enumerate(steps_of(self.pipeline))
            for name, path in step.artifacts().items()
        }

    def check_artifacts(self) -> None:
        """Every step of the named pipeline checks its own."""
        for step in steps_of(self.pipeline):
            step.check_artifacts()

    def init_state(self, layer: LayerInfo) -> StepStates | None:
        """The states of the named pipeline, or None if it keeps none."""
        steps, states = steps_of(self.pipeline), {}
        for index, step in enumerate(steps):
            own = attrs.evolve(layer, random=attrs.evolve(layer.random, step=index))
            states[index] = step.init_state(own)
        kept = {index: state for index, state in states.items() if state is not None}
        if any(cannot_reorder(step, states[index]) for index, step in enumerate(steps)):
            return StepStates(kept)
        return Reorderable(kept) if kept else None

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Show every state the new keys."""
        steps = steps_of(self.pipeline)
        for index, own in state.steps.items():
            steps[index].append(own, key, value, start)

    def end_prefill(self, state: Any, inputs: Inputs) -> None:
        """Tell every state that the context is complete."""
        steps, seed = steps_of(self.pipeline), inputs.random.seed
        for index, own in state.steps.items():
            steps[index].end_prefill(own, with_step(inputs, index, own, seed))

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add as many random keys as the named pipeline selects, as far as there are so many."""
        if previous.is_full:
            return previous
        states = inputs.state.steps if inputs.state is not None else {}
        model = build_mask(steps_of(self.pipeline), inputs, states, inputs.random.seed)
        capacity = room(model)
        if model.is_full or not capacity:
            return model if model.is_full else previous
        left = residual_count(inputs, previous).expand(inputs.shape[:3])
        count = torch.minimum(model.counts(inputs.allowed)[0], left).to(torch.int32)
        found, begin = [], 0
        for part, taken in row_pieces(inputs, previous, BYTES_PER_KEY):
            end = begin + part.query_len
            found.append(sample(part, taken, count[:, :, begin:end], capacity, draw=DRAW))
            begin = end
        indices = join_rows(found)
        probability = None
        if self.weighted:
            chance = count / left.clamp(min=1)
            probability = chance.unsqueeze(-1).expand(indices.shape).contiguous()
        mask = Mask.from_indices(inputs.shape, indices, probability=probability)
        return previous.union(mask, disjoint=True)

    def bytes_read(self, inputs: Inputs) -> int:
        """What the steps of the named pipeline read."""
        states = inputs.state.steps if inputs.state is not None else {}
        seed = inputs.random.seed
        return sum(
            step.bytes_read(with_step(inputs, index, states.get(index), seed))
            for index, step in enumerate(steps_of(self.pipeline))
        )


@lru_cache(maxsize=64)
def steps_of(text: str) -> tuple[Masker, ...]:
    """The steps of a pipeline that can be counted.

    Raises:
        PipelineError: For ``dense``, options, and steps that need what only the outer pipeline has.
    """
    parsed = Pipeline.parse(text)
    if parsed.is_dense:
        raise PipelineError("random-at-budget: 'dense' selects no keys to count; name maskers")
    if parsed != Pipeline.of(*parsed.steps):
        raise PipelineError(
            f"random-at-budget: the options after '@' in {text!r} belong after the whole pipeline"
        )
    for step in parsed.steps:
        if step.capabilities.needs:
            needs = ", ".join(sorted(step.capabilities.needs))
            raise PipelineError(
                f"random-at-budget: {step.name} cannot be counted: it needs {needs}"
            )
        if type(step).after_attention is not Masker.after_attention:
            raise PipelineError(
                f"random-at-budget: {step.name} cannot be counted: it learns from the attention of "
                "its own choice"
            )
    return parsed.steps


def room(mask: Mask) -> int:
    """A host bound on the keys of a row."""
    if mask.dense is not None:
        return mask.shape[3]
    count = sum(part.capacity for part in mask.ranges)
    if mask.selected is not None:
        count += mask.selected.capacity * mask.selected.page_size
    return min(count, mask.shape[3])


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return RandomAtBudget
