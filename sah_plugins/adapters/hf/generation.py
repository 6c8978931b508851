"""From what a caller wants of ``generate`` to what it gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import ParameterError, RequestError, compat
from sah_core.errors import nearest_names

DEFAULT_NEW_TOKENS = 64
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

ONE_SEQUENCE = "a question gets one answer"
OWN_CACHE = "the adapter keeps the cache"
REFUSED = {
    "num_return_sequences": ONE_SEQUENCE,
    "num_beams": "maskers keep the state of one sequence, not of several beams",
    "max_length": "the context counts into it; use max_new_tokens",
    "min_length": "the context counts into it; use min_new_tokens",
    "assistant_model": "maskers cannot take rejected tokens back",
    "prompt_lookup_num_tokens": "maskers cannot take rejected tokens back",
    "guidance_scale": "a second prompt would run through the state of the first",
    "generation_config": "give its settings one by one",
    "custom_generate": "the adapter follows transformers' own loop",
    "return_dict_in_generate": "responses carry text and tokens",
    "prefill_chunk_size": "it belongs into the request options",
    "cache_implementation": OWN_CACHE,
    "cache_config": OWN_CACHE,
    "use_cache": OWN_CACHE,
    "cache": OWN_CACHE,
    "past_key_values": OWN_CACHE,
    "inputs": "the request holds the prompt",
    "input_ids": "the request holds the prompt",
    "inputs_embeds": "the request holds the prompt",
    "attention_mask": "the request holds the prompt",
    "position_ids": "the request holds the prompt",
}
"""Options of ``generate`` that have no place here, and why."""
NEUTRAL = {"num_return_sequences": 1, "num_beams": 1, "guidance_scale": 1, "use_cache": True}
"""Values of refused options that change nothing, where that is not False or None."""


@attrs.define(eq=False)
class FirstToken:
    """A stopping criterion that stops nothing and notes when the first token was known.

    Attributes:
        elapsed: Seconds since the question began, the device's work done.
        seconds: What it said at the first token.
    """

    elapsed: Callable[[], float]
    seconds: float | None = None
    _never: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Called by ``generate`` after each token; no sequence stops here."""
        if self._never is None:
            self.seconds = self.elapsed()
            self._never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._never

    def added_to(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with this criterion behind the caller's own."""
        from transformers import StoppingCriteriaList

        given = options.get("stopping_criteria") or ()
        return {**options, "stopping_criteria": StoppingCriteriaList([*given, self])}


def generation_options(
    model: Any, tokenizer: Any, generation_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The caller's options with defaults filled in: greedy, every EOS that model or tokenizer
    declare.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        generation_kwargs: What the caller gave; not changed.

    Raises:
        RequestError: For an option that does not exist or has no place here.
        ParameterError: For a ``max_new_tokens`` that is no positive integer.
    """
    options = dict(generation_kwargs or {})
    for name in list(options):
        if name in REFUSED:
            value = options.pop(name)
            scalar = isinstance(value, bool | int | float)
            if value is not None and not (scalar and value == NEUTRAL.get(name, False)):
                raise RequestError(f"generation option {name!r} is not supported: {REFUSED[name]}")
        elif name not in known_options(type(model).generate):
            nearest = nearest_names(name, known_options(type(model).generate))
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise RequestError(f"generation option {name!r} is not known{hint}")
    room = options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    if isinstance(room, bool) or not isinstance(room, int) or room < 1:
        raise ParameterError("generation", "max_new_tokens", room, "an integer >= 1")
    if not options.setdefault("do_sample", False):
        for name in SAMPLING:
            options.setdefault(name, None)
    eos = options.get("eos_token_id")
    if eos is None:
        eos = eos_token_ids(model, tokenizer)
    options["eos_token_id"] = [eos] if isinstance(eos, int) else list(eos) or None
    if options.get("pad_token_id") is None:
        pad = tokenizer.pad_token_id
        options["pad_token_id"] = (
            next(iter(options["eos_token_id"] or (0,))) if pad is None else pad
        )
    if options.get("stop_strings"):
        options.setdefault("tokenizer", tokenizer)
    return options


@cache
def known_options(generate: Any) -> frozenset[str]:
    """The names that ``generate`` takes: its own arguments and those of a generation config."""
    from transformers import GenerationConfig

    arguments = set(inspect.signature(generate).parameters) - {"self", "kwargs"}
    return frozenset(arguments | set(vars(GenerationConfig())) | {"tokenizer"})


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every end-of-sequence token that generation config, model config or tokenizer declare."""
    found: list[int] = []
    sources = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(compat.text_config(model), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    for source in sources:
        for token in source if isinstance(source, list | tuple) else [source]:
            if token is not None and int(token) not in found:
                found.append(int(token))
    return found
