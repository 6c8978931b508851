"""k-means over the sub-vectors of keys, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sah_core.randomness import Random
from sah_plugins.maskers.pq_cache.codes import WORK_BYTES, Codes, augment, split


class Clusters:
    """k-means of one sequence, all KV heads and sub-vectors at once.

    Distances, sums and the copies of the keys in float32 are made for some keys at a time. Sums are
    products with the assignment matrix, which, unlike scattered additions, come out the same every
    time on a GPU.

    Attributes:
        key: The keys to cluster, ``(kv_heads, count, head_dim)``, more than there are centroids.
        reach: Greatest squared norm of a sub-vector, float32 ``(kv_heads, parts, 1)``; None for
            the Euclidean metric.
    """

    def __init__(self, codes: Codes, key: Tensor) -> None:
        self.ops, self.parts, self.size = codes.ops, codes.parts, codes.size
        self.key = key
        self.lead = (key.shape[0], self.parts)
        per_key = 4 * key.shape[0] * (2 * key.shape[2] + 2 * self.parts * self.size)
        self.step = max(1, WORK_BYTES // per_key)
        self.reach: Tensor | None = None
        if codes.augmented:
            norms = [split(part, self.parts).square().sum(-1).amax(-1) for part in self.pieces()]
            self.reach = torch.stack(norms).amax(0).unsqueeze(-1)

    def pieces(self) -> list[Tensor]:
        """The keys in pieces, views of the cache."""
        return list(self.key.split(self.step, dim=1))

    def vectors(self, key: Tensor) -> Tensor:
        """The sub-vectors of some keys, float32 ``(kv_heads, parts, count, width)``."""
        return split(key, self.parts, self.reach)

    def at(self, indices: Tensor) -> Tensor:
        """The sub-vectors of the keys at indices ``(kv_heads, parts, count)``."""
        parts = self.key.unflatten(2, (self.parts, -1)).transpose(1, 2)
        width = parts.shape[3]
        rows = parts.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, width)).float()
        return rows if self.reach is None else augment(rows, self.reach)

    def centroids(self, rounds: int, random: Random, offset: int) -> Tensor:
        """The centroids, float32 ``(kv_heads, parts, entries, width)``.

        Args:
            rounds: Rounds of k-means, fewer if nothing changes any more.
            random: Chooses the keys that the clusters start from, all distinct.
            offset: Position of the first key, counted from the first real one.
        """
        device, count = self.key.device, self.key.shape[1]
        position = torch.arange(offset, offset + count, device=device).view(1, 1, 1, -1)
        chances = random.uniform(1, torch.zeros((1, 1), device=device), position)
        chosen = chances[0, 0, 0].topk(self.size).indices
        centroids = self.at(chosen.expand(*self.lead, -1))
        before: Tensor | None = None
        for _ in range(rounds):
            centroids, codes = self.round(centroids)
            if before is not None and torch.equal(codes, before):
                break
            before = codes
        return centroids

    def round(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """One round of Lloyd's algorithm: the means of the clusters, and the codes before.

        A cluster without keys moves to a key that is far from its centroid: the first such cluster
        to the farthest, the second to the one after it.
        """
        entry = torch.arange(self.size, device=centroids.device)
        sums = torch.zeros_like(centroids)
        counts = torch.zeros((*self.lead, self.size), device=centroids.device)
        codes, distances = [], []
        for part in self.pieces():
            vectors = self.vectors(part)
            code = self.ops.nearest(vectors, centroids)
            member = (code.unsqueeze(-1) == entry).float()
            sums += member.transpose(2, 3) @ vectors
            counts += member.sum(2)
            gap = vectors - member @ centroids
            distances.append(gap.square().sum(-1))
            codes.append(code)
        means = sums / counts.clamp(min=1).unsqueeze(-1)
        empty = counts == 0
        if bool(empty.any()):
            far = torch.cat(distances, dim=2).topk(self.size).indices
            rank = (empty.cumsum(-1) - 1).clamp(min=0)
            means = torch.where(empty.unsqueeze(-1), self.at(far.gather(2, rank)), means)
        return means, torch.cat(codes, dim=2)
