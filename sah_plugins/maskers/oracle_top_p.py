"""Oracle top-p: the fewest keys that hold a share of the true attention mass.

The upper bound that every top-p method approximates; for example Chaofan Lin, Jiaming Tang, Shuo
Yang, Hanshuo Wang, Tian Tang, Boyu Tian, Ion Stoica, Song Han, Mingyu Gao: Twilight: Adaptive
Attention Sparsity with Hierarchical Top-p Pruning, arXiv 2502.02770, section 3 (oracle top-p).

Chooses among the allowed keys that are not selected yet, and its share is one of their mass alone:
the mass of sink and window does not count. Logits are computed in float32 and summed in float64;
equal logits go to the lower index.

Differs from the paper in taking the share of the residual mass, as above. Reads every key once per
query; keeps no state.
"""

from typing import ClassVar

import attrs
import torch

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.selection import count_overflow, join_rows, residual_scores, row_pieces

BYTES_PER_KEY = 32
"""Of one query row and head: a float32 logit, its float64 mass, and their order."""


@attrs.frozen(kw_only=True)
class OracleTopP(Masker):
    """Select the smallest set of keys whose attention mass reaches ``top_p`` of what is left."""

    name: ClassVar[str] = "oracle-top-p"
    capabilities: ClassVar[Capabilities] = Capabilities(unbounded=True)

    top_p: float = param(
        0.9,
        type=float,
        minimum=0.0,
        maximum=1.0,
        exclusive_minimum=True,
        help="Share of the attention mass of the keys not selected yet; 1 selects them all.",
        search=Search.uniform(0.5, 0.99),
    )
    max_size: Size | None = param(
        None,
        type=Size,
        help="Most keys per query head; rows that need more keep their best. None: no limit.",
        unit="tokens or fraction of the keys",
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best keys that ``previous`` does not hold yet, as many as the mass needs."""
        if previous.is_full:
            return previous
        limit = None if self.max_size is None else inputs.budget(self.max_size)
        capacity = None if inputs.key_len is not None else inputs.capacity
        if limit is not None:
            capacity = limit.capacity
        found = []
        for part, taken in row_pieces(inputs, previous, BYTES_PER_KEY):
            scores = inputs.ops.logits(part.query, part.key, part.scaling, part.softcap)
            indices, chosen, overflow = inputs.ops.masked_topp(
                residual_scores(scores, part, taken),
                self.top_p,
                capacity,
                start=part.allowed.start,
                stop=part.allowed.stop,
                taken=taken.ranges,
            )
            if limit is not None:
                if limit.count is not None:
                    slot = torch.arange(indices.shape[-1], device=indices.device)
                    indices = torch.where(slot < limit.count.unsqueeze(-1), indices, -1)
                    overflow = overflow | (chosen > limit.count)
                count_overflow(inputs, overflow)
            found.append(indices)
        return previous.union(Mask.from_indices(inputs.shape, join_rows(found)), disjoint=True)

    def bytes_read(self, inputs: Inputs) -> int:
        """Every key."""
        return inputs.key.numel() * inputs.key.element_size()


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return OracleTopP
