"""Sink: the first tokens of the sequence, which softmax uses as a drain.

Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis: Efficient Streaming Language Models
with Attention Sinks, arXiv 2309.17453, section 3.

Differs from the paper in keeping the model's positions: nothing is evicted, so nothing is
re-indexed. Costs nothing per query and no memory.
"""

from typing import ClassVar

import attrs

from sah_core import Capabilities, Inputs, KeyRange, Mask, Masker, Search, Size, hookimpl, param


@attrs.frozen(kw_only=True)
class Sink(Masker):
    """Select the first ``sink_size`` real keys."""

    name: ClassVar[str] = "sink"
    capabilities: ClassVar[Capabilities] = Capabilities(position_only=True)

    sink_size: Size = param(
        128,
        type=Size,
        help="Keys kept at the start of the sequence, left padding not counted.",
        unit="tokens or fraction of the keys",
        search=Search.choice([4, 16, 32, 64, 128]),
    )

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the first real keys to ``previous``."""
        budget = inputs.budget(self.sink_size)
        first = inputs.allowed.first.view(-1, 1, 1)
        if budget.count is None:
            sink = KeyRange(first, first, budget.capacity, stop_offset=budget.capacity)
        else:
            sink = KeyRange(first, first + budget.count, budget.capacity)
        return previous | Mask.from_ranges(inputs.shape, [sink])


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Sink
