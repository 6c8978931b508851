"""The scoring primitives of methods that keep a small integer code per key, in reference form.

Part of `sah_core.ops.Ops`: hash codes by random hyperplanes, their collisions, hard and soft, and
lookup tables over the codes of a product quantiser. Codes lie table by table, ``(batch, kv_heads,
tables, keys)``, so that those of one table are contiguous. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sah_core.randomness import Random

__all__ = ["CodeOps", "code_dtype", "hyperplanes"]

WORK_BYTES = 16 * 2**20
"""Temporary tensors stay near this, whatever the number of keys."""

CACHE_BYTES = 2**20
"""Temporary tensors that are read again at once stay near this, so that a cache holds them."""

LEAST_WIDTH = 256
"""Keys compared at once at least, since shorter rows cost more than they save."""


class CodeOps:
    """Reference forms in plain torch, reached as methods of `sah_core.ops.Ops`."""

    def lsh_codes(self, vectors: Tensor, planes: Tensor, center: Tensor | None = None) -> Tensor:
        """Hash codes by the signs of random projections (SimHash), packed.

        Args:
            vectors: ``(batch, heads, count, head_dim)``.
            planes: Normals of the hyperplanes, float32 ``(bits, tables, head_dim)``.
            center: Subtracted from the vectors first, float32 ``(batch, heads, head_dim)``; None =
                0.

        Returns:
            ``(batch, heads, tables, count)`` of the type `code_dtype` gives. Bit k of a code is 1
            where the vector lies on the positive side of hyperplane k of its table.
        """
        bits, tables, head_dim = planes.shape
        batch, heads, count, _ = vectors.shape
        shape = (batch, heads, tables, count)
        codes = torch.zeros(shape, dtype=code_dtype(bits), device=vectors.device)
        normals = planes.view(bits * tables, head_dim)
        step = max(1, WORK_BYTES // (5 * batch * heads * bits * tables))
        for begin in range(0, count, step):
            part = vectors[:, :, begin : begin + step].float()
            if center is not None:
                part = part - center.unsqueeze(2)
            sides = torch.matmul(normals, part.transpose(2, 3)) > 0
            for bit, side in enumerate(sides.unflatten(2, (bits, tables)).unbind(2)):
                # six times faster than a weighted sum over the bits
                codes[..., begin : begin + step].add_(side, alpha=1 << bit)
        return codes

    def collisions(self, query_codes: Tensor, key_codes: Tensor) -> Tensor:
        """In how many hash tables each key has the code of each query.

        Args:
            query_codes: ``(batch, heads, tables, query_len)``, as `lsh_codes` gives them.
            key_codes: ``(batch, kv_heads, tables, key_len)`` of the same type.

        Returns:
            uint8 (int16 for more than 255 tables) ``(batch, heads, query_len, key_len)``.
        """
        batch, heads, tables, query_len = query_codes.shape
        kv_heads, key_len = key_codes.shape[1], key_codes.shape[3]
        rows = heads // kv_heads * query_len
        dtype = torch.uint8 if tables < 256 else torch.int16
        shape = (batch * kv_heads, rows, key_len)
        counts = torch.zeros(shape, dtype=dtype, device=key_codes.device)
        queries = query_codes.reshape(batch * kv_heads, -1, tables, query_len).transpose(2, 3)
        queries = queries.reshape(batch * kv_heads, rows, tables, 1)
        room = CACHE_BYTES if counts.device.type == "cpu" else WORK_BYTES
        room //= rows * key_codes.element_size()
        width = max(LEAST_WIDTH, room // min(tables, 255))
        step = max(1, min(255, room // width))
        for head, mine in enumerate(queries):
            codes = key_codes[head // kv_heads, head % kv_heads].unsqueeze(0)
            for begin in range(0, key_len, width):
                part = counts[head, :, begin : begin + width]
                for table in range(0, tables, step):
                    keys = codes[:, table : table + step, begin : begin + width]
                    # torch compares ten times faster into the type of the codes than into bool
                    same = keys.new_empty((rows, *keys.shape[1:]))
                    torch.eq(keys, mine[:, table : table + step], out=same)
                    part += same.sum(1, dtype=keys.dtype)
        return counts.view(batch, heads, query_len, key_len)

    def cosines(
        self, query: Tensor, key: Tensor, indices: Tensor, center: Tensor | None = None
    ) -> Tensor:
        """Cosine of the angle between each query and some of the keys; reads those keys only.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            key: ``(batch, kv_heads, key_len, head_dim)``.
            indices: int32 ``(batch, heads, query_len, count)``; an index below 0 gives some number.
            center: Subtracted from the keys first, float32 ``(batch, kv_heads, head_dim)``; None =
                0.

        Returns:
            float32 in [-1, 1], shaped as ``indices``; 0 where one of the vectors is 0.
        """
        batch, heads, query_len, head_dim = query.shape
        kv_heads, count = key.shape[1], indices.shape[3]
        group = heads // kv_heads
        found = torch.empty(indices.shape, dtype=torch.float32, device=query.device)
        rows = F.normalize(query.float(), dim=-1)
        rows = rows.reshape(batch, kv_heads, group * query_len, 1, head_dim)
        at = indices.clamp(min=0).long().reshape(batch, kv_heads, group * query_len, count)
        cosine = found.view(batch, kv_heads, group * query_len, count)
        step = max(1, WORK_BYTES // (8 * batch * heads * query_len * head_dim))
        for begin in range(0, count, step):
            part = at[..., begin : begin + step]
            picked = part.flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)
            keys = key.gather(2, picked).float().view(*part.shape, head_dim)
            if center is not None:
                keys = keys - center[:, :, None, None]
            norm = keys.square().sum(-1).sqrt()
            dot = (keys * rows).sum(-1)
            cosine[..., begin : begin + step] = torch.where(norm > 0, dot / norm, 0.0)
        return found.clamp_(-1.0, 1.0)

    def pick(
        self, chosen: Tensor, capacity: int, limit: Tensor | None, draw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the keys that were chosen; where there are too many, an even sample.

        Of n chosen keys in a row of which m may stay, a systematic sample with a random start
        keeps each with probability m / n.

        Args:
            chosen: bool ``(batch, heads, query_len, key_len)``.
            capacity: Most entries per row in the result.
            limit: How many may stay per row, int32 broadcastable to ``(batch, heads, query_len)``,
                at most ``capacity``; None = ``capacity``.
            draw: A uniform number in (0, 1) per row, float32 ``(batch, heads, query_len, 1)``.

        Returns:
            int32 indices ``(batch, heads, query_len, width)`` in rising order, -1 after the last,
            with ``width`` the capacity, or less on the CPU, where it costs nothing to look; how
            many stayed and how many had been chosen, int32 ``(batch, heads, query_len)``.
        """
        rank = chosen.cumsum(-1, dtype=torch.int32)
        total = rank[..., -1:].contiguous()
        most = torch.full_like(total, capacity) if limit is None else limit.unsqueeze(-1)
        kept = torch.minimum(total, most)
        if chosen.device.type == "cpu" and kept.numel():
            capacity = int(kept.max())
        offset = (draw.double() * total).floor().long()
        slot = torch.arange(capacity, device=chosen.device)
        wanted = (slot * total.long() + offset).div(kept.clamp(min=1), rounding_mode="floor") + 1
        indices = torch.searchsorted(rank, wanted.to(torch.int32), out_int32=True)
        indices = torch.where(slot < kept, indices, -1)
        return indices, kept.squeeze(-1), total.squeeze(-1)

    def soft_collisions(self, gains: Tensor, key_codes: Tensor) -> Tensor:
        """Expected collisions with a query whose code is random, its bits independent (SOCKET).

        Args:
            gains: Log-odds that a bit of the query's code is 1, float32 ``(batch, heads, query_len,
                tables, bits)``.
            key_codes: ``(batch, kv_heads, tables, key_len)``, as `lsh_codes` gives them.

        Returns:
            ``sum_t P(code of the query in table t = code of the key)``, float32 ``(batch, heads,
            query_len, key_len)``.
        """
        batch, heads, query_len, tables, bits = gains.shape
        shape = (batch, heads, query_len, key_codes.shape[3])
        scores = torch.zeros(shape, dtype=torch.float32, device=gains.device)
        step = max(1, WORK_BYTES // (8 * batch * heads * query_len * 2**bits))
        for begin in range(0, tables, step):
            part = gains[:, :, :, begin : begin + step]
            ones, zeros = F.logsigmoid(part), F.logsigmoid(-part)
            log_chance = torch.zeros((*part.shape[:4], 1), device=gains.device)
            for bit in range(bits):
                # codes with the bit follow those without it, as its weight is above theirs
                halves = (log_chance + t[..., bit : bit + 1] for t in (zeros, ones))
                log_chance = torch.cat(tuple(halves), dim=-1)
            scores += self.table_scores(log_chance.exp_(), key_codes[:, :, begin : begin + step])
        return scores

    def table_scores(self, tables: Tensor, key_codes: Tensor) -> Tensor:
        """Sums of table entries that the codes of a key point to (product quantisation).

        Args:
            tables: float32 ``(batch, heads, query_len, tables, entries)``.
            key_codes: ``(batch, kv_heads, tables, key_len)``, a small integer type.

        Returns:
            ``sum_t tables[t, code_t(key)]``, float32 ``(batch, heads, query_len, key_len)``.
        """
        batch, heads, query_len, count, entries = tables.shape
        kv_heads, key_len = key_codes.shape[1], key_codes.shape[3]
        rows = heads // kv_heads * query_len
        tables = tables.reshape(batch, kv_heads, rows, count, entries)
        scores = torch.zeros((batch, kv_heads, rows, key_len), device=tables.device)
        for table in range(count):
            places = key_codes[:, :, None, table].long().expand(-1, -1, rows, -1)
            scores += tables[..., table, :].gather(-1, places)
        return scores.view(batch, heads, query_len, key_len)

    def nearest(self, vectors: Tensor, centroids: Tensor) -> Tensor:
        """The nearest of some centroids for each vector, by Euclidean distance.

        Args:
            vectors: ``(..., count, channels)``.
            centroids: float32 ``(..., entries, channels)``, at most 256 entries.

        Returns:
            uint8 ``(..., count)``.
        """
        count = vectors.shape[-2]
        codes = torch.empty(vectors.shape[:-1], dtype=torch.uint8, device=vectors.device)
        half = centroids.square().sum(-1).unsqueeze(-2) / 2
        lead = max(1, centroids[..., 0].numel())
        step = max(1, WORK_BYTES // (4 * lead))
        for begin in range(0, count, step):
            part = vectors[..., begin : begin + step, :].float()
            # |v - c|^2 without |v|^2, which is the same for all
            closeness = torch.matmul(part, centroids.transpose(-1, -2)) - half
            codes[..., begin : begin + step] = closeness.argmax(-1)
        return codes


def code_dtype(bits: int) -> torch.dtype:
    """The smallest integer type for hash codes of so many bits (at most 31), none of them
    negative.
    """
    if bits <= 8:
        return torch.uint8
    return torch.int16 if bits < 16 else torch.int32


def hyperplanes(
    random: Random, bits: int, tables: int, head_dim: int, device: torch.device | str
) -> Tensor:
    """Normals of random hyperplanes, as `CodeOps.lsh_codes` takes them: standard normal, float32
    ``(bits, tables, head_dim)``, a function of ``random`` alone (its draw 0).
    """
    plane = torch.arange(bits * tables, device=device).view(1, -1)
    channel = torch.arange(head_dim, device=device).view(1, 1, 1, -1)
    return random.normal(1, plane, channel).view(bits, tables, head_dim)
