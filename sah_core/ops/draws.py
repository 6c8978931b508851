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

    def weighted_topk(
        self,
        random: Random,
        logits: Tensor,
        query_position: Tensor,
        first: Tensor,
        capacity: int,
        *,
        count: Tensor,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """A sample by weight without replacement: the greatest of logits plus Gumbel noise.

        Given the greatest that is left out, k, a key is in with probability ``1 - exp(-e^(l -
        k))``, with which estimates are unbiased (Wouter Kool and others: Stochastic Beams and Where
        to Find Them, arXiv 1903.06059, section 4).

        Args:
            random: Random numbers of a step and layer.
            logits: Logarithms of the weights, float32 ``(batch, heads, query_len, key_len)``; -inf
                is no candidate.
            query_position: Key index of every query row, int32 ``(1, query_len)``.
            first: First real key per sequence, int32 ``(batch | 1,)``; positions count from it.
            capacity: Most keys per row.
            count: Keys to draw per row, int32 ``(batch, heads, query_len)``, at most ``capacity``;
                a row of no more candidates is taken whole.
            draw: Distinguishes several samples at one place.

        Returns:
            int32 indices ``(batch, heads, query_len, capacity + 1)``, -1 at entries that are none,
            wherever they stand; and their probabilities, float32, 1 there.
        """
        heads, key_len = logits.shape[1], logits.shape[3]
        rows = query_position - first.view(-1, 1)
        keys = torch.arange(key_len, device=logits.device) - first.view(-1, 1)
        height = random.uniform64(heads, rows, keys[:, None, None, :], draw)
        scores = (logits.double() - (-height.log()).log()).to(torch.float32)
        indices, _ = self.masked_topk(scores, capacity + 1, count=count + 1)
        places = indices.clamp(min=0).long()
        found = scores.gather(-1, places).masked_fill(indices < 0, float("inf"))
        bar = found.amin(-1, keepdim=True)
        bar = torch.where((_candidates(logits) > count).unsqueeze(-1), bar, float("-inf"))
        indices = torch.where(found == bar, -1, indices)
        chance = -torch.expm1(-(logits.gather(-1, places).double() - bar.double()).exp())
        return indices, torch.where(indices >= 0, chance, 1.0).to(torch.float32)

    def weighted_draws(
        self,
        random: Random,
        logits: Tensor,
        query_position: Tensor,
        first: Tensor,
        capacity: int,
        *,
        count: Tensor,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The keys that draws by weight with replacement hit, each once.

        A key of the share w of the weights is in with probability ``1 - (1 - w)^count``.

        Args:
            random: As in `weighted_topk`; likewise ``query_position``, ``first`` and ``draw``.
            logits: As in `weighted_topk`.
            query_position: Key index of every query row.
            first: First real key per sequence.
            capacity: Most draws per row.
            count: Draws per row, int32 ``(batch, heads, query_len)``, at most ``capacity``; a row
                of no more candidates is taken whole.
            draw: Distinguishes several samples at one place.

        Returns:
            int32 indices ``(batch, heads, query_len, capacity)``, -1 at entries that are none,
            wherever they stand; and their probabilities, float32.
        """
        heads, key_len = logits.shape[1], logits.shape[3]
        share = torch.softmax(logits.double(), -1).nan_to_num(0.0)
        reached = share.cumsum(-1)
        slot = torch.arange(capacity, device=logits.device).view(1, 1, 1, -1)
        height = random.uniform64(heads, query_position - first.view(-1, 1), slot, draw)
        height = (height * reached[..., -1:]).contiguous()
        keys = torch.searchsorted(reached, height, right=True).clamp(max=key_len - 1)
        drawn = (slot < count.unsqueeze(-1)) & (share.gather(-1, keys) > 0)
        keys = torch.where(drawn, keys, key_len).sort(-1).values
        again = torch.zeros_like(drawn)
        again[..., 1:] = keys[..., 1:] == keys[..., :-1]
        keys = torch.where(again | (keys == key_len), -1, keys)
        chance = share.gather(-1, keys.clamp(min=0))
        chance = -torch.expm1(count.unsqueeze(-1) * torch.log1p(-chance))
        whole = (count >= _candidates(logits)).unsqueeze(-1)
        everything, _ = self.masked_topk(logits, capacity, count=count)
        indices = torch.where(whole, everything, keys.to(torch.int32))
        return indices, torch.where(whole, 1.0, chance).to(torch.float32)


def _candidates(logits: Tensor) -> Tensor:
    """Candidates per row."""
    return (logits > float("-inf")).sum(-1)
