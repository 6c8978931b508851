"""Oracle top-k: the keys with the highest true attention logits.

The upper bound that every top-k method approximates; for example Aditya Desai and others:
HashAttention: Semantic Sparsity for Faster Inference, arXiv 2412.14468, section 3 (the oracle of
their comparison).

Chooses among the allowed keys that are not selected yet, so its budget comes on top of sink and
window. Scores are computed in float32 and equal scores go to the lower index.

Differs from no paper: it is a definition. Reads every key once per query; keeps no state.
"""

from typing import ClassVar

import attrs
from torch import Tensor

from sah_core import Inputs, Mask, Masker, Search, Size, hookimpl, param
from sah_core.selection import add_best


@attrs.frozen(kw_only=True)
class OracleTopK(Masker):
    """Select the ``heavy_size`` keys of the highest logits, per query head."""

    name: ClassVar[str] = "oracle-top-k"

    heavy_size: Size = param(
        0.05,
        type=Size,
        help="Keys selected per query head, on top of what earlier steps selected.",
        unit="tokens or fraction of the keys",
        search=Search.choice([0.01, 0.02, 0.05, 0.1, 0.2]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the best keys that ``previous`` does not hold yet."""

        def score(part: Inputs) -> Tensor:
            return inputs.ops.logits(part.query, part.key, part.scaling, part.softcap)

        return add_best(inputs, previous, self.heavy_size, score, stateless=True)

    def bytes_read(self, inputs: Inputs) -> int:
        """Every key."""
        return inputs.key.numel() * inputs.key.element_size()


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return OracleTopK
