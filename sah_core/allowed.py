"""Who may be attended: causality, left padding and the model's window, as structure instead of a
tensor.

A query row may attend one contiguous run of keys, ``start <= key < stop``; this covers causal
attention at any offset, left padding, sliding windows and chunked attention without a ``(query_len,
key_len)`` tensor. Masks that are not of this kind (a foreign 4-D mask, padding between context and
question) add a boolean ``keep``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False, slots=False)
class Allowed:
    """The keys that each query row may attend.

    Attributes:
        start: First allowed key, int32 ``(batch | 1, 1, query_len | 1)``.
        stop: One past the last allowed key, same shape rules as ``start``.
        first: First real key of each sequence (its left padding), int32 ``(batch | 1,)``. Sinks,
            pages and fractions count from here.
        keep: Extra restriction for masks that are no interval, bool ``(batch | 1, heads | 1,
            query_len | 1, key_len)``, True = may be attended; None on every structured path.
        known_first: ``first`` as host ints where the maker of the limits knew them, which saves a
            host sync.
        known_bounds: Likewise ``start`` and ``stop``, as lists ``[batch | 1][query_len | 1]``.
        window: Tokens of the model's sliding window or chunk, where the limits were made from one;
            ``start`` says it too, but only where the keys are more.
    """

    start: Tensor
    stop: Tensor
    first: Tensor
    keep: Tensor | None = None
    known_first: tuple[int, ...] | None = None
    known_bounds: tuple[list[list[int]], list[list[int]]] | None = None
    window: int | None = None

    @classmethod
    def causal(
        cls,
        query_len: int,
        key_len: int,
        *,
        device: torch.device | str = "cpu",
        first: Tensor | None = None,
        window: int | None = None,
        offset: int | None = None,
    ) -> Allowed:
        """Causal attention, bottom-right aligned: the last query sees the last key.

        Args:
            query_len: Number of query rows.
            key_len: Number of keys, cached ones included.
            device: Where the tensors live.
            first: First real key per sequence, int ``(batch | 1,)``; None means no padding.
            window: Sliding window in tokens; a query at position P sees ``P - window < key <= P``.
            offset: Key index of query row 0; ``key_len - query_len`` when None.
        """
        offset = key_len - query_len if offset is None else offset
        stop = torch.arange(offset + 1, offset + query_len + 1, dtype=torch.int32, device=device)
        stop = stop.view(1, 1, query_len)
        known_first = known_bounds = None
        if first is None:
            first = torch.zeros(1, dtype=torch.int32, device=device)
            stops = list(range(offset + 1, offset + query_len + 1))
            starts = [0] if window is None else [max(0, s - window) for s in stops]
            known_first, known_bounds = (0,), ([starts], [stops])
        first = first.to(torch.int32)
        start = first.view(-1, 1, 1)
        if window is not None:
            start = torch.maximum(start, stop - window)
        return cls(
            start, stop, first, known_first=known_first, known_bounds=known_bounds, window=window
        )

    @classmethod
    def everything(cls, key_len: int, *, device: torch.device | str = "cpu") -> Allowed:
        """Every query row may attend every key (bidirectional attention)."""
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        stop = torch.full((1, 1, 1), key_len, dtype=torch.int32, device=device)
        return cls(start=zero.view(1, 1, 1), stop=stop, first=zero)

    @classmethod
    def from_dense(cls, keep: Tensor) -> Allowed:
        """Read the structure out of a boolean mask; waits for the device.

        Args:
            keep: bool ``(batch, heads | 1, query_len, key_len)``, True = may be attended.

        Returns:
            Pure intervals when every row of ``keep`` is one run of keys shared by the heads,
            otherwise the enclosing intervals plus ``keep`` itself.

        Raises:
            TypeError: If ``keep`` is no 4-D bool tensor.
        """
        if keep.dtype != torch.bool or keep.dim() != 4:
            raise TypeError(f"keep must be a 4-D bool tensor, got {keep.dtype} {tuple(keep.shape)}")
        any_head = keep.any(dim=1, keepdim=True)
        counts = any_head.sum(-1, dtype=torch.int32)
        start = any_head.to(torch.uint8).argmax(-1).to(torch.int32)
        last = keep.shape[-1] - any_head.flip(-1).to(torch.uint8).argmax(-1).to(torch.int32)
        stop = torch.where(counts > 0, last, start)
        ever = any_head.any(dim=2)[:, 0]
        first = ever.to(torch.uint8).argmax(-1).to(torch.int32)
        contiguous = bool((stop - start == counts).all()) and keep.shape[1] == 1
        return cls(start=start, stop=stop, first=first, keep=None if contiguous else keep)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.stop.device

    @property
    def heads(self) -> int:
        """Distinct limits along the head dimension: 1, but for a ``keep`` that differs by head."""
        return 1 if self.keep is None else self.keep.shape[1]

    def to(self, device: torch.device | str, *_: object, **__: object) -> Allowed:
        """The same limits on another device (models spread over devices move their inputs)."""
        target = torch.device(device)
        if self.stop.device == target:
            return self
        if target not in self.memo:  # every layer of a device asks
            self.memo[target] = Allowed(
                start=self.start.to(target),
                stop=self.stop.to(target),
                first=self.first.to(target),
                keep=None if self.keep is None else self.keep.to(target),
                known_first=self.known_first,
                known_bounds=self.known_bounds,
                window=self.window,
            )
        moved: Allowed = self.memo[target]
        return moved

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was computed from these limits once and holds for every layer that shares them."""
        return {}

    @cached_property
    def bounds(self) -> tuple[list[list[int]], list[list[int]]]:
        """``start`` and ``stop`` as host lists ``[batch | 1][query_len | 1]``; waits for the device
        once.
        """
        return self.known_bounds or (self.start[:, 0].tolist(), self.stop[:, 0].tolist())

    @cached_property
    def first_host(self) -> tuple[int, ...]:
        """``first`` as host ints; waits for the device once."""
        return self.known_first or tuple(self.first.tolist())

    @cached_property
    def counts(self) -> Tensor:
        """Allowed keys per row, int64 ``(batch | 1, heads | 1, query_len | 1)``."""
        if self.keep is None:
            return (self.stop - self.start).clamp(min=0).long()
        return self.to_dense(self.keep.shape[-1]).sum(-1)

    def contains(self, keys: Tensor) -> Tensor:
        """Whether each key index is allowed for its row.

        Args:
            keys: Integer key indices ``(batch | 1, heads, query_len | 1, count)``.

        Returns:
            bool, broadcast of ``keys`` with the batch, head and query dimensions of the limits.

        Raises:
            ValueError: If the heads of ``keys`` and of ``keep`` do not fit together.
        """
        inside = (keys >= self.start.unsqueeze(-1)) & (keys < self.stop.unsqueeze(-1))
        if self.keep is None:
            return inside
        heads = keys.shape[1]
        keep = self.keep
        if keep.shape[1] != 1 and heads != keep.shape[1]:
            if heads != 1:
                raise ValueError(
                    f"a mask of {heads} heads does not fit a keep mask of {keep.shape[1]}"
                )
            keys = keys.expand(-1, keep.shape[1], -1, -1)
        shape = torch.broadcast_shapes(keys.shape[:3], keep.shape[:3])
        clamped = keys.long().clamp(0, keep.shape[-1] - 1).expand(*shape, keys.shape[-1])
        return inside & keep.expand(*shape, keep.shape[-1]).gather(-1, clamped)

    def to_dense(self, key_len: int) -> Tensor:
        """The limits as bool ``(batch | 1, heads | 1, query_len | 1, key_len)``: the reference
        form.
        """
        position = torch.arange(key_len, device=self.device, dtype=torch.int32)
        inside = (position >= self.start.unsqueeze(-1)) & (position < self.stop.unsqueeze(-1))
        return inside if self.keep is None else inside & self.keep

    def part(self, sequences: slice, heads: slice, of: int) -> Allowed:
        """The limits of some sequences and of some of ``of`` query heads."""
        known = self.known_first
        return Allowed(
            start=cut_part(self.start, sequences, heads, of),
            stop=cut_part(self.stop, sequences, heads, of),
            first=self.first if len(self.first) == 1 else self.first[sequences],
            keep=None if self.keep is None else cut_part(self.keep, sequences, heads, of),
            known_first=known if known is None or len(known) == 1 else known[sequences],
            window=self.window,
        )

    def rows(self, begin: int, end: int, step: int = 1) -> Allowed:
        """The limits of each ``step``-th query row from ``begin`` to ``end`` (exclusive)."""
        return Allowed(
            start=cut_rows(self.start, begin, end, step),
            stop=cut_rows(self.stop, begin, end, step),
            first=self.first,
            keep=None if self.keep is None else cut_rows(self.keep, begin, end, step),
            known_first=self.known_first,
            window=self.window,
        )


def cut_rows(tensor: Tensor, begin: int, end: int, step: int) -> Tensor:
    """Some query rows of ``(batch, heads, query_len | 1, ...)``."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, begin:end:step]


def cut_part(tensor: Tensor, sequences: slice, heads: slice, of: int) -> Tensor:
    """Some sequences and heads of a tensor ``(batch | 1, own | 1, ...)``, a view.

    Args:
        tensor: What to cut; dimensions of size 1 stay.
        sequences: Which sequences.
        heads: Which of ``of`` query heads: whole groups of those that share one of the ``own``.
        of: Query heads in all.
    """
    if tensor.shape[0] > 1:
        tensor = tensor[sequences]
    own = tensor.shape[1]
    if own > 1:
        tensor = tensor[:, heads.start * own // of : -(-heads.stop * own // of)]
    return tensor
