"""Strided: the recent keys, and every so many keys one of the past.

Rewon Child, Scott Gray, Alec Radford, Ilya Sutskever: Generating Long Sequences with Sparse
Transformers, arXiv 1904.10509, section 4.2 (strided attention), with both patterns in every head
(section 4.3, the merged head).

Differs from the paper in nothing that a mask can express. Costs nothing per query and no memory;
selects ``stride + keys / stride`` keys, fewest when the stride is the square root of the length.
"""

from pathlib import Path
from typing import ClassVar, Self

import attrs
import torch

from sah_core import Capabilities, Inputs, KeyRange, Mask, Masker, Search, hookimpl, param


@attrs.frozen(kw_only=True)
class Strided(Masker):
    """Select the last ``stride`` keys and every ``stride``-th key before the query."""

    name: ClassVar[str] = "strided"
    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)

    stride: int = param(
        128,
        minimum=1,
        help="Length of the window, and distance between the keys selected before it.",
        unit="tokens",
        search=Search.choice([16, 32, 64, 128, 256]),
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """A stride that fits many times into the checks' calls."""
        return cls(stride=9)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the window and the column of every query row to ``previous``."""
        position = inputs.query_position.unsqueeze(1)
        window = KeyRange(
            position, position, self.stride, start_offset=1 - self.stride, stop_offset=1
        )
        mask = previous | Mask.from_ranges(inputs.shape, [window])
        steps = (inputs.capacity - 1) // self.stride
        if not steps or mask.is_full:
            return mask
        back = torch.arange(1, steps + 1, dtype=torch.int32, device=inputs.device)
        keys = position.unsqueeze(-1) - back * self.stride
        # what lies before the sequence is left out by whoever reads the mask, as is all padding
        return mask | Mask.from_indices(inputs.shape, keys.clamp(min=-1))


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Strided
