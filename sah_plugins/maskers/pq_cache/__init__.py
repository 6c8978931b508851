"""PQCache: keys ranked by logits from a product quantiser's codes.

Hailin Zhang, Xiaodong Ji, Yilin Chen, Fangcheng Fu, Xupeng Miao, Xiaonan Nie, Weipeng Chen, Bin
Cui: PQCache: Product Quantization-based KVCache for Long Context LLM Inference, arXiv 2407.12820,
section 3.

Keys are cut into ``pq_group_factor`` sub-vectors. When the context is complete, the sub-vectors of
each KV head are clustered by k-means into ``2^pq_bits`` centroids; from then on a key is the
numbers of its nearest centroids, and its logit is estimated by adding up as many entries of small
tables. The query heads of a KV group share a choice: softmax per head over the keys to choose from,
summed over the group; the best keys are attended.

Differs from the paper in encoding keys as they come instead of when they leave the window, which
selects the same as long as a window step comes first; in keeping sinks and windows out of this step
(``init_offset`` only keeps the first keys out of the clustering); in ``group_reduction``; and in a
context of no more keys than centroids, whose keys are the centroids, those of the keys that follow
included until there are 2^b. Rows of a sparse prefill use these centroids too, since the others
depend on later keys.

Reads ``pq_group_factor`` bytes per key and query, and keeps as much per token and KV head.
"""

from __future__ import annotations

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
from sah_core.ops import GROUP_REDUCTIONS, reduce_groups
from sah_core.selection import add_best
from sah_core.state import LayerInfo
from sah_plugins.maskers.pq_cache.clustering import Clusters
from sah_plugins.maskers.pq_cache.codes import Codebook, Codes

METRICS = ("euclidean", "ip")


@attrs.frozen(kw_only=True)
class PQCache(Masker):
    """Select the keys of the highest logits as a product quantiser estimates them."""

    name: ClassVar[str] = "pq-cache"
    capabilities: ClassVar[Capabilities] = Capabilities(keys_only=True)

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected per row, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.02, 0.05, 0.1, 0.2]),
    )
    pq_group_factor: int = param(
        2,
        type=int,
        minimum=1,
        help="Sub-vectors that a key is cut into, a divisor of head_dim.",
        search=Search.choice([2, 4, 8]),
    )
    pq_bits: int = param(
        6,
        type=int,
        minimum=1,
        maximum=8,
        help="Bits per code: 2^bits centroids per sub-vector.",
        unit="bits",
        search=Search.choice([4, 6, 8]),
    )
    kmeans_iter: int = param(
        10, type=int, minimum=0, help="Most rounds of k-means.", search=Search.choice([5, 10, 20])
    )
    init_offset: int = param(
        32,
        type=int,
        minimum=0,
        help="First keys left out of the clustering: the sinks, which earlier steps select.",
        unit="tokens",
    )
    metric: str = param(
        "euclidean",
        type=str,
        choices=METRICS,
        help="What centroids are near in: euclidean distance, or ip, the inner product.",
    )
    group_reduction: str = param(
        "sum",
        type=str,
        choices=GROUP_REDUCTIONS,
        help="How query heads share a choice in their KV group: none (own choice), or the sum, "
        "mean or max of their estimated weights.",
    )

    def init_state(self, layer: LayerInfo) -> Codes:
        """Make room for the codes of the key buffer.

        Raises:
            ParameterError: If head_dim cannot be cut into so many sub-vectors.
        """
        if layer.head_dim % self.pq_group_factor:
            raise ParameterError(
                self.name,
                "pq_group_factor",
                self.pq_group_factor,
                f"a divisor of the model's head_dim, {layer.head_dim}",
            )
        return Codes(layer, self.pq_group_factor, self.pq_bits, self.metric)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Encode new keys, except while the context is being read."""
        state.append(key, start)

    def end_prefill(self, state: Any, inputs: Inputs) -> None:
        """Cluster the context, one sequence after the other, and encode it."""
        codes: Codes = state
        key, firsts = inputs.key, inputs.allowed.first_host
        book = Codebook(
            centroids=codes.book.centroids.clone(),
            reach=codes.book.reach.clone(),
            clustered=codes.book.clustered.clone(),
            open=False,
        )
        is_open = False
        for index in range(inputs.batch):
            first = firsts[index if len(firsts) > 1 else 0]
            skip = self.init_offset
            if key.shape[2] - first - skip <= codes.size:
                skip = 0
            if key.shape[2] - first - skip <= codes.size:
                is_open = True
                continue
            clusters = Clusters(codes, key[index, :, first + skip :])
            if clusters.reach is not None:
                book.reach[index] = clusters.reach
            book.centroids[index, :, :, :-1] = clusters.centroids(
                self.kmeans_iter, inputs.random, skip
            )
            book.clustered[index] = True
        codes.finish(key, attrs.evolve(book, open=is_open))

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best keys that ``previous`` does not hold yet."""
        inputs.state.catch_up(inputs.key)
        if self.group_reduction == "none":
            return add_best(inputs, previous, self.heavy_size, self.logits)

        def share(logits: Tensor) -> Tensor:
            # a row without candidates has no softmax
            weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0)
            return reduce_groups(weights, inputs.kv_heads, self.group_reduction)

        return add_best(inputs, previous, self.heavy_size, self.logits, share)

    def logits(self, inputs: Inputs) -> Tensor:
        """Estimated logits, float32 ``(batch, heads, query_len, capacity)``."""
        state: Codes = inputs.state
        parts, kv_heads = self.pq_group_factor, inputs.kv_heads
        # a sub-vector is a head of its own, and its centroids are the keys
        rows = inputs.query.unflatten(3, (parts, -1)).unflatten(1, (kv_heads, -1))
        rows = rows.permute(0, 1, 4, 2, 3, 5)
        centroids = state.book.entries[..., : rows.shape[5]].flatten(1, 2)
        tables = inputs.ops.logits(rows.flatten(1, 3), centroids, 1.0)
        tables = tables.view(*rows.shape[:5], -1).permute(0, 1, 3, 4, 2, 5).flatten(1, 2)
        scores = inputs.ops.table_scores(tables, state.codes.first(inputs.capacity))
        scores.mul_(inputs.scaling)
        if inputs.softcap is not None:
            scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
        return scores

    def bytes_read(self, inputs: Inputs) -> int:
        """The codes of every key."""
        return inputs.batch * inputs.kv_heads * inputs.capacity * self.pq_group_factor


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return PQCache
