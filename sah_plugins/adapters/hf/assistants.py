"""Models that propose tokens to another one."""

from __future__ import annotations

from typing import Any

import attrs

from sah_core import compat
from sah_core.errors import RequestError

from .generation import Assistant, Generation
from .loading import load_drafter, load_model

BLOCK_SETTINGS = ("target_layer_ids", "block_size", "mask_token_id")
"""What the configuration of an assistant that drafts blocks says."""
SHARES_KEYS = ("Gemma4Assistant", "Gemma4UnifiedAssistant")
"""Classes of assistants that attend to the keys of the model, as transformers knows them."""
SHARED_BY = ("Gemma4", "Gemma3n")
"""Classes of models that hand out their keys."""


def with_assistant(
    generation: Generation, model: Any, tokenizer: Any, known: dict[str, tuple[Any, Any]]
) -> Generation:
    """The generation with its assistant loaded, its tokenizers beside it where they differ.

    Args:
        generation: The options.
        model: The model that is assisted.
        tokenizer: Its tokenizer.
        known: Assistants loaded before, with their tokenizers, by name; one more may join them.

    Raises:
        ModelNotFoundError: If its name leads nowhere.
        RequestError: If it cannot assist the model, or speaks another vocabulary and its tokenizer
            is not known.
    """
    assistant = generation.assistant
    if assistant is None or assistant.model is None:
        return generation
    if isinstance(assistant.model, str):
        assistant = loaded(assistant, model, known, blocks=generation.drafts_blocks)
    if not compat.takes_tokens_back(assistant.model):
        raise RequestError(
            f"{type(assistant.model).__name__} cannot be an assistant_model: its linear layers "
            "cannot take rejected tokens back"
        )
    options = {**generation.options, "assistant_model": assistant.model}
    if generation.drafts_blocks:
        refuse_as_block_drafter(assistant.model, model)
    elif all(hasattr(assistant.model.config, name) for name in BLOCK_SETTINGS):
        raise RequestError(
            f"{type(assistant.model).__name__} drafts blocks; give speculation_type='dflash'"
        )
    elif type(assistant.model).__name__.startswith(SHARES_KEYS):
        refuse_as_key_sharer(assistant, model)
    elif compat.vocabulary_size(assistant.model) != compat.vocabulary_size(model):
        if assistant.tokenizer is None:
            raise RequestError(
                "the assistant_model has another vocabulary; give its assistant_tokenizer"
            )
        options["tokenizer"] = assistant.target_tokenizer or tokenizer
        options["assistant_tokenizer"] = assistant.tokenizer
    return attrs.evolve(generation, assistant=assistant, options=options)


def loaded(
    assistant: Assistant, model: Any, known: dict[str, tuple[Any, Any]], *, blocks: bool
) -> Assistant:
    """An assistant that is named, loaded beside the model that it assists."""
    name, device = str(assistant.model), compat.input_device(model)
    if name not in known and blocks:
        known[name] = load_drafter(name, device=device, dtype=model.dtype), None
    elif name not in known:
        made = load_model(name, device=device, dtype=model.dtype)
        known[name] = made.model, made.tokenizer
    found, tokenizer = known[name]
    return attrs.evolve(assistant, model=found, tokenizer=assistant.tokenizer or tokenizer)


def refuse_as_block_drafter(drafter: Any, model: Any) -> None:
    """Refuse an assistant that cannot draft blocks from the hidden states of a model.

    Raises:
        RequestError: With what does not fit.
    """
    config, target = drafter.config, compat.text_config(model)
    missing = [name for name in BLOCK_SETTINGS if getattr(config, name, None) is None]
    reason = None
    if missing:
        reason = f"its configuration has no {missing[0]}"
    elif config.hidden_size != target.hidden_size:
        reason = (
            f"its hidden states have {config.hidden_size} numbers, those of "
            f"{type(model).__name__} {target.hidden_size}"
        )
    elif max(config.target_layer_ids) >= target.num_hidden_layers:
        reason = (
            f"it reads layer {max(config.target_layer_ids)}, and {type(model).__name__} has "
            f"{target.num_hidden_layers} layers"
        )
    elif config.mask_token_id >= compat.vocabulary_size(model):
        reason = (
            f"its mask token {config.mask_token_id} is none of the {compat.vocabulary_size(model)} "
            f"tokens of {type(model).__name__}"
        )
    if reason is not None:
        raise RequestError(
            f"{type(drafter).__name__} cannot be an assistant_model with "
            f"speculation_type='dflash': {reason}"
        )


def refuse_as_key_sharer(assistant: Assistant, model: Any) -> None:
    """Refuse an assistant that attends to the keys of a model where it cannot.

    Raises:
        RequestError: With what does not fit.
    """
    drafter, name = assistant.model, type(model).__name__
    states, words = compat.text_config(model).hidden_size, compat.vocabulary_size(model)
    count = {**drafter.generation_config.to_dict(), **assistant.settings}
    reason = None
    if not name.startswith(SHARED_BY):
        reason = f"it attends to the keys of Gemma 4, which {name} is not"
    elif drafter.config.backbone_hidden_size != states:
        reason = (
            f"it is made for hidden states of {drafter.config.backbone_hidden_size} numbers, and "
            f"those of {name} have {states}"
        )
    elif compat.vocabulary_size(drafter) != words:
        reason = f"it has a vocabulary of {compat.vocabulary_size(drafter)}, not of {words}"
    elif count.get("num_assistant_tokens") is None:
        reason = "it does not say how many tokens it drafts; give num_assistant_tokens"
    if reason is not None:
        raise RequestError(f"{type(drafter).__name__} cannot be the assistant_model: {reason}")
