"""Local: a window of the most recent tokens.

Iz Beltagy, Matthew E. Peters, Arman Cohan: Longformer: The Long-Document Transformer, arXiv
2004.05150, section 3.1, in its causal form; with `sink` the mask of StreamingLLM (arXiv
2309.17453).

Differs from the paper in nothing that a mask can express. Costs nothing per query and no memory.
"""

from typing import ClassVar

import attrs

from sah_core import Capabilities, Inputs, KeyRange, Mask, Masker, Search, Size, hookimpl, param


@attrs.frozen(kw_only=True)
class Local(Masker):
    """Select the last ``window_size`` keys up to and including the query's own."""

    name: ClassVar[str] = "local"
    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)

    window_size: Size = param(
        128,
        type=Size,
        help="Most recent keys kept, the query's own included.",
        unit="tokens or fraction of the keys",
        search=Search.choice([16, 32, 64, 128, 256, 512]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the window of every query row to ``previous``."""
        budget = inputs.budget(self.window_size)
        if inputs.query_len == 1 and inputs.key_len is None and budget.count is None:
            # the one query is the last key, whose end lies on the device already
            end = inputs.length.view(1, 1, 1)
            last = KeyRange(end, end, budget.capacity, start_offset=-budget.capacity)
            return previous | Mask.from_ranges(inputs.shape, [last])
        position = inputs.query_position.unsqueeze(1)
        if budget.count is None:
            window = KeyRange(
                position,
                position,
                budget.capacity,
                start_offset=1 - budget.capacity,
                stop_offset=1,
            )
        else:
            window = KeyRange(position + 1 - budget.count, position, budget.capacity, stop_offset=1)
        return previous | Mask.from_ranges(inputs.shape, [window])


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Local
