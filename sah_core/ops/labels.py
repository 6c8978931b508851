"""Labels: some channels of each key, in few bits (Double Sparsity)."""

from __future__ import annotations

from torch import Tensor

from sah_core.mask import spread_heads
from sah_core.ops.heads import channels_of, reduce_groups, take_rows, write_rows
from sah_core.ops.logits import LogitOps
from sah_core.ops.packing import code_width, pack_codes, quantise, round_to_bits, unpack_codes


class LabelOps(LogitOps):
    """Label caches: written and scored."""

    def label_update(
        self,
        labels: Tensor,
        affine: Tensor | None,
        key: Tensor,
        channels: Tensor,
        start: int | Tensor,
        bits: int,
    ) -> None:
        """Write the labels of new keys, in place: some channels of each, rounded key by key
        (Double Sparsity, section 3.2).

        Args:
            labels: With 16 bits ``(batch, label_heads, capacity, channels)`` in the type of the
                keys, else the codes of `pack_codes` in fields of `code_width(bits)` bits, int32
                ``(batch, label_heads, capacity, words)``. ``label_heads`` is the number of query
                heads or of KV heads.
            affine: Step and minimum of each label in the type of the keys, ``(batch, label_heads,
                capacity, 2)``: code c stands for ``c * step + minimum``. None with 16 bits.
            key: New keys ``(batch, kv_heads, new, head_dim)``.
            channels: The channels that a label holds, int64 ``(label_heads, channels)``.
            start: Key index of the first of them; an int32 tensor ``(1,)`` under graph capture,
                where ``new`` is 1.
            bits: Bits per channel, 1 to 16.
        """
        chosen = channels_of(key, channels)
        if affine is None:
            write_rows(labels, chosen, start)
            return
        codes, scale = quantise(chosen, bits)
        write_rows(labels, pack_codes(codes, code_width(bits)), start)
        write_rows(affine, scale, start)

    def label_scores(
        self,
        query: Tensor,
        channels: Tensor,
        labels: Tensor,
        affine: Tensor | None,
        bits: int,
        scaling: float,
        kv_heads: int,
        reduction: str = "none",
    ) -> Tensor:
        """Scores from labels: ``scaling * sum_j q_j k_j`` over the channels that a label holds,
        the query rounded like the keys.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            channels: int64 ``(label_heads, channels)``, as given to `label_update`.
            labels: What `label_update` wrote, cut to the keys that count.
            affine: Likewise; None with 16 bits.
            bits: Bits per channel, 1 to 16.
            scaling: Factor on the sum.
            kv_heads: KV heads, of which the query heads form groups.
            reduction: How the query heads of a group share their scores: none, sum, mean or max.

        Returns:
            float32 ``(batch, heads, query_len, key_len)``, or ``(batch, kv_heads, query_len,
            key_len)`` when reduced.
        """
        batch, heads, query_len, _ = query.shape
        rows = channels_of(query, channels).float()
        if affine is None:
            values = labels.float()
        else:
            rows = round_to_bits(rows, bits)
            values = _restored(labels, affine, bits, channels.shape[1])
        if reduction in ("sum", "mean") and values.shape[1] == kv_heads:
            # linear in the query: the heads that share labels are added up first
            rows = rows.view(batch, kv_heads, -1, query_len, rows.shape[3]).sum(dim=2)
            factor = scaling / (heads // kv_heads) if reduction == "mean" else scaling
            return (rows @ values.transpose(2, 3)).mul_(factor)
        rows = rows.reshape(batch, values.shape[1], -1, rows.shape[-1])
        scores = (rows @ values.transpose(2, 3)).view(batch, heads, query_len, -1)
        # scaled after the sums, so that keys of equal products stay equal
        return reduce_groups(scores, kv_heads, reduction).mul_(scaling)

    def label_logits_at(
        self,
        query: Tensor,
        labels: Tensor,
        affine: Tensor,
        indices: Tensor,
        bits: int,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Logits of chosen keys, estimated from labels that hold every channel; the query is exact.

        Args:
            query: ``(batch, heads, query_len, head_dim)``.
            labels: What `label_update` wrote for all channels of each KV head, in fewer than 16
                bits.
            affine: Likewise.
            indices: int32 ``(batch | 1, heads', query_len | 1, count)`` with ``heads'`` a divisor
                of the heads; negative entries are no keys.
            bits: Bits per channel.
            scaling: Factor on ``q . k``.
            softcap: Logit cap, or None.

        Returns:
            float32 ``(batch, heads, query_len, count)``, -inf at entries that are no keys.
        """
        _, heads, query_len, head_dim = query.shape
        if query_len > 1 or indices.shape[3] >= labels.shape[2]:
            keys = _restored(labels, affine, bits, head_dim)
            return self.logits_at(query, keys, indices, scaling, softcap)
        keys = _restored(take_rows(labels, indices), take_rows(affine, indices), bits, head_dim)
        none = spread_heads(indices, heads) < 0
        return self.logits(query, keys, scaling, softcap).masked_fill(none, float("-inf"))


def _restored(labels: Tensor, affine: Tensor, bits: int, channels: int) -> Tensor:
    """What the codes of labels stand for, float32 ``(..., channels)``."""
    codes = unpack_codes(labels, code_width(bits), channels).float()
    step, least = affine.float().unbind(-1)
    return codes * step.unsqueeze(-1) + least.unsqueeze(-1)
