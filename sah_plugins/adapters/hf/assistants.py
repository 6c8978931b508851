"""Models that propose tokens to another one."""

from __future__ import annotations

from typing import Any

import attrs

from sah_core import compat
from sah_core.errors import RequestError

from .generation import Generation
from .loading import Loaded, load_model


def with_assistant(
    generation: Generation, model: Any, tokenizer: Any, known: dict[str, Loaded]
) -> Generation:
    """The generation with its assistant loaded, its tokenizers beside it where they differ.

    Args:
        generation: The options.
        model: The model that is assisted.
        tokenizer: Its tokenizer.
        known: Assistants loaded before, by name; one more may join them.

    Raises:
        ModelNotFoundError: If its name leads nowhere.
        RequestError: If it speaks another vocabulary and its tokenizer is not known.
    """
    assistant = generation.assistant
    if assistant is None or assistant.model is None:
        return generation
    if isinstance(assistant.model, str):
        name = assistant.model
        if name not in known:
            known[name] = load_model(name, device=compat.input_device(model), dtype=model.dtype)
        loaded = known[name]
        own = assistant.tokenizer or loaded.tokenizer
        assistant = attrs.evolve(assistant, model=loaded.model, tokenizer=own)
    if not compat.takes_tokens_back(assistant.model):
        raise RequestError(
            f"{type(assistant.model).__name__} cannot be an assistant_model: its linear layers "
            "cannot take rejected tokens back"
        )
    options = {**generation.options, "assistant_model": assistant.model}
    if compat.vocabulary_size(assistant.model) != compat.vocabulary_size(model):
        if assistant.tokenizer is None:
            raise RequestError(
                "the assistant_model has another vocabulary; give its assistant_tokenizer"
            )
        options["tokenizer"] = assistant.target_tokenizer or tokenizer
        options["assistant_tokenizer"] = assistant.tokenizer
    return attrs.evolve(generation, assistant=assistant, options=options)
