"""Ways to generate that a pipeline or a model cannot follow."""

from __future__ import annotations

from typing import Any

from sah_core import Pipeline, RequestError, compat
from sah_core.probing import refuses_order

from .generation import Generation


def refuse(pipeline: Pipeline, generation: Generation, model: Any, batch: int) -> None:
    """Refuse ways to generate in which the states of a pipeline's maskers could not follow, or that
    transformers has for a single sequence only.

    Raises:
        RequestError: With the option and what stands in its way.
        SahError: With several beams, if the pipeline does not fit the model.
    """
    refused = refuses_order(model, pipeline) if generation.beams > 1 else None
    if refused is not None:
        name, reason = refused
        raise RequestError(
            f"generation option 'num_beams' is not supported with masker {name!r}: {reason}; use "
            "num_beams=1"
        )
    custom = generation.loop
    for step in pipeline.steps:
        name, shares = step.name, step.capabilities.shares_layers
        if custom and (step.is_stateful() or shares):
            raise RequestError(
                f"generation option {custom!r} is not supported with masker {name!r}: its "
                "state cannot follow a loop that may reorder sequences or take tokens back"
            )
        if generation.assisted and shares:
            raise RequestError(
                f"assisted generation is not supported with masker {name!r}: what its layers hand "
                "each other belongs to one token, and several are verified at once"
            )
    if generation.assisted and batch > 1:
        raise RequestError(
            f"assisted generation takes one context at a time, not {batch}; use batch_size=1"
        )
    if generation.assisted and not compat.takes_tokens_back(model):
        raise RequestError(
            f"assisted generation is not supported with {type(model).__name__}: its linear layers "
            "cannot take rejected tokens back"
        )
