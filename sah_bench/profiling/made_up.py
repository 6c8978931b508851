"""A model, and a context of random keys and values in its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from sah_core import Request, compat, registry
from sah_core.attention import Session
from sah_core.errors import ContextTooLongError, UnsupportedError

from .shapes import DTYPES

if TYPE_CHECKING:
    from .decode import DecodePlan

ROOM = 320
"""Tokens of cache beyond the steps: a cache that had to grow would be copied as a whole."""

MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    }
}
"""Arguments of transformers' ``LlamaConfig``."""


@attrs.frozen
class RandomWeights:
    """A model of random weights, as an adapter takes a loaded one."""

    model: Any
    tokenizer: None = None
    source: None = None
    weights_hash: str = "random"


@attrs.frozen
class Piece:
    """The tokens of a made-up prompt: the context and one more."""

    ids: tuple[int, ...]
    context_tokens: int


@attrs.frozen
class MadeUpRow:
    """One sequence of a made-up context."""

    prompts: list[Piece]
    shared: int
    padding: int = 0


@attrs.define(eq=False)
class MadeUpContext:
    """A cache of random keys and values, with the attributes of a context that an adapter read.

    How long attention takes depends on their number, not on what they say.
    """

    request: Request
    prompts: list[Piece]
    shared: int
    cache: Any
    base: list[Any]
    seconds: float = 0.0
    session: Session | None = None
    states: dict[str, Any] = attrs.field(factory=dict)
    batch: int = 1

    @property
    def rows(self) -> tuple[MadeUpRow, ...]:
        """The sequences, which all say the same."""
        return (MadeUpRow(self.prompts, self.shared),) * self.batch

    @property
    def padding(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def width(self) -> int:
        """Positions in the cache."""
        return self.shared

    @property
    def context_tokens(self) -> int:
        """Cached tokens."""
        return self.shared


def load(plan: DecodePlan) -> Any:
    """The adapter around the model.

    Raises:
        ContextTooLongError: If the context does not fit into the model.
        UnsupportedError: If the adapter takes no random weights.
    """
    adapter_class = registry.adapters["hf"]
    if plan.shape is None:
        adapter = adapter_class(plan.model, device=str(plan.device), dtype=plan.dtype)
        needed, limit = plan.context + plan.new_tokens + 2, adapter.max_context
        if limit is not None and needed > limit:
            raise ContextTooLongError(needed, limit, f"model {plan.model!r}")
        return adapter
    make = getattr(adapter_class, "of", None)
    if make is None:
        raise UnsupportedError("--model-shape", "the adapter takes no model of random weights")
    return make(RandomWeights(random_model(plan, plan.shape)))


def random_model(plan: DecodePlan, shape: str) -> Any:
    """A Llama of the shape, its weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    facts = dict(MODEL_SHAPES[shape])
    facts["num_hidden_layers"] = plan.layers or facts["num_hidden_layers"]
    config = LlamaConfig(**facts, max_position_embeddings=plan.context + plan.new_tokens + ROOM)
    torch.manual_seed(0)
    with plan.device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[plan.dtype]).eval()


def make_context(adapter: Any, plan: DecodePlan) -> MadeUpContext:
    """Fill a cache with random numbers."""
    model = adapter.model
    config = compat.text_config(model)
    kv_cache = compat.make_cache(model, plan.context + plan.new_tokens + ROOM)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, kind in enumerate(compat.layer_types(model)):
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"profiling layer {index} ({kind})", "it caches no keys")
        shape = (plan.batch, heads, plan.context, head_dim)
        make: dict[str, Any] = {"device": plan.device, "dtype": model.dtype}
        kv_cache.update(torch.randn(shape, **make), torch.randn(shape, **make), index)
    base = compat.snapshot_cache(kv_cache)
    ids = tuple(torch.randint(config.vocab_size, (plan.context + 1,)).tolist())
    request = Request(context="", questions="?")
    prompts = [Piece(ids, plan.context)]
    return MadeUpContext(request, prompts, plan.context, kv_cache, base, batch=plan.batch)


def weights_read(model: Any) -> int:
    """Bytes of the weights that a step reads: all but the rows of the input embedding."""
    total = sum(int(p.numel() * p.element_size()) for p in model.parameters())
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs
    return total if tied else total - int(inputs.numel() * inputs.element_size())
