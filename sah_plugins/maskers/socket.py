"""SOCKET: keys ranked by how likely a softly hashed query would share their buckets.

Sahil Joshi, Agniva Chowdhury, Wyatt Bellinger, Amar Kanakamedala, Ekam Singh, Hoang Anh Duy Le,
Aditya Desai, Anshumali Shrivastava: SOCKET: SOft Collision Kernel EsTimator for Sparse Attention,
arXiv 2602.06283, sections 4.1 and 4.2.

Keys are hashed into ``lsh_l`` tables of ``2^lsh_k`` buckets by the signs of random projections. The
query falls into no single bucket: it has a probability for each, a softmax over the corners of the
hypercube, ``P(c) ~ exp(sum_p c_p tanh(q . w_p) / (sqrt(d) tau))`` with c in {-1, 1}^K. A key scores
the sum of the probabilities of its own buckets times the norm of its value, and the best are
attended.

Differs from the paper in ``group_reduction``, with which the query heads of a KV group share a
choice, in ``value_aware``, which takes the norms out, and in choosing among the keys that earlier
steps left. The softmax over the corners is the product of one sigmoid per bit, which is what is
computed.

Reads ``lsh_l`` codes of ``lsh_k`` bits and a float32 norm per key and query, and keeps as much: 124
bytes per token and KV head with the defaults.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from sah_core import Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.code_ops import code_dtype, hyperplanes
from sah_core.mask import spread_heads
from sah_core.ops import GROUP_REDUCTIONS, Ops, reduce_groups
from sah_core.selection import add_best
from sah_core.state import LayerInfo, TokenBuffer


class Buckets:
    """The state of one layer: what its keys are ranked by.

    Attributes:
        planes: float32 ``(bits, tables, head_dim)``.
        codes: ``(batch, kv_heads, tables, keys)``.
        norms: Norms of the values, float32 ``(batch, kv_heads, keys)``.
    """

    def __init__(self, layer: LayerInfo, bits: int, tables: int) -> None:
        self.ops: Ops = layer.ops
        self.planes = hyperplanes(layer.random, bits, tables, layer.head_dim, layer.device)
        lead = (layer.batch, layer.kv_heads)
        shape = (*lead, tables, layer.capacity)
        self.codes = TokenBuffer(shape, code_dtype(bits), layer.device, dim=3)
        self.norms = TokenBuffer((*lead, layer.capacity), torch.float32, layer.device)

    def append(self, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Write the codes and the norms of new keys."""
        self.codes.write(self.ops.lsh_codes(key, self.planes), start)
        norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
        self.norms.write(norms, start)

    def reserve(self, keys: int) -> None:
        """Make room for so many keys."""
        self.codes.reserve(keys)
        self.norms.reserve(keys)

    def reorder(self, rows: Tensor) -> None:
        """Take the sequences in another order."""
        self.codes.reorder(rows)
        self.norms.reorder(rows)

    def snapshot(self) -> None:
        """Nothing: later keys change nothing of earlier ones."""

    def restore(self, token: None) -> None:
        """Nothing: keys after the snapshot are overwritten by those that come."""


@attrs.frozen(kw_only=True)
class Socket(Masker):
    """Select the keys of the highest soft collision score times value norm."""

    name: ClassVar[str] = "socket"

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected per row, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.02, 0.05, 0.1, 0.2]),
    )
    lsh_l: int = param(
        60,
        type=int,
        minimum=1,
        maximum=4096,
        help="Hash tables L: the more, the finer the ranking.",
        search=Search.choice([30, 50, 60, 80]),
    )
    lsh_k: int = param(
        10,
        type=int,
        minimum=1,
        maximum=16,
        help="Hyperplanes per table K: the more, the sharper the buckets.",
        unit="bits",
        search=Search.choice([6, 8, 10, 12]),
    )
    tau: float = param(
        0.4,
        type=float,
        minimum=0.0,
        exclusive_minimum=True,
        help="Temperature of the query's buckets: near 0 it has one bucket per table.",
        search=Search.choice([0.2, 0.3, 0.4, 0.6]),
    )
    value_aware: bool = param(
        True, type=bool, help="Weigh the score of a key by the norm of its value."
    )
    group_reduction: str = param(
        "none",
        type=str,
        choices=GROUP_REDUCTIONS,
        help="How query heads share a choice in their KV group: none (own choice), sum, mean, max.",
    )

    def init_state(self, layer: LayerInfo) -> Buckets:
        """Draw the hyperplanes and make room for the codes of the key buffer."""
        return Buckets(layer, self.lsh_k, self.lsh_l)

    def append(self, state: Any, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Hash new keys."""
        state.append(key, value, start)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best keys that ``previous`` does not hold yet."""
        return add_best(inputs, previous, self.heavy_size, self.scores)

    def scores(self, inputs: Inputs) -> Tensor:
        """Soft collisions times value norms, float32 ``(batch, heads | kv_heads, query_len,
        capacity)``.
        """
        state: Buckets = inputs.state
        codes = state.codes.first(inputs.capacity)
        soft = inputs.ops.soft_collisions(self.gains(inputs, state.planes), codes)
        shared = reduce_groups(soft, inputs.kv_heads, self.group_reduction)
        if not self.value_aware:
            return shared
        norms = state.norms.first(inputs.capacity)
        return shared * spread_heads(norms, shared.shape[1]).unsqueeze(2)

    def gains(self, inputs: Inputs, planes: Tensor) -> Tensor:
        """Log-odds of every bit of the query's code, float32 ``(batch, heads, query_len, tables,
        bits)``.
        """
        normals = planes.flatten(0, 1).expand(inputs.batch, inputs.kv_heads, -1, -1)
        # a hyperplane scores as a key does, and a cap of 1 is the tanh
        side = inputs.ops.logits(inputs.query, normals, 1.0, softcap=1.0)
        odds = side * (2 / (math.sqrt(inputs.query.shape[3]) * self.tau))
        return odds.view(*odds.shape[:3], *planes.shape[:2]).transpose(3, 4)

    def bytes_read(self, inputs: Inputs) -> int:
        """The codes and the norms of every key."""
        width = torch.empty((), dtype=code_dtype(self.lsh_k)).element_size()
        per_key = self.lsh_l * width + 4 * self.value_aware
        return inputs.batch * inputs.kv_heads * inputs.capacity * per_key


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Socket
