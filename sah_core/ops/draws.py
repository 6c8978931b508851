"""Random numbers by row and key, and uniform samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.mask import KeyRange
from sah_core.ops.topk import TopkOps
from sah_core.randomness import Random


class DrawOps(TopkOps):
    """Draws that depend on their place alone."""

    def random_scores(
        self,
        random: Random,
        heads: int,
        query_position: Tensor,
        key_len: int,
        first: Tensor,
        *,
        draw: int = 0,
    ) -> Tensor:
        """A uniform random number for every key and query row; the best of them are a sample.

        Args:
            random: Random numbers of a step and layer.
            heads: Query heads.
            query_position: Key index of every query row, int32 ``(1, query_len)``.
            key_len: Keys in the buffer.
            first: First real key per sequence, int32 ``(batch | 1,)``; positions count from it.
            draw: Distinguishes several numbers at one place.

        Returns:
            float32 ``(batch | 1, heads, query_len, key_len)`` in (0, 1).
        """
        rows = query_position - first.view(-1, 1)
        keys = torch.arange(key_len, device=first.device) - first.view(-1, 1)
        return random.uniform(heads, rows, keys[:, None, None, :], draw)

    def row_numbers(
        self, random: Random, heads: int, query_position: Tensor, first: Tensor, *, draw: int = 0
    ) -> Tensor:
        """A uniform random number for every query row.

        Args:
            random: Random numbers of a step and layer.
            heads: Query heads.
            query_position: Key index of every query row, int32 ``(1, query_len)``.
            first: First real key per sequence, int32 ``(batch | 1,)``; positions count from it.
            draw: Distinguishes several numbers at one place.

        Returns:
            float32 ``(batch | 1, heads, query_len, 1)`` in (0, 1): the number of key position 0.
        """
        rows = query_position - first.view(-1, 1)
        place = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=first.device)
        return random.uniform(heads, rows, place, draw)

    def random_topk(
        self,
        random: Random,
        heads: int,
        query_position: Tensor,
        key_len: int,
        first: Tensor,
        capacity: int,
        *,
        batch: int,
        draw: int = 0,
        count: Tensor | None = None,
        start: Tensor | None = None,
        stop: Tensor | None = None,
        taken: Sequence[KeyRange] = (),
    ) -> tuple[Tensor, Tensor]:
        """A uniform sample without replacement: `masked_topk` of `random_scores`.

        Args:
            random: As in `random_scores`; likewise ``heads`` to ``first`` and ``draw``.
            heads: Query heads.
            query_position: Key index of every query row.
            key_len: Keys in the buffer, which are the candidates.
            first: First real key per sequence.
            capacity: As in `masked_topk`; likewise ``count`` to ``taken``.
            batch: Sequences.
            draw: Distinguishes several samples at one place.
            count: How many to choose per row.
            start: First candidate key per row.
            stop: One past the last candidate key per row.
            taken: Ranges whose members are no candidates.

        Returns:
            Those of `masked_topk`.
        """
        scores = self.random_scores(random, heads, query_position, key_len, first, draw=draw)
        scores = scores.expand(batch, -1, -1, -1).contiguous()
        return self.masked_topk(scores, capacity, count=count, start=start, stop=stop, taken=taken)
