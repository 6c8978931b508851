"""Dilated: a window whose keys lie a fixed distance apart.

Iz Beltagy, Matthew E. Peters, Arman Cohan: Longformer: The Long-Document Transformer, arXiv
2004.05150, section 3.1 (dilated sliding window), in its causal form.

Differs from the paper in using one dilation for all heads and layers; there it grows with the layer
and some heads have none. Costs nothing per query and no memory.
"""

from typing import ClassVar

import attrs
import torch

from sah_core import Capabilities, Inputs, Mask, Masker, Search, Size, hookimpl, param


@attrs.frozen(kw_only=True)
class Dilated(Masker):
    """Select the query's own key and every ``dilation``-th before it, ``window_size`` in all."""

    name: ClassVar[str] = "dilated"
    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)

    window_size: Size = param(
        128,
        type=Size,
        help="Keys selected per query, its own included.",
        unit="tokens or fraction of the keys",
        search=Search.choice([16, 32, 64, 128, 256]),
    )
    dilation: int = param(
        2,
        minimum=1,
        help="Distance between two selected keys; 1 is the plain window.",
        unit="tokens",
        search=Search.choice([1, 2, 4, 8]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the dilated window of every query row to ``previous``."""
        budget = inputs.budget(self.window_size)
        if not budget.capacity or previous.is_full:
            return previous
        back = torch.arange(budget.capacity, dtype=torch.int32, device=inputs.device)
        keys = inputs.query_position[:, None, :, None] - back * self.dilation
        # what lies before the sequence is left out by whoever reads the mask, as is all padding
        window = Mask.from_indices(inputs.shape, keys.clamp(min=-1), count=budget.count)
        return previous | window


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Dilated
