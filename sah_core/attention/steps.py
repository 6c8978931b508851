"""The maskers of a pipeline, one after the other, on one attention call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from sah_core.inputs import Inputs, Phase
from sah_core.mask import Mask
from sah_core.masker import Masker
from sah_core.randomness import Random
from sah_core.state import LayerInfo


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
    return inputs.for_step(state, Random(seed=seed, step=step, layer=inputs.layer))


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


def as_alone(inputs: Inputs, begin: int, end: int, phase: Phase) -> Inputs:
    """The rows of a call from ``begin`` to ``end`` (exclusive) as a call of their own, which later
    keys have not reached yet.

    Of a layer with a window, keys that have left that of the first of the rows have left the call.
    """
    if (begin, end) == (0, inputs.query_len):
        return attrs.evolve(inputs, phase=phase)
    stop, start = inputs.capacity - inputs.query_len + end, 0
    if inputs.layer_type != "full_attention" and inputs.allowed.keep is None:
        start = min(row[begin if len(row) > 1 else 0] for row in inputs.allowed.bounds[0])
    memo, place = inputs.allowed.memo, ("alone", begin, end)
    if place not in memo:  # every layer that shares the limits asks
        allowed = inputs.allowed.rows(begin, end)
        if allowed.keep is not None:
            allowed = attrs.evolve(allowed, keep=allowed.keep[..., :stop])
        if start:
            allowed = attrs.evolve(
                allowed,
                start=allowed.start - start,
                stop=allowed.stop - start,
                first=(allowed.first - start).clamp(min=0),
                known_first=None,
                known_bounds=None,
            )
        memo[place] = allowed
    return attrs.evolve(
        inputs,
        query=inputs.query[:, :, begin:end],
        key=inputs.key[:, :, start:stop],
        value=inputs.value[:, :, start:stop],
        allowed=memo[place],
        key_len=stop - start,
        length=None,
        query_position=None,
        phase=phase,
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
        mask = add_step(masker, with_step(inputs, index, state, seed), mask)
    return mask


def add_step(masker: Masker, inputs: Inputs, previous: Mask) -> Mask:
    """Run one masker, which may be anybody's.

    Raises:
        TypeError: It returns no mask.
        ValueError: It returns a mask of another shape.
    """
    mask = masker.add_mask(inputs, previous)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"{masker.name}: add_mask returned {type(mask).__name__}, no Mask; return previous "
            "united with what is selected"
        )
    if mask.shape != inputs.shape:
        raise ValueError(
            f"{masker.name}: add_mask returned a mask of shape {mask.shape}, not {inputs.shape}; "
            "build it with inputs.shape"
        )
    return mask


def leading_position_only(steps: Sequence[Masker]) -> int:
    """How many steps at the start of the pipeline depend on positions alone."""
    count = 0
    for step in steps:
        if not step.capabilities.position_only or step.is_stateful():
            break
        count += 1
    return count


def buffer_length(key: Tensor) -> int:
    """Keys that fit into the buffer that ``key`` is the filled part of."""
    steps = key.stride()
    if steps[3] == 1 and steps[2] == key.shape[3] and steps[1] % steps[2] == 0:
        return max(key.shape[2], steps[1] // steps[2])
    return key.shape[2]
