"""MagicPIG: keys sampled by locality-sensitive hashing, each with a known probability.

Zhuoming Chen, Ranajoy Sadhukhan, Zihao Ye, Yang Zhou, Jianyu Zhang, Niklas Nolte, Yuandong Tian,
Matthijs Douze, Leon Bottou, Zhihao Jia, Beidi Chen: MagicPIG: LSH Sampling for Efficient LLM
Generation, arXiv 2410.16179, sections 4.2 and 4.3.

Keys, centred by their mean over the context, and queries are hashed into ``lsh_l`` tables by the
signs of ``lsh_k`` random projections each. A key at the angle theta to the query falls into the
query's bucket of one table with probability ``u = (1 - theta / pi)^K``; those found in at least two
tables are attended, which happens with probability ``w = 1 - (1 - u)^L - L u (1 - u)^(L - 1)``, and
count ``1 / w`` times. Centring moves all logits of a query by the same amount, so that it changes
the sampling and not the attention.

Differs from the paper in drawing the hyperplanes per layer and pipeline step (the authors share
them among 16 layers and draw them per KV head), in dividing by w exactly (the authors add 1e-4), in
hashing generated tokens like all others (the authors attend all of them), in ``min_matches`` other
than 2, and in ``max_size``: of a row that finds more keys an even sample is kept, whose
probabilities say so. While the context is still being read, keys are hashed without centring, since
their mean is not known.

Reads ``lsh_l`` codes of ``lsh_k`` bits per key and query, and keeps as much: 2 ``lsh_l`` bytes per
token and KV head for 9 to 15 bits.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import (
    Capabilities,
    Inputs,
    Mask,
    Masker,
    ParameterError,
    Search,
    Size,
    hookimpl,
    param,
)
from sah_core.code_ops import code_dtype, hyperplanes
from sah_core.ops import Ops
from sah_core.selection import count_overflow, join_rows, row_pieces
from sah_core.state import LayerInfo, TokenBuffer

BYTES_PER_KEY = 12
"""Of one query row and head: the count, the rank, and indices for a quarter of the keys."""

MEAN_CHUNK = 4096
"""Keys summed at once for the mean, counted from the first, so that padding changes nothing."""

TINY = 1e-15
"""Chances are kept this far from 0 and 1, so that their logarithms are finite."""

OVERFLOW_DRAW = 2
"""The draw that thins a row with too many keys; the hyperplanes use the first two."""


class HashTables:
    """The state of one layer: the codes of its keys and what they were made with.

    Attributes:
        planes: float32 ``(bits, tables, head_dim)``.
        codes: ``(batch, kv_heads, tables, keys)``.
        center: Mean of the context's keys, float32 ``(batch, kv_heads, head_dim)``; None before
            the context is complete, and without centring.
        complete: The context is complete: keys that come are hashed at once.
        length: Keys taken note of, as far as the host knows.
        hashed: Of these, keys with a code.
    """

    def __init__(self, layer: LayerInfo, bits: int, tables: int) -> None:
        self.ops: Ops = layer.ops
        self.planes = hyperplanes(layer.random, bits, tables, layer.head_dim, layer.device)
        shape = (layer.batch, layer.kv_heads, tables, layer.capacity)
        self.codes = TokenBuffer(shape, code_dtype(bits), layer.device, dim=3)
        self.center: Tensor | None = None
        self.complete = False
        self.length = 0
        self.hashed = 0

    def reserve(self, keys: int) -> None:
        """Make room for the codes of so many keys."""
        self.codes.reserve(keys)

    def append(self, key: Tensor, start: int | Tensor) -> None:
        """Take note of new keys, and hash them once the context is complete."""
        if isinstance(start, int):
            self.length = start + key.shape[2]
        if self.complete:
            self.hash(key, start)

    def hash(self, key: Tensor, start: int | Tensor) -> None:
        """Write the codes of consecutive keys."""
        self.codes.write(self.ops.lsh_codes(key, self.planes, self.center), start)
        self.hashed = self.length

    def finish(self, key: Tensor, center: Tensor | None) -> None:
        """Hash the whole context anew, now that its mean is known."""
        self.complete, self.center = True, center
        self.hash(key, 0)

    def catch_up(self, key: Tensor) -> None:
        """Hash what came while the context is still being read."""
        if not self.complete and self.hashed < self.length:
            self.hash(key[:, :, self.hashed : self.length], self.hashed)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.codes.reorder(rows)
        self.center = None if self.center is None else self.center.index_select(0, rows)

    def snapshot(self) -> tuple[int, int, bool, Tensor | None]:
        """The lengths and the centre; codes before them are not written again."""
        return self.length, self.hashed, self.complete, self.center

    def restore(self, token: tuple[int, int, bool, Tensor | None]) -> None:
        """Cut back to the snapshot; codes made with another centre are made anew when needed."""
        ended = self.complete
        self.length, self.hashed, self.complete, self.center = token
        if ended and not self.complete:
            self.hashed = 0


@attrs.frozen(kw_only=True)
class MagicPig(Masker):
    """Sample the keys that share hash buckets with the query, the nearer the likelier."""

    name: ClassVar[str] = "magicpig"
    capabilities: ClassVar[Capabilities] = Capabilities(
        stochastic=True, unbounded=True, keys_only=True
    )

    lsh_l: int = param(
        150,
        type=int,
        minimum=1,
        maximum=4096,
        help="Hash tables L: the more, the more keys are sampled.",
        search=Search.choice([75, 100, 150, 200, 300]),
    )
    lsh_k: int = param(
        10,
        type=int,
        minimum=1,
        maximum=31,
        help="Hyperplanes per table K: the more, the fewer keys are sampled.",
        unit="bits",
        search=Search.choice([8, 9, 10, 11]),
    )
    min_matches: int = param(
        2,
        type=int,
        minimum=1,
        help="Tables in which a key must share the query's bucket to be attended, at most lsh_l.",
    )
    center: bool = param(
        True, type=bool, help="Subtract the mean of the context's keys before hashing."
    )
    init_offset: int = param(
        4,
        type=int,
        minimum=0,
        help="First keys of the context left out of that mean.",
        unit="tokens",
    )
    local_offset: int = param(
        64,
        type=int,
        minimum=0,
        help="Last keys of the context left out of that mean.",
        unit="tokens",
    )
    max_size: Size = param(
        0.25,
        type=Size,
        minimum=1,
        help="Most keys per query head and row; of more, an even sample is kept.",
        unit="tokens or fraction of the keys",
    )

    def __attrs_post_init__(self) -> None:
        if self.min_matches > self.lsh_l:
            raise ParameterError(
                self.name, "min_matches", self.min_matches, f"at most lsh_l, {self.lsh_l}"
            )

    def init_state(self, layer: LayerInfo) -> HashTables:
        """Draw the hyperplanes and make room for the codes of the key buffer."""
        return HashTables(layer, self.lsh_k, self.lsh_l)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Hash new keys, except while the context is being read."""
        state.append(key, start)

    def end_prefill(self, state: Any, inputs: Inputs) -> None:
        """Fix the mean of the keys and hash the context."""
        state.finish(inputs.key, self.mean(inputs) if self.center else None)

    def mean(self, inputs: Inputs) -> Tensor:
        """Mean of each sequence's keys between the offsets, or of all if none lie there."""
        key = inputs.key
        means = key.new_zeros((inputs.batch, *key.shape[1:2], key.shape[3]), dtype=torch.float32)
        firsts = inputs.allowed.first_host
        for index in range(inputs.batch):
            first = firsts[index if len(firsts) > 1 else 0]
            begin, end = first + self.init_offset, key.shape[2] - self.local_offset
            if begin >= end:
                begin, end = first, key.shape[2]
            for at in range(begin, end, MEAN_CHUNK):
                part = key[index, :, at : min(at + MEAN_CHUNK, end)]
                means[index] += part.float().sum(1) / (end - begin)
        return means

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the keys whose buckets the query shares and that ``previous`` does not hold."""
        budget = inputs.budget(self.max_size)
        if previous.is_full or not budget.capacity:
            return previous
        state: HashTables = inputs.state
        state.catch_up(inputs.key)
        found = [
            self.sample(part, taken, budget.capacity, budget.count)
            for part, taken in row_pieces(inputs, previous, BYTES_PER_KEY)
        ]
        mask = Mask.from_indices(
            inputs.shape,
            join_rows([indices for indices, *_ in found]),
            count=torch.cat([count for _, count, _ in found], dim=2),
            probability=join_rows([probability for *_, probability in found], 1.0),
        )
        return previous.union(mask, disjoint=True)

    def sample(
        self, inputs: Inputs, previous: Mask, capacity: int, limit: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, number and probabilities of the keys sampled in each row."""
        state: HashTables = inputs.state
        ops, allowed = inputs.ops, inputs.allowed
        codes = state.codes.first(inputs.capacity)
        counts = ops.collisions(ops.lsh_codes(inputs.query, state.planes), codes)
        chosen = previous.exclude_from(counts, fill=0) >= self.min_matches
        position = torch.arange(inputs.capacity, dtype=torch.int32, device=inputs.device)
        chosen &= position >= allowed.start.unsqueeze(-1)
        chosen &= position < allowed.stop.unsqueeze(-1)
        if allowed.keep is not None:
            chosen &= allowed.keep
        draw = ops.row_numbers(
            inputs.random, inputs.heads, inputs.query_position, allowed.first, draw=OVERFLOW_DRAW
        )
        draw = draw.expand(inputs.batch, -1, -1, -1)
        indices, kept, found = ops.pick(chosen, capacity, limit, draw)
        count_overflow(inputs, found > kept)
        cosine = ops.cosines(inputs.query, inputs.key, indices, state.center)
        probability = self.chance(cosine) * (kept / found.clamp(min=1)).unsqueeze(-1)
        return indices, kept, probability

    def chance(self, cosine: Tensor) -> Tensor:
        """Probability of at least ``min_matches`` collisions at an angle, float32.

        The binomial tail loses all digits in float32 where collisions are rare, hence float64.
        """
        tables = self.lsh_l
        share = 1 - torch.arccos(cosine.double()) / math.pi
        hit = (share**self.lsh_k).clamp(TINY, 1 - TINY)
        log_hit, log_miss = hit.log(), torch.log1p(-hit)
        fewer = torch.zeros_like(hit)
        for matches in range(1, self.min_matches):
            ways = math.lgamma(tables + 1) - math.lgamma(matches + 1)
            ways -= math.lgamma(tables - matches + 1)
            fewer += torch.exp(ways + matches * log_hit + (tables - matches) * log_miss)
        none = torch.expm1(tables * log_miss)
        return (-none - fewer).clamp(TINY, 1.0).to(torch.float32)

    def bytes_read(self, inputs: Inputs) -> int:
        """The codes of every key."""
        width = torch.empty((), dtype=code_dtype(self.lsh_k)).element_size()
        return inputs.batch * inputs.kv_heads * inputs.capacity * self.lsh_l * width


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return MagicPig
