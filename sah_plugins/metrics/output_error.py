"""Output error: how far the attention output is from the dense one.

Per query row ``||o - o_dense|| / ||o_dense||``, the norm over all heads of the row. Dense attention
is computed from the same query, key and value, in float32, with scaling, softcap and learned sinks,
so that the error is of this call alone and not of what earlier layers did. Where the dense output
is 0, the absolute error counts.

Cost per measured row and layer: dense attention in float32.
"""

from typing import ClassVar

import attrs
from torch import Tensor

from sah_core import AttentionMetric, Inputs, Mask, hookimpl
from sah_core.measure import dense_output


@attrs.frozen(kw_only=True, eq=False)
class OutputError(AttentionMetric):
    """Relative error of the attention output, per layer and query row."""

    name: ClassVar[str] = "output-error"
    value_of_full: ClassVar[float] = 0.0

    def measure(self, inputs: Inputs, mask: Mask, output: Tensor) -> Tensor:
        """``||o - o_dense|| / ||o_dense||`` as ``(batch, 1, query_len)``."""
        dense = dense_output(inputs)
        error = (output.to(dense.dtype) - dense).square().sum((2, 3)).sqrt()
        norm = dense.square().sum((2, 3)).sqrt()
        return (error / norm.masked_fill(norm == 0, 1.0)).float().unsqueeze(1)


@hookimpl
def sah_metric() -> type[OutputError]:
    """Register the metric."""
    return OutputError
