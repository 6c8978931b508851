"""What a model is made of, and whether its attention can be replaced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from sah_core.errors import UnsupportedError

ATTENTION_BESIDE = {
    "attention": "full_attention",
    "hybrid": "full_attention",
    "hybrid_sliding": "sliding_attention",
}
"""Layer types of transformers that attend like another one: layers in which attention stands beside
something else, and an older name.
"""


def text_config(model: Any) -> Any:
    """The configuration of the language model inside a model."""
    getter = getattr(model.config, "get_text_config", None)
    return model.config if getter is None else getter(decoder=True)


def layer_types(model: Any) -> tuple[str, ...]:
    """Attention type of every layer: ``full_attention``, ``sliding_attention``,
    ``linear_attention``, ...
    """
    config = text_config(model)
    types = getattr(config, "layer_types", None)
    if types:
        return tuple(ATTENTION_BESIDE.get(kind, kind) for kind in types)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return ("sliding_attention",) * int(config.num_hidden_layers)
    return ("full_attention",) * int(config.num_hidden_layers)


def attention_modules(model: Any) -> list[Any]:
    """The modules whose attention calls reach the interface: those that know their layer."""
    return [
        module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)
    ]


def devices_of(model: Any) -> tuple[torch.device, ...]:
    """The devices that hold parts of a model; those of weights that are elsewhere between two
    passes are told by whoever brings them (accelerate's hooks).
    """
    found = {p.device: None for p in model.parameters() if p.device.type != "meta"}
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            found[torch.device(device)] = None
    return tuple(found)


def input_device(model: Any) -> torch.device:
    """Where the input of a model goes: to its embeddings."""
    embeddings = model.get_input_embeddings()
    device = torch.device(embeddings.weight.device)
    if device.type != "meta":
        return device
    placed = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if placed is None else placed)


def vocabulary_size(model: Any) -> int:
    """Tokens that a model tells apart."""
    return int(text_config(model).vocab_size)


def takes_tokens_back(model: Any) -> bool:
    """Whether the cache of a model can drop the last tokens again: linear layers have mixed them
    into what they keep.
    """
    return not getattr(model, "_is_stateful", False) and not any(
        "linear" in kind or kind in ("mamba", "conv") for kind in layer_types(model)
    )


def caches_latents(model: Any) -> bool:
    """Whether what a model caches is not what its attention sees (multi-head latent attention, in
    newer transformers).
    """
    return getattr(text_config(model), "kv_lora_rank", None) is not None


def check_is_model(model: Any) -> None:
    """Refuse what is no language model of transformers.

    Raises:
        UnsupportedError: With its class.
    """
    if not all(hasattr(model, name) for name in ("config", "get_decoder", "generate")):
        raise UnsupportedError(
            what=f"an object of class {type(model).__name__} as a model",
            reason="it is no causal language model of transformers",
        )


def check_supported(model: Any) -> None:
    """Refuse models whose attention does not go through the attention interface, or is not the
    attention of one text to itself.

    Raises:
        UnsupportedError: With the class of the model.
    """
    check_is_model(model)
    config, reason = text_config(model), None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "it has an encoder; only decoders that read their own text are known"
    elif getattr(config, "add_cross_attention", False) or getattr(
        config, "cross_attention_layers", None
    ):
        reason = "it attends to something else than its own text"
    elif not follows_interface(model.__class__):
        reason = "its attention does not go through transformers' attention interface"
    if reason is not None:
        raise UnsupportedError(what=f"model class {type(model).__name__}", reason=reason)


@cache
def follows_interface(model_class: Hashable) -> bool:
    """Whether a model class declares the attention interface, or says nothing and its source uses
    it, as that of models with linear layers does.
    """
    from transformers import PreTrainedModel

    switchable = getattr(model_class, "_can_set_attn_implementation", None)
    if switchable is not None and not switchable():
        return False
    for base in getattr(model_class, "__mro__", ()):
        if base is PreTrainedModel:
            break
        if "_supports_attention_backend" in vars(base):
            return bool(base._supports_attention_backend)
    module = sys.modules.get(getattr(model_class, "__module__", ""))
    try:
        return module is not None and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module)
    except (OSError, TypeError):
        return False


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """Name under which ``forward`` takes the cache: ``cache`` in newer transformers, else
    ``past_key_values``.
    """
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@contextmanager
def hooked(
    model: Any, before: Callable[..., Any], after: Callable[..., Any], *, always: bool = False
) -> Iterator[None]:
    """Look at every forward pass of a model.

    Args:
        model: The model.
        before: Called as ``before(model, arguments, named)``; may return other arguments.
        after: Called as ``after(model, arguments, named, output)``; may return another output.
        always: Call it for a pass that failed too, with None as its output.
    """
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True, always_call=always),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
