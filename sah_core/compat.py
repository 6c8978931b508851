"""The one place that knows transformers' attention interface and cache internals.

Nothing of transformers is imported before a function here is called.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.errors import UnsupportedError

if TYPE_CHECKING:
    from sah_core.attention import Session

IMPLEMENTATION = "sah"
"""Name under which attention and mask function are registered, always both."""

SEMANTIC_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q")
"""Arguments of an attention call that change its meaning and that are not understood here."""


def register(attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Register the attention function together with the mask function `limits`.

    With an attention function alone, transformers would drop causality without a word.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, limits)


def limits(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Allowed:
    """transformers' mask function, giving structure instead of a tensor where the mask is an
    interval per row.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    running = running_capture()
    if running is not None:
        return running.limits()
    if kv_length + int(kv_offset) > int(q_offset) + q_length and attends_behind(mask_function):
        raise UnsupportedError(
            what="a KV cache of fixed length",
            reason="its unused slots would count as keys; use transformers' DynamicCache",
        )
    window = None
    structured = mask_function is None or mask_function is causal_mask_function
    if not structured and local_size is not None and not use_vmap and mask_function is not None:
        structured = is_sliding_window(mask_function, local_size, device)
        window = local_size
    if not structured:
        dense = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
            **others,
        )
        if dense is None:  # nothing is hidden from anything
            return Allowed.everything(kv_length, device=device)
        return attrs.evolve(Allowed.from_dense(dense), window=local_size)
    offset = int(q_offset) - int(kv_offset)
    known = _paddings[-1] if _paddings else ()
    if known and attention_mask is not None:
        each = batch_size // len(known)
        padding = [max(0, p - int(kv_offset)) for p in known for _ in range(each)]
        return causal_limits(q_length, kv_length, device, padding, window=window, offset=offset)
    first, keep = padding_structure(attention_mask, kv_length, kv_offset)
    allowed = Allowed.causal(
        q_length, kv_length, device=device, first=first, window=window, offset=offset
    )
    if keep is None:
        return allowed
    return Allowed(allowed.start, allowed.stop, allowed.first, keep, window=window)


def padding_structure(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """First real key per sequence, and the mask itself if it is more than left padding; both None
    without any.
    """
    if attention_mask is None:
        return None, None
    real = attention_mask.to(torch.bool)
    missing = kv_length + int(kv_offset) - real.shape[-1]
    if missing > 0:
        real = torch.nn.functional.pad(real, (0, missing))
    real = real[:, int(kv_offset) : int(kv_offset) + kv_length]
    if bool(real.all()):
        return None, None
    first = real.to(torch.uint8).argmax(-1).to(torch.int32)
    first = torch.where(real.any(-1), first, kv_length)
    position = torch.arange(kv_length, device=real.device)
    if bool((real == (position >= first.unsqueeze(-1))).all()):
        return first, None
    return first, real[:, None, None, :]


def attends_behind(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a mask function stops at the query: keys behind it are then no keys yet."""
    if mask_function is None:
        return True
    index = [torch.tensor(i) for i in (0, 0, 0, 1)]
    return not bool(mask_function(*index))


_paddings: list[tuple[int, ...]] = []


@contextmanager
def left_padding(padding: Sequence[int]) -> Iterator[None]:
    """Say how many leading positions of every row are padding, for the passes inside.

    The mask of a chunk in the middle of the padding would not tell, and reading any mask waits for
    the device.
    """
    _paddings.append(tuple(padding) if any(padding) else ())
    try:
        yield
    finally:
        _paddings.pop()


def padding_mask(padding: Sequence[int], batch: int, length: int, device: torch.device) -> Tensor:
    """transformers' two-dimensional attention mask, int64 ``(batch, length)``."""
    real = torch.ones(batch, length, dtype=torch.long, device=device)
    for row, count in enumerate(padding):
        real[row, :count] = 0
    return real


def causal_limits(
    query_len: int,
    key_len: int,
    device: torch.device | str,
    padding: Sequence[int] = (),
    *,
    window: int | None = None,
    offset: int | None = None,
) -> Allowed:
    """Causal limits behind left padding that the host knows."""
    if not any(padding):
        return Allowed.causal(query_len, key_len, device=device, window=window, offset=offset)
    first = torch.tensor(padding, dtype=torch.int32, device=device)
    allowed = Allowed.causal(
        query_len, key_len, device=device, first=first, window=window, offset=offset
    )
    return Allowed(allowed.start, allowed.stop, first, known_first=tuple(padding), window=window)


def is_sliding_window(
    mask_function: Callable[..., Any], size: int, device: torch.device | str
) -> bool:
    """Whether a mask function of a local layer is a causal sliding window (not, say, chunked)."""

    def ask(query: int, key: int) -> bool:
        index = [torch.tensor(i, device=device) for i in (0, 0, query, key)]
        return bool(mask_function(*index))

    if size < 2:
        return False
    inside = (
        ask(size, size) and ask(size, 1) and ask(2 * size - 1, size) and ask(2 * size, size + 1)
    )
    return inside and not ask(size, 0) and not ask(2 * size, size) and not ask(1, 2)


def as_allowed(mask: Any, query_len: int, key: Tensor, *, causal: bool = True) -> Allowed:
    """What an attention function got as its mask, as limits.

    Args:
        mask: Limits, a 4-D mask (bool or additive), or None.
        query_len: Query rows.
        key: The keys.
        causal: What None means: causal attention, or attention to everything.
    """
    if isinstance(mask, Allowed):
        return mask
    key_len = key.shape[2]
    if mask is None:
        if not causal:
            return Allowed.everything(key_len, device=key.device)
        return Allowed.causal(query_len, key_len, device=key.device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = mask[..., :key_len]
        keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return Allowed.from_dense(keep)
    raise UnsupportedError(
        what=f"an attention mask of type {type(mask).__name__}", reason="not known"
    )


# Models


def text_config(model: Any) -> Any:
    """The configuration of the language model inside a model."""
    getter = getattr(model.config, "get_text_config", None)
    return model.config if getter is None else getter(decoder=True)


ATTENTION_BESIDE = {
    "attention": "full_attention",
    "hybrid": "full_attention",
    "hybrid_sliding": "sliding_attention",
}
"""Layer types of transformers that attend like another one: layers in which attention stands beside
something else, and an older name.
"""


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


def caches_latents(model: Any) -> bool:
    """Whether what a model caches is not what its attention sees (multi-head latent attention, in
    newer transformers).
    """
    return getattr(text_config(model), "kv_lora_rank", None) is not None


def check_supported(model: Any) -> None:
    """Refuse models whose attention does not go through the attention interface, or is not the
    attention of one text to itself.

    Raises:
        UnsupportedError: With the class of the model.
    """
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


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """Name under which ``forward`` takes the cache: ``cache`` in newer transformers, else
    ``past_key_values``.
    """
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


# The KV cache


@cache
def _preallocated_layer() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
        """A cache layer that writes into a buffer taken ahead; its keys and values are views of the
        filled part.

        Appending copies the new tokens and nothing else, a snapshot is a length. One live branch at
        a time.
        """

        def __init__(self, capacity: int) -> None:
            super().__init__()
            self.capacity = capacity
            self.length = 0
            self.key_buffer: Tensor | None = None
            self.value_buffer: Tensor | None = None
            self.position: Tensor | None = None

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Write the new tokens behind the cached ones; returns all of them."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if self.position is not None:
                assert self.key_buffer is not None
                assert self.value_buffer is not None
                self.key_buffer.index_copy_(2, self.position, key_states)
                self.value_buffer.index_copy_(2, self.position, value_states)
                return self.key_buffer, self.value_buffer
            end = self.length + key_states.shape[2]
            self.key_buffer = self._room(self.key_buffer, key_states, end)
            self.value_buffer = self._room(self.value_buffer, value_states, end)
            self.key_buffer[:, :, self.length : end] = key_states
            self.value_buffer[:, :, self.length : end] = value_states
            self.set_length(end)
            return self.keys, self.values

        def _room(self, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
            if buffer is not None and end <= buffer.shape[2]:
                return buffer
            room = self.capacity if buffer is None else 2 * buffer.shape[2]
            shape = (like.shape[0], like.shape[1], max(end, room), like.shape[3])
            # zeros, because what is masked out is still multiplied: 0 * garbage may be NaN
            fresh = like.new_zeros(shape)
            if buffer is not None:
                fresh[:, :, : self.length] = buffer[:, :, : self.length]
            return fresh

        def reserve(self, tokens: int) -> None:
            """Make room for so many tokens at once."""
            if self.key_buffer is None or self.value_buffer is None:
                self.capacity = max(self.capacity, tokens)
            elif tokens > self.key_buffer.shape[2]:
                self.key_buffer = self._room(self.key_buffer, self.key_buffer, tokens)
                self.value_buffer = self._room(self.value_buffer, self.value_buffer, tokens)
                self.set_length(self.length)

        def set_length(self, length: int) -> None:
            """Keep the first ``length`` tokens."""
            self.length = length
            if self.key_buffer is not None and self.value_buffer is not None:
                self.keys = self.key_buffer[:, :, :length]
                self.values = self.value_buffer[:, :, :length]

        def get_seq_length(self) -> int:
            return self.length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self.position is not None:
                assert self.key_buffer is not None
                return self.key_buffer.shape[2], 0
            return self.length + query_length, 0

        def crop(self, tokens_to_remove: int) -> None:
            self.set_length(self.length - abs(tokens_to_remove))

        def reset(self) -> None:
            self.set_length(0)

        def _rewrite(self, keys: Tensor, values: Tensor) -> None:
            length, self.length = self.length, 0
            self.key_buffer = self.value_buffer = None
            self.capacity = max(self.capacity, length)
            self.update(keys, values)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.length:
                index = beam_idx.to(self.keys.device)
                self._rewrite(self.keys.index_select(0, index), self.values.index_select(0, index))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.length:
                self._rewrite(
                    self.keys.repeat_interleave(repeats, dim=0),
                    self.values.repeat_interleave(repeats, dim=0),
                )

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.length:
                self._rewrite(self.keys[indices, ...], self.values[indices, ...])

    return PreallocatedLayer


def make_cache(model: Any, capacity: int) -> Any:
    """A KV cache for a request: full-attention layers are preallocated, the others as the model
    needs them.

    Args:
        model: The model whose configuration says what the layers are.
        capacity: Tokens to take room for; the buffers grow by doubling beyond that.

    Raises:
        UnsupportedError: For a cache layer class that is not known here.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    made = DynamicCache(config=text_config(model))
    for index, layer in enumerate(made.layers):
        if type(layer) is DynamicLayer:
            made.layers[index] = _preallocated_layer()(capacity)
        elif kind_of(layer) is None:
            raise UnsupportedError(
                what=f"cache layer {type(layer).__name__} of {type(model).__name__}",
                reason="how to take it back to an earlier state is not known",
            )
    return made


def kind_of(layer: Any) -> str | None:
    """How a cache layer is snapshotted: by ``length``, by ``reference``, by ``copy``; None if
    unknown.
    """
    from transformers import cache_utils

    if isinstance(layer, _preallocated_layer()):
        return "length"
    if type(layer) in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer):
        return "reference"
    in_place = (
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
    return "copy" if type(layer).__name__ in in_place else None


def window_of(layer: Any) -> int | None:
    """Tokens that a cache layer keeps; None where it keeps them all."""
    window = getattr(layer, "sliding_window", None)
    return window if isinstance(window, int) else None


def repeated_cache(kv_cache: Any, repeats: int) -> Any:
    """A copy of a cache with every sequence ``repeats`` times, one copy next to the other."""
    made = copy.copy(kv_cache)
    made.layers = []
    for layer in kv_cache.layers:
        kind = kind_of(layer)
        made.layers.append(copy.deepcopy(layer) if kind == "copy" else copy.copy(layer))
    batch = next((t.shape[0] for t in _cache_tensors(made)), 1)
    made.reorder_cache(torch.arange(batch).repeat_interleave(repeats))
    return made


def _cache_tensors(kv_cache: Any) -> Iterator[Tensor]:
    for _, keys, _ in cached_tensors(kv_cache):
        yield keys
    for layer in kv_cache.layers:
        for value in vars(layer).values():
            held = value if isinstance(value, list) else [value]
            yield from (t for t in held if isinstance(t, Tensor) and t.dim() > 1)


def snapshot_cache(kv_cache: Any) -> list[Any]:
    """Remember the state of a cache: lengths, references or copies, whatever each layer needs."""
    tokens: list[Any] = []
    for layer in kv_cache.layers:
        kind = kind_of(layer)
        if kind == "length":
            tokens.append(layer.length)
        elif kind == "reference":
            tokens.append(copy.copy(layer))
        elif kind == "copy":
            tokens.append(copy.deepcopy(layer))
        else:
            raise UnsupportedError(
                what=f"cache layer {type(layer).__name__}",
                reason="how to take it back to an earlier state is not known",
            )
    return tokens


def restore_cache(kv_cache: Any, tokens: list[Any]) -> None:
    """Take a cache back to a snapshot; the snapshot stays valid."""
    for index, token in enumerate(tokens):
        layer = kv_cache.layers[index]
        kind = kind_of(layer)
        if kind == "length":
            layer.set_length(token)
        elif kind == "reference":
            kv_cache.layers[index] = copy.copy(token)
        else:
            kv_cache.layers[index] = copy.deepcopy(token)


def cached_tensors(kv_cache: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layer index, keys and values of every layer that caches keys as attention sees them."""
    for index, layer in enumerate(kv_cache.layers):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel():
            yield index, keys, layer.values


# Graph capture


class Capture:
    """Decode steps whose lengths live on the device, so that a CUDA graph can replay them.

    Args:
        kv_cache: A cache made by `make_cache`, in which every layer has seen the same tokens.
        batch: Sequences.
        room: Tokens still to come.
        first: First real key per sequence, int32 ``(batch | 1,)``; None without padding.

    Attributes:
        position: Slot of the new token, int64 ``(1,)``.
        length: Valid keys, the new one included, int32 ``(1,)``.

    Raises:
        UnsupportedError: If a layer of the cache is not preallocated.
    """

    def __init__(self, kv_cache: Any, batch: int, room: int, first: Tensor | None = None) -> None:
        self.layers = list(kv_cache.layers)
        for index, layer in enumerate(self.layers):
            if kind_of(layer) != "length" or layer.key_buffer is None:
                raise UnsupportedError(
                    what=f"captured decoding with layer {index} ({type(layer).__name__})",
                    reason="its length cannot live on the device",
                )
        devices = {layer.key_buffer.device for layer in self.layers}
        if len(devices) > 1:
            raise UnsupportedError(
                what="captured decoding over several devices",
                reason="a graph belongs to one; place the model on one",
            )
        self.start = self.layers[0].length
        device = self.layers[0].key_buffer.device
        for layer in self.layers:
            layer.reserve(self.start + room)
        self.batch = batch
        self.position = torch.full((1,), self.start, dtype=torch.int64, device=device)
        self.length = torch.full((1,), self.start + 1, dtype=torch.int32, device=device)
        self.padded = first is not None
        self.first = torch.zeros(1, dtype=torch.int32, device=device) if first is None else first

    def limits(self) -> Allowed:
        """What the new token may attend; made anew in every forward pass, so that nothing derived
        from it outlives the pass.
        """
        return Allowed(self.first.view(-1, 1, 1), self.length.view(1, 1, 1), self.first)

    def position_ids(self) -> Tensor:
        """Position of the new token in each sequence, int64 ``(batch, 1)``."""
        return (self.position - self.first).view(-1, 1).expand(self.batch, 1)

    def advance(self) -> None:
        """Move to the next token, on the device."""
        self.position += 1
        self.length += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the cache and the mask function follow the device's lengths."""
        _captures.append(self)
        for layer in self.layers:
            layer.position = self.position
        try:
            yield
        finally:
            _captures.pop()
            for layer in self.layers:
                layer.position = None


_captures: list[Capture] = []


def running_capture() -> Capture | None:
    """The capture that is running now, or None."""
    return _captures[-1] if _captures else None


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
) -> Tensor:
    """Translate one call of the attention interface into one call of a session."""
    softcap, sinks = call_arguments(kwargs)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    allowed = as_allowed(mask, query.shape[2], key, causal=bool(causal))
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedError(
            what=f"attention of class {type(module).__name__}",
            reason="it does not know which layer it belongs to",
        )
    return session.attend(
        layer,
        query,
        key,
        value,
        allowed,
        float(scaling),
        softcap=softcap,
        sinks=sinks,
    )
