"""Mass: the share of the dense attention weights that the selected keys hold.

Per query row and head, the sum of the dense softmax weights of the keys that the mask selects, each
key once, whatever its probability. Learned sinks are left out of the denominator: they are no keys,
no mask can select them, and 1 is to mean that nothing was lost.

Cost per measured row and layer: the logits of all keys, in float32.
"""

from typing import ClassVar

import attrs
from torch import Tensor

from sah_core import AttentionMetric, Inputs, Mask, hookimpl
from sah_core.measure import dense_weights


@attrs.frozen(kw_only=True, eq=False)
class Mass(AttentionMetric):
    """Share of the dense attention mass that is selected, per layer, query row and head."""

    name: ClassVar[str] = "mass"
    value_of_full: ClassVar[float] = 1.0

    def measure(self, inputs: Inputs, mask: Mask, output: Tensor) -> Tensor:
        """Sum of the selected weights as ``(batch, heads, query_len)``."""
        selected = mask.to_dense().to(inputs.device) > 0
        return (dense_weights(inputs, sinks=False) * selected).sum(-1).float()


@hookimpl
def sah_metric() -> type[Mass]:
    """Register the metric."""
    return Mass
