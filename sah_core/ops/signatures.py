"""Signatures: one bit for each of many projections of a vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.ops.heads import reduce_groups, write_rows
from sah_core.ops.packing import pack_codes, popcount


class SignatureOps:
    """Signatures: made and compared."""

    def pack_signs(self, values: Tensor) -> Tensor:
        """Signatures: one bit per value, set where it is above 0.

        Args:
            values: ``(..., bits)``.

        Returns:
            int32 ``(..., ceil(bits / 32))``: bit b is bit ``b % 32`` of word ``b // 32``; bits past
            the last are 0.
        """
        return pack_codes((values > 0).to(torch.int32), 1)

    def signatures(self, rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Signatures of rows: the signs of what a small MLP of each head makes of them.

        Args:
            rows: ``(batch, heads, count, channels)``.
            layers: Weight ``(heads, inputs, outputs)`` and bias ``(heads, 1, outputs)`` of each
                linear layer, float32, with SiLU between two layers.

        Returns:
            `pack_signs` of the outputs, int32 ``(batch, heads, count, words)``.
        """
        return self.pack_signs(apply_mlp(layers, rows.float()))

    def signature_update(
        self,
        words: Tensor,
        key: Tensor,
        layers: Sequence[tuple[Tensor, Tensor]],
        start: int | Tensor,
    ) -> None:
        """Write the signatures of new keys, in place.

        Args:
            words: Signatures of all keys, int32 ``(batch, key_heads, capacity, words)``;
                ``key_heads`` is a multiple of the number of KV heads.
            key: New keys ``(batch, kv_heads, new, head_dim)``.
            layers: The MLPs of the ``key_heads``; see `signatures`.
            start: Key index of the first of them; an int32 tensor ``(1,)`` under graph capture,
                where ``new`` is 1.
        """
        rows = key.repeat_interleave(words.shape[1] // key.shape[1], dim=1)
        write_rows(words, self.signatures(rows, layers), start)

    def hamming_scores(
        self, query: Tensor, key: Tensor, bits: int, kv_heads: int, reduction: str = "none"
    ) -> Tensor:
        """How many bits of two signatures agree.

        Args:
            query: `pack_signs` of the queries, int32 ``(batch, heads, query_len, words)``.
            key: `pack_signs` of the keys, int32 ``(batch, heads | kv_heads, key_len, words)``.
            bits: Bits per signature.
            kv_heads: KV heads, of which the query heads form groups.
            reduction: How the query heads of a group share their scores: none, sum, mean or max.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``, or ``(batch, kv_heads, query_len,
            key_len)`` when reduced.
        """
        batch, heads, query_len, words = query.shape
        rows = query.reshape(batch, key.shape[1], -1, words)
        differ = torch.zeros((), dtype=torch.int32, device=query.device)
        for word in range(words):
            differ = differ + popcount(rows[..., word, None] ^ key[..., None, :, word])
        scores = (bits - differ).float().view(batch, heads, query_len, key.shape[2])
        return reduce_groups(scores, kv_heads, reduction)


def apply_mlp(layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> Tensor:
    """Send rows ``(..., heads, count, channels)`` through the MLP of each head: linear layers of
    weight ``(heads, inputs, outputs)`` and bias ``(heads, 1, outputs)``, with SiLU between.
    """
    for index, (weight, bias) in enumerate(layers):
        if index:
            rows = torch.nn.functional.silu(rows)
        rows = torch.matmul(rows, weight) + bias
    return rows
