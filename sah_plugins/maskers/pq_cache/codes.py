"""The state of PQCache: codes per key, and the centroids that they name."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from sah_core.ops import Ops
from sah_core.state import LayerInfo, TokenBuffer, reorder_first

WORK_BYTES = 16 * 2**20
"""Temporary tensors stay near this, whatever the number of keys."""


@attrs.frozen(eq=False)
class Codebook:
    """The centroids of one layer.

    Attributes:
        centroids: float32 ``(batch, kv_heads, parts, entries + 1, width)``; the last takes what
            belongs nowhere.
        reach: Greatest squared norm of a clustered sub-vector, ``(batch, kv_heads, parts, 1)``: for
            the metric ``ip`` sub-vectors are given one more channel that makes their norms equal.
        clustered: bool ``(batch, 1)``; the centroids of the others are their first keys.
        open: Some sequence is not clustered.
    """

    centroids: Tensor
    reach: Tensor
    clustered: Tensor
    open: bool

    @property
    def entries(self) -> Tensor:
        """The centroids without the spare one."""
        return self.centroids[..., :-1, :]

    def reordered(self, rows: Tensor) -> Codebook:
        """Those of the sequences in another order."""
        return Codebook(
            centroids=self.centroids.index_select(0, rows),
            reach=self.reach.index_select(0, rows),
            clustered=self.clustered.index_select(0, rows),
            open=self.open,
        )


class Codes:
    """The state of one layer: the codes of its keys and the centroids that they name.

    Attributes:
        book: The centroids.
        codes: uint8 ``(batch, kv_heads, parts, keys)``.
        complete: The context is complete: keys that come are encoded at once.
        length: Keys taken note of, as far as the host knows.
        encoded: Of these, keys with a code.
    """

    def __init__(self, layer: LayerInfo, parts: int, bits: int, metric: str) -> None:
        self.ops: Ops = layer.ops
        self.first = layer.first
        self.parts = parts
        self.augmented = metric == "ip"
        self.size = 2**bits
        lead = (layer.batch, layer.kv_heads, parts)
        width = layer.head_dim // parts + self.augmented
        self.book = Codebook(
            centroids=torch.zeros((*lead, self.size + 1, width), device=layer.device),
            reach=torch.zeros((*lead, 1), device=layer.device),
            clustered=torch.zeros((layer.batch, 1), dtype=torch.bool, device=layer.device),
            open=True,
        )
        self.codes = TokenBuffer((*lead, layer.capacity), torch.uint8, layer.device, dim=3)
        self.complete = False
        self.length = 0
        self.encoded = 0

    def reserve(self, keys: int) -> None:
        """Make room for the codes of so many keys."""
        self.codes.reserve(keys)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Take note of new keys, and encode them once the context is complete."""
        if isinstance(start, int):
            self.length = start + key.shape[2]
        if self.complete:
            self.encode(key, start)

    def catch_up(self, key: Tensor) -> None:
        """Encode what came while the context is still being read."""
        if not self.complete and self.encoded < self.length:
            self.encode(key[:, :, self.encoded : self.length], self.encoded)

    def finish(self, key: Tensor, book: Codebook) -> None:
        """Encode the whole context with its own centroids."""
        self.complete, self.book = True, book
        self.encode(key, 0)

    def encode(self, key: Tensor, start: int | Tensor) -> None:
        """Write the codes of consecutive keys, in pieces that bound the memory."""
        batch, kv_heads, count, head_dim = key.shape
        step = max(1, WORK_BYTES // (8 * batch * kv_heads * head_dim))
        for begin in range(0, count, step):
            self._encode(key[:, :, begin : begin + step], start + begin)
        self.encoded = self.length

    def _encode(self, key: Tensor, start: int | Tensor) -> None:
        book = self.book
        vectors = split(key, self.parts, book.reach if self.augmented else None)
        if not book.open:
            self.codes.write(self.ops.nearest(vectors, book.entries), start)
            return
        place = torch.arange(key.shape[2], device=key.device) + start
        place = place if self.first is None else place - self.first.view(-1, 1)
        own = ~book.clustered & (place >= 0) & (place < self.size)
        slot = torch.where(own, place, self.size).long()[:, None, None]
        target = slot.unsqueeze(-1).expand(vectors.shape)
        book.centroids.scatter_(3, target, vectors)
        codes = torch.where(slot < self.size, slot, self.ops.nearest(vectors, book.entries))
        self.codes.write(codes.to(torch.uint8), start)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.codes.reorder(rows)
        self.book = self.book.reordered(rows)
        self.first = reorder_first(self.first, rows)

    def snapshot(self) -> tuple[int, int, bool, Codebook]:
        """The lengths and the centroids, which do not change while codes name them."""
        return self.length, self.encoded, self.complete, self.book

    def restore(self, token: tuple[int, int, bool, Codebook]) -> None:
        """Cut back to the snapshot; codes of other centroids are made anew when needed."""
        book = self.book
        self.length, self.encoded, self.complete, self.book = token
        if book is not self.book:
            self.encoded = 0


def split(key: Tensor, parts: int, reach: Tensor | None = None) -> Tensor:
    """Sub-vectors of keys ``(..., count, head_dim)``, float32 ``(..., parts, count, width)``, with
    one more channel where ``reach`` is given.
    """
    vectors = key.float().unflatten(-1, (parts, -1)).transpose(-3, -2)
    return vectors if reach is None else augment(vectors, reach)


def augment(vectors: Tensor, reach: Tensor) -> Tensor:
    """Vectors with one more channel that brings their squared norm up to ``reach``, so that the
    nearest of them has the greatest inner product.
    """
    missing = (reach - vectors.square().sum(-1)).clamp(min=0).sqrt()
    return torch.cat([vectors, missing.unsqueeze(-1)], dim=-1)
