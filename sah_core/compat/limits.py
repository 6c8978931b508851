"""What transformers says of who may attend what, as structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.compat.capture import running_capture
from sah_core.errors import UnsupportedError

_paddings: list[tuple[int, ...]] = []
"""What the `left_padding` blocks around the present pass say, the innermost last."""


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

    The arguments are those of transformers' ``sdpa_mask``.

    Raises:
        UnsupportedError: For a KV cache of fixed length, whose unused slots would count as keys.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    running = running_capture()
    if running is not None:
        return running.limits()
    if kv_length + int(kv_offset) > int(q_offset) + q_length and stops_at_query(mask_function):
        raise UnsupportedError(
            what="a KV cache of fixed length",
            reason="its unused slots would count as keys; use transformers' DynamicCache",
        )
    rule = None if mask_function is causal_mask_function else mask_function
    window = None if rule is None or use_vmap else local_size
    if rule is not None and (window is None or not is_sliding_window(rule, window, device)):
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
    if attention_mask is not None and _paddings and _paddings[-1]:
        known = _paddings[-1]
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


def stops_at_query(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a mask function stops at the query: keys behind it are then no keys yet."""
    if mask_function is None:
        return True
    index = [torch.tensor(i) for i in (0, 0, 0, 1)]
    return not bool(mask_function(*index))


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


def as_allowed(mask: Any, query_len: int, key: Tensor, *, causal: bool = True) -> Allowed:
    """What an attention function got as its mask, as limits.

    Args:
        mask: Limits, a 4-D mask (bool or additive), or None.
        query_len: Query rows.
        key: The keys.
        causal: What None means: causal attention, or attention to everything.

    Raises:
        UnsupportedError: For anything else.
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
