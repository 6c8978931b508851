"""GPU forms of the scoring primitives; what a kernel cannot take goes to the reference form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.code_ops import code_dtype
from sah_core.mask import KeyRange
from sah_core.ops import Ops, channels_of, code_width
from sah_core.randomness import Random

from . import buckets, gathered, pages, queries, samples, topk
from . import labels as codes
from .attention import MAX_RANGES
from .backend import DTYPES, is_interpreted, on_its_device

ROWS = 16
"""Query rows up to which weights are read anew for each row; more are a matrix product."""


def takes(*tensors: Tensor) -> bool:
    """Whether kernels run where these tensors live, on their type."""
    return all(t.dtype in DTYPES and (t.is_cuda or is_interpreted()) for t in tensors)


def _hashes(rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernel for MLPs takes these rows."""
    widths = [rows.shape[3], *(weight.shape[2] for weight, _ in layers)]
    fits = len(layers) == 3 and max(widths) <= 256
    return takes(rows) and fits and 0 < rows.shape[2] <= ROWS and bool(rows.numel())


def _launched_where_tensors_live(cls: type[Ops]) -> type[Ops]:
    """Wrap every primitive of a class in `on_its_device`."""
    for name, method in list(vars(cls).items()):
        if not name.startswith("_") and callable(method):
            setattr(cls, name, on_its_device(method))
    return cls


@_launched_where_tensors_live
class TritonOps(Ops):
    """Kernels where there are some."""

    def logits(
        self, query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Logits in float32, keys read once and never converted in memory."""
        if not takes(query, key) or query.shape[3] > 256 or not query.shape[2]:
            return super().logits(query, key, scaling, softcap)
        # the units that multiply take one type: that of both, or the one that holds both
        common = torch.promote_types(query.dtype, key.dtype)
        return pages.logits(query.to(common), key.to(common), scaling, softcap)

    def masked_topk(
        self,
        scores: Tensor,
        capacity: int,
        *,
        count: Tensor | None = None,
        start: Tensor | None = None,
        stop: Tensor | None = None,
        taken: Sequence[KeyRange] = (),
        page_size: int = 1,
        origin: Tensor | None = None,
        levels: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Radix select, the chosen in the order of their indices."""
        select = topk.masked_topk
        if (
            not takes(scores)
            or scores.dtype != torch.float32
            or len(taken) > topk.MAX_TAKEN
            or not scores.numel()
        ):
            select = super().masked_topk
        return select(
            scores,
            capacity,
            count=count,
            start=start,
            stop=stop,
            taken=taken,
            page_size=page_size,
            origin=origin,
            levels=levels,
        )

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
        """The same bits in one launch."""
        if not (first.is_cuda or is_interpreted()) or not key_len * query_position.numel():
            return super().random_scores(random, heads, query_position, key_len, first, draw=draw)
        numbers = topk.Draw(state=random.state(draw), positions=query_position, first=first)
        shape = (first.shape[0], heads, query_position.shape[1], key_len)
        return topk.random_scores(numbers, shape)

    def row_numbers(
        self, random: Random, heads: int, query_position: Tensor, first: Tensor, *, draw: int = 0
    ) -> Tensor:
        """The same bits in one launch."""
        if not (first.is_cuda or is_interpreted()) or not query_position.numel():
            return super().row_numbers(random, heads, query_position, first, draw=draw)
        numbers = topk.Draw(state=random.state(draw), positions=query_position, first=first)
        return topk.row_numbers(numbers, heads)

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
        """The random numbers are made where they are compared."""
        if (
            not (first.is_cuda or is_interpreted())
            or len(taken) > topk.MAX_TAKEN
            or not key_len * query_position.numel()
        ):
            return super().random_topk(
                random,
                heads,
                query_position,
                key_len,
                first,
                capacity,
                batch=batch,
                draw=draw,
                count=count,
                start=start,
                stop=stop,
                taken=taken,
            )
        numbers = topk.Draw(state=random.state(draw), positions=query_position, first=first)
        shape = (batch, heads, query_position.shape[1], key_len)
        return topk.random_topk(
            numbers, shape, capacity, count=count, start=start, stop=stop, taken=taken
        )

    def share(
        self,
        length: Tensor,
        first: Tensor,
        fraction: float,
        *,
        divisor: int = 1,
        minimum: int = 0,
        maximum: int | None = None,
    ) -> Tensor:
        """One launch in place of seven."""
        if not length.is_cuda and not is_interpreted():
            return super().share(
                length, first, fraction, divisor=divisor, minimum=minimum, maximum=maximum
            )
        return pages.share(length, first, fraction, divisor, minimum, maximum)

    def page_bounds_update(
        self,
        low: Tensor,
        high: Tensor,
        key: Tensor,
        start: int | Tensor,
        page_size: int,
        first: Tensor | None = None,
    ) -> None:
        """One launch, whether keys come by the context or by the token."""
        if not takes(low, high, key) or key.shape[3] > 256:
            super().page_bounds_update(low, high, key, start, page_size, first)
            return
        pages.page_bounds_update(low, high, key, start, page_size, first)

    def page_scores(
        self, query: Tensor, low: Tensor, high: Tensor, reduction: str = "none", bits: int = 16
    ) -> Tensor:
        """Bounds read once, the group reduced before anything is written."""
        if not takes(query, low, high) or query.shape[3] > 256 or not query.shape[2]:
            return super().page_scores(query, low, high, reduction, bits)
        return pages.page_scores(query, low, high, reduction, bits)

    def label_update(
        self,
        labels: Tensor,
        affine: Tensor | None,
        key: Tensor,
        channels: Tensor,
        start: int | Tensor,
        bits: int,
    ) -> None:
        """One launch in place of fifteen."""
        if affine is None or not takes(key, affine) or channels.shape[1] > 256:
            super().label_update(labels, affine, key, channels, start, bits)
            return
        codes.label_update(labels, affine, key, channels, start, bits, code_width(bits))

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
        """Codes read once and unpacked in registers; labels of 16 bits are short keys."""
        count = channels.shape[1]
        tensors = [query, labels] if affine is None else [query, affine]
        short = affine is None and (labels.shape[1] != kv_heads or reduction == "max")
        if not takes(*tensors) or count > 128 or not query.shape[2] or short:
            return super().label_scores(
                query, channels, labels, affine, bits, scaling, kv_heads, reduction
            )
        linear = reduction in ("sum", "mean") and labels.shape[1] == kv_heads
        factor = scaling * kv_heads / query.shape[1] if linear and reduction == "mean" else scaling
        if affine is not None:
            # the heads that share labels are added up first
            rows = queries.label_rows(query, channels, bits, kv_heads if linear else query.shape[1])
            how = "none" if linear else reduction
            return codes.label_scores(rows, labels, affine, code_width(bits), factor, kv_heads, how)
        rows = channels_of(query, channels).float()
        rows = rows.unflatten(1, (kv_heads, -1)).sum(dim=2) if linear else rows
        return pages.logits(rows.to(labels.dtype), labels, factor)

    def signatures(self, rows: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """A program reads the weights of a head once and keeps what lies between them."""
        if not _hashes(rows, layers):
            return super().signatures(rows, layers)
        return queries.signatures(rows, layers)

    def signature_update(
        self,
        words: Tensor,
        key: Tensor,
        layers: Sequence[tuple[Tensor, Tensor]],
        start: int | Tensor,
    ) -> None:
        """Hashed and written in one launch, if they are few."""
        if not _hashes(key, layers):
            super().signature_update(words, key, layers, start)
            return
        queries.signature_update(words, key, layers, start)

    def hamming_scores(
        self, query: Tensor, key: Tensor, bits: int, kv_heads: int, reduction: str = "none"
    ) -> Tensor:
        """Words read once; the bits that differ are counted in registers."""
        if not (key.is_cuda or is_interpreted()) or not query.shape[2]:
            return super().hamming_scores(query, key, bits, kv_heads, reduction)
        return codes.hamming_scores(query, key, bits, kv_heads, reduction)

    def logits_at(
        self,
        query: Tensor,
        key: Tensor,
        indices: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Chosen keys are read where they lie."""
        if not takes(query, key) or max(query.shape[3], 16 * query.shape[2]) > 256:
            return super().logits_at(query, key, indices, scaling, softcap)
        return gathered.gathered(query, key, indices, scaling=scaling, softcap=softcap)

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
        """Labels of chosen keys are read where they lie, and unpacked in registers."""
        if not takes(query, affine) or max(query.shape[3], 16 * query.shape[2]) > 256:
            return super().label_logits_at(query, labels, affine, indices, bits, scaling, softcap)
        return gathered.gathered(
            query,
            labels,
            indices,
            scaling=scaling,
            softcap=softcap,
            affine=affine,
            width=code_width(bits),
        )

    def cosines(
        self, query: Tensor, key: Tensor, indices: Tensor, center: Tensor | None = None
    ) -> Tensor:
        """Chosen keys are read where they lie."""
        if not takes(query, key) or query.shape[3] > 256:
            return super().cosines(query, key, indices, center)
        return gathered.gathered(query, key, indices, cosine=True, center=center)

    def lsh_codes(self, vectors: Tensor, planes: Tensor, center: Tensor | None = None) -> Tensor:
        """One launch for few vectors; many are a matrix product."""
        if (
            not takes(vectors)
            or vectors.shape[2] > ROWS
            or vectors.shape[3] > 256
            or not vectors.numel()
        ):
            return super().lsh_codes(vectors, planes, center)
        return buckets.lsh_codes(vectors, planes, code_dtype(planes.shape[0]), center)

    def collisions(self, query_codes: Tensor, key_codes: Tensor) -> Tensor:
        """Codes read once for the query heads of a group, matches counted in registers."""
        on_device = key_codes.is_cuda or is_interpreted()
        keys, step = key_codes.shape[3], key_codes.stride(3)
        if not on_device or step != 1 or not keys * query_codes.numel():
            return super().collisions(query_codes, key_codes)
        return buckets.collisions(query_codes, key_codes)

    def pick(
        self, chosen: Tensor, capacity: int, limit: Tensor | None, draw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Two launches: what each chunk of keys holds, and where it goes."""
        if not (chosen.is_cuda or is_interpreted()) or not chosen.numel():
            return super().pick(chosen, capacity, limit, draw)
        return buckets.pick(chosen, capacity, limit, draw)

    def residual_count(self, ranges: Sequence[KeyRange], allowed: Allowed) -> Tensor:
        """One launch in place of twenty."""
        if len(ranges) > MAX_RANGES or not (allowed.stop.is_cuda or is_interpreted()):
            return super().residual_count(ranges, allowed)
        return samples.residual_count(ranges, allowed)

    def range_entries(self, ranges: Sequence[KeyRange], allowed: Allowed, key_len: int) -> Tensor:
        """One launch in place of thirty."""
        if len(ranges) > MAX_RANGES or not (allowed.stop.is_cuda or is_interpreted()):
            return super().range_entries(ranges, allowed, key_len)
        return samples.range_entries(ranges, allowed, key_len)

    def weight_moments(
        self,
        drawn: Tensor,
        sure: Tensor,
        chance: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A program passes over a row three times and writes five numbers."""
        if not takes(drawn, sure) or not drawn.numel():
            return super().weight_moments(drawn, sure, chance, sinks)
        return samples.weight_moments(drawn, sure, chance, sinks)
