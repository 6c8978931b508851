"""transformers' attention interface: registered, chosen in a model, called by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sah_core.compat.limits import as_allowed, limits
from sah_core.compat.models import attention_modules, text_config
from sah_core.errors import UnsupportedError

if TYPE_CHECKING:
    from sah_core.attention import Session

IMPLEMENTATION = "sah"
"""Name under which attention and mask function are registered, always both."""

SEMANTIC_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q")
"""Arguments of an attention call that change its meaning and that are not understood here."""


def register(attention: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Register the attention function together with the mask function `limits`.

    With an attention function alone, transformers would drop causality without a word.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, limits)


def attention_configs(model: Any) -> list[Any]:
    """The distinct configuration objects that choose attention and mask function of the language
    model; those of, say, a vision tower are not among them.
    """
    holders = [*attention_modules(model), model.get_decoder()]
    configs = [text_config(model), *(getattr(holder, "config", None) for holder in holders)]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def implementation_of(config: Any) -> str:
    """The attention implementation that a configuration names now."""
    return str(config._attn_implementation)


def makes_weights(model: Any) -> bool:
    """Whether the attention that a model has now returns its weights where it is asked for them."""
    return all(implementation_of(config) == "eager" for config in attention_configs(model))


def set_implementation(config: Any, name: str) -> None:
    """Name another implementation, for this configuration alone and without checks: of ours there
    is nothing to check, and any other it had before.
    """
    config._attn_implementation_internal = name


def keep_softcap(model: Any) -> None:
    """Take a model with capped logits off SDPA, which older transformers choose for Gemma 2 and
    which leaves the cap out without a word.
    """
    if getattr(text_config(model), "attn_logit_softcapping", None) is None:
        return
    for config in attention_configs(model):
        if implementation_of(config) == "sdpa":
            set_implementation(config, "eager")


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """The model's own attention, with capped logits where it asks for them (`keep_softcap`)."""
    before = [(config, implementation_of(config)) for config in attention_configs(model)]
    keep_softcap(model)
    try:
        yield
    finally:
        for config, name in before:
            set_implementation(config, name)


def call_arguments(kwargs: dict[str, Any]) -> tuple[float | None, Tensor | None]:
    """Softcap and learned sinks of an attention call.

    Raises:
        UnsupportedError: If the call carries an argument that changes its meaning and is not
            understood.
    """
    for name in SEMANTIC_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                what=f"attention argument {name!r}", reason="this kind of attention is not known"
            )
    return kwargs.get("softcap"), kwargs.get("s_aux")


def run_attention(
    session: Session,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Translate one call of the attention interface into one call of a session.

    Args:
        session: Whose pipeline runs.
        module: The attention module that calls.
        query: ``(batch, heads, query_len, head_dim)``.
        key: ``(batch, kv_heads, key_len, head_dim)``.
        value: ``(batch, kv_heads, key_len, value_dim)``.
        mask: What transformers passes as attention mask; see `as_allowed`.
        scaling: Factor on ``q . k``; the module's own, or ``head_dim ** -0.5``, when None.
        kwargs: Further arguments of the interface, such as a softcap or learned sinks.

    Returns:
        ``(batch, query_len, heads, value_dim)``, and the attention weights
        ``(batch, heads, query_len, key_len)`` if the pass is asked for them.

    Raises:
        UnsupportedError: If the module does not know its layer, or what it asks for is not known.
    """
    softcap, sinks = call_arguments(kwargs)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    allowed = as_allowed(mask, query.shape[2], key, causal=bool(causal))
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    known = None if session.length is not None else allowed.known_bounds
    if known is not None and known[1][0][-1] > key.shape[2]:
        raise UnsupportedError(
            what=f"a KV cache that gives {key.shape[2]} keys where its mask is for more",
            reason="which keys it has dropped is not known; use transformers' DynamicCache",
        )
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedError(
            what=f"attention of class {type(module).__name__}",
            reason="it does not know which layer it belongs to",
        )
    weights: list[Tensor] | None = [] if wants_weights(kwargs) else None
    output = session.attend(
        layer,
        query,
        key,
        value,
        allowed,
        float(scaling),
        softcap=softcap,
        sinks=sinks,
        weights=weights,
    )
    return output, weights[0] if weights else None


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass is to return attention weights, by the arguments of an attention call
    or by what transformers notes for the pass.
    """
    from transformers.utils import output_capturing

    if kwargs.get("output_attentions"):
        return True
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and "attentions" in (collector.get() or ())
