"""The KV cache of a request: made, looked at, and taken back to an earlier state."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.compat.models import cache_argument, devices_of, text_config
from sah_core.errors import UnsupportedError, one_line


def make_cache(model: Any, capacity: int, *, offloaded: bool = False) -> Any:
    """A KV cache for a request: full-attention layers are preallocated, the others as the model
    needs them.

    Args:
        model: The model whose configuration says what the layers are.
        capacity: Tokens to take room for; the buffers grow by doubling beyond that.
        offloaded: The preallocated layers lie in the host's memory, and each is copied to its
            device when it computes; those that drop keys stay on the device. A model in the host's
            memory has nothing to offload.

    Raises:
        UnsupportedError: For a cache layer class that is not known here, or that does not know how
            to be offloaded.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from sah_core.compat.preallocated import PreallocatedLayer

    offloaded = offloaded and any(device.type != "cpu" for device in devices_of(model))
    cache_class, layer_class = DynamicCache, PreallocatedLayer
    if offloaded:
        from sah_core.compat.offloaded import OffloadedCache, OffloadedLayer

        cache_class, layer_class = OffloadedCache, OffloadedLayer
    made = cache_class(config=text_config(model))
    for index, layer in enumerate(made.layers):
        if type(layer) is DynamicLayer:
            made.layers[index] = layer_class(capacity)
        elif kind_of(layer) is None:
            raise UnsupportedError(
                what=f"cache layer {type(layer).__name__} of {type(model).__name__}",
                reason="how to take it back to an earlier state is not known",
            )
        elif (
            offloaded
            and isinstance(layer, DynamicLayer)
            and type(layer) is not DynamicSlidingWindowLayer
        ):
            raise UnsupportedError(
                what=f"offloading cache layer {type(layer).__name__} of {type(model).__name__}",
                reason="it keeps more than keys and values; use another cache_implementation",
            )
    return made


def make_quantised_cache(model: Any, options: Mapping[str, Any]) -> Any:
    """A KV cache that keeps the keys and values of a request in few bits.

    Args:
        model: The model whose configuration says what the layers are.
        options: As for `QuantisedCache`.

    Raises:
        UnsupportedError: If it does not fit the model, or its backend is not installed.
    """
    from sah_core.compat.quantised import QuantisedCache

    try:
        made = QuantisedCache(text_config(model), options)
    except (ValueError, TypeError, ImportError) as error:
        raise UnsupportedError(
            what=f"a quantised cache with {type(model).__name__}", reason=one_line(str(error))
        ) from error
    for layer in made.layers:
        if kind_of(layer) is None:
            raise UnsupportedError(
                what=f"cache layer {type(layer).__name__} of {type(model).__name__}",
                reason="how to take it back to an earlier state is not known",
            )
    return made


def check_quantised(options: Mapping[str, Any], *, beams: bool = False) -> str | None:
    """What is wrong with a quantised cache, as far as no model is needed; None if nothing is.

    Args:
        options: As for `QuantisedCache`.
        beams: Its sequences will change places.
    """
    from sah_core.compat import quantised

    try:
        quantised.check_options(options)
    except (ValueError, TypeError, ImportError) as error:
        return one_line(str(error))
    if beams and not quantised.reorders():
        return "the installed transformers reorders only what is not quantised yet"
    return None


def kind_of(layer: Any) -> str | None:
    """How a cache layer is snapshotted: by ``length``, by ``reference``, by ``copy``; None if
    unknown.
    """
    return kind_of_class(type(layer))


def kind_of_class(layer_class: type) -> str | None:
    """The same by the class of the layer."""
    from transformers import cache_utils

    from sah_core.compat.preallocated import PreallocatedLayer

    if issubclass(layer_class, PreallocatedLayer):
        return "length"
    # these make new tensors, and write into none
    replacing = ("QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
    if layer_class in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer):
        return "reference"
    if layer_class.__name__ in replacing and layer_class.__module__ == cache_utils.__name__:
        return "reference"
    in_place = (
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
    return "copy" if layer_class.__name__ in in_place else None


def is_offloaded(layer: Any) -> bool:
    """Whether the keys of a cache layer wait in the host's memory (`OffloadedLayer`)."""
    return hasattr(layer, "on_device")


def check_cache(kv_cache: Any) -> None:
    """Refuse a cache of the caller's whose layers are not known here: what it does to the keys may
    be anything.

    Layers of fixed length are left to the mask function, which refuses them; those that quantise
    give their keys back.

    Raises:
        UnsupportedError: With the class of the layer.
    """
    from transformers.cache_utils import StaticLayer

    from sah_core.compat.quantised import QUANTISED_LAYER

    passable = (QUANTISED_LAYER, StaticLayer)
    made_later = getattr(kv_cache, "layer_class_to_replicate", None)
    found = [type(layer) for layer in getattr(kv_cache, "layers", ())]
    for kind in dict.fromkeys([*found, *([made_later] if made_later else [])]):
        if kind_of_class(kind) is None and not issubclass(kind, passable):
            raise UnsupportedError(
                what=f"cache layer {kind.__name__} of {type(kv_cache).__name__}",
                reason="what it does to keys is not known; use transformers' DynamicCache",
            )


REORDERING: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda held, indices: torch.as_tensor(indices).long(),
    "batch_select_indices": lambda held, indices: held[
        indices.to(held.device) if isinstance(indices, Tensor) else indices
    ],
    "batch_repeat_interleave": lambda held, repeats: held.repeat_interleave(repeats),
}
"""Methods of a cache that take its sequences in another order, or some of them several times, and
which sequence each then was, by the ``held`` numbers of the sequences and the method's argument.
"""


@contextmanager
def followed(kv_cache: Any, follow: Callable[[Tensor], None]) -> Iterator[None]:
    """Let what is kept of the sequences of a cache change places with them.

    The cache gets a class of its own meanwhile. Copies of the cache that are made inside refuse
    to be reordered as long: they are followed by nothing.

    Args:
        kv_cache: The cache.
        follow: Is given what each sequence was before, int64, and called before the cache is
            reordered; what it raises leaves the cache as it is.
    """
    plain, owner = type(kv_cache), weakref.ref(kv_cache)
    live = [follow]  # emptied at the end: copies of the cache may outlive it

    def following(name: str) -> Callable[[Any, Any], None]:
        def reorder(self: Any, given: Any) -> None:
            count = sequences_of(self) if live else 0
            if count:
                held = torch.arange(count)
                rows = REORDERING[name](held, given)
                if rows.tolist() != held.tolist():
                    if self is not owner():
                        raise UnsupportedError(
                            what="reordering the sequences of a copy of a cache",
                            reason="what maskers keep belongs to the cache that the model ran "
                            "with last; run the model with the copy first",
                        )
                    live[0](rows)
            getattr(plain, name)(self, given)

        return reorder

    methods = {name: following(name) for name in REORDERING if hasattr(plain, name)}
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    kv_cache.__class__ = type(plain.__name__, (plain,), {**names, **methods})
    try:
        yield
    finally:
        live.clear()
        kv_cache.__class__ = plain


def window_of(layer: Any) -> int | None:
    """Tokens that a cache layer keeps; None where it keeps them all."""
    window = getattr(layer, "sliding_window", None)
    return window if isinstance(window, int) else None


def branched_cache(kv_cache: Any) -> Any:
    """A copy of a cache whose sequences may be repeated, chosen and reordered, and may go on in
    their own way; the tokens that it holds are shared, where layers write into none of them.
    """
    made = copy.copy(kv_cache)
    made.layers = []
    for layer in kv_cache.layers:
        kind = kind_of(layer)
        made.layers.append(copy.deepcopy(layer) if kind == "copy" else copy.copy(layer))
    return made


def repeated_cache(kv_cache: Any, repeats: int) -> Any:
    """A copy of a cache with every sequence ``repeats`` times, one copy next to the other."""
    made = branched_cache(kv_cache)
    batch = max(1, sequences_of(made))
    made.reorder_cache(torch.arange(batch).repeat_interleave(repeats))
    return made


def sequences_of(kv_cache: Any) -> int:
    """Sequences in a cache, 0 if nothing says how many."""
    return next((t.shape[0] for t in _cache_tensors(kv_cache)), 0)


def _cache_tensors(kv_cache: Any) -> Iterator[Tensor]:
    for _, keys, _ in cached_tensors(kv_cache):
        yield keys
    for layer in kv_cache.layers:
        for value in vars(layer).values():
            held = value if isinstance(value, list) else [value]
            yield from (t for t in held if isinstance(t, Tensor) and t.dim() > 1)


def snapshot_cache(kv_cache: Any) -> list[Any]:
    """Remember the state of a cache: lengths, references or copies, whatever each layer needs.

    Raises:
        UnsupportedError: For a cache layer class that is not known here.
    """
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
        if isinstance(token, Displaced):
            layer.put_back(token.begin, token.keys, token.values)
            tokens[index] = layer.length
        elif kind == "length":
            layer.set_length(token)
        elif kind == "reference":
            kv_cache.layers[index] = copy.copy(token)
        else:
            kv_cache.layers[index] = copy.deepcopy(token)


def can_shorten(kv_cache: Any) -> bool:
    """Whether all layers of a cache can drop their last tokens."""
    return all(kind_of(layer) == "length" for layer in kv_cache.layers)


@attrs.frozen(eq=False)
class Displaced:
    """A snapshot by length, and copies of the tokens that may have been written over since, as the
    layer's buffers hold them.
    """

    begin: int
    keys: Tensor
    values: Tensor


def keep_displaced(kv_cache: Any, tokens: list[Any], begin: int) -> None:
    """Let a snapshot outlast that tokens from ``begin`` on are written over: one by length holds
    only as long as nothing is written before that length.

    Args:
        kv_cache: The cache, as it was when the snapshot was taken.
        tokens: The snapshot, which gets copies of them; taking the cache back to it lets them go.
        begin: The first token that may be written over.
    """
    for index, layer in enumerate(kv_cache.layers):
        if kind_of(layer) == "length" and layer.length > begin:
            tokens[index] = Displaced(begin, *layer.copies_from(begin))


def shorten_cache(kv_cache: Any, length: int) -> None:
    """Drop the last tokens of a cache that can do so.

    Args:
        kv_cache: The cache; see `can_shorten`.
        length: Tokens to keep, at most those that it holds.
    """
    for layer in kv_cache.layers:
        layer.set_length(length)


@contextmanager
def without_cached(model: Any, kv_cache: Any, prompt_tokens: int) -> Iterator[None]:
    """Keep assisted decoding from reading again what a cache holds.

    Its first pass takes the whole prompt and the first proposals (seen up to transformers 5.24),
    where plain decoding takes the tokens behind the cached ones.

    Args:
        model: The model.
        kv_cache: The cache; the first pass over it is the one.
        prompt_tokens: Tokens of the whole prompt.
    """
    argument = cache_argument(type(model).forward)
    held = [int(kv_cache.get_seq_length())]

    def cut(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
        if not held or named.get(argument) is not kv_cache:
            return None
        cached = held.pop()
        if named["input_ids"].shape[1] < prompt_tokens:
            return None
        new = {"input_ids": named["input_ids"][:, cached:]}
        if named.get("position_ids") is not None:
            new["position_ids"] = named["position_ids"][..., cached:]
        return arguments, {**named, **new}

    hook = model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def seeming_empty(model: Any, kv_cache: Any, prompt_tokens: int) -> Iterator[None]:
    """Let a decoding loop that begins with an empty cache begin with a full one: the cache has no
    length before its first pass, which takes the whole prompt and reads what is not cached.

    Args:
        model: The model.
        kv_cache: The cache; the first pass over it is the one.
        prompt_tokens: Tokens of the whole prompt.
    """
    argument = cache_argument(type(model).forward)

    def show(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if named.get(argument) is kv_cache:
            vars(kv_cache).pop("get_seq_length", None)

    with without_cached(model, kv_cache, prompt_tokens):
        kv_cache.get_seq_length = lambda *layer: 0
        hook = model.register_forward_pre_hook(show, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            vars(kv_cache).pop("get_seq_length", None)


def cached_tensors(kv_cache: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layer index, keys and values of every layer that caches keys as attention sees them, on the
    layer's device; what is offloaded or quantised is brought back for one layer at a time.
    """
    for index, layer in enumerate(kv_cache.layers):
        held = _held(layer)
        if held is not None:
            yield index, *held


def _held(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values of a layer; None if it has none."""
    if is_offloaded(layer):
        return layer.on_device() if layer.length else None
    if hasattr(layer, "_dequantize"):
        from sah_core.compat.quantised import dequantised

        return dequantised(layer) if layer.is_initialized else None
    keys = getattr(layer, "keys", None)
    return (keys, layer.values) if isinstance(keys, Tensor) and keys.numel() else None
