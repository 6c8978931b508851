"""Causal: an intersection with what may be attended, as a step.

Ashish Vaswani and others: Attention Is All You Need, arXiv 1706.03762, section 3.2.3.

Backends apply the allowed set (causality, left padding, the model's window) to every mask anyway;
this step makes the intersection explicit where a mask leaves the framework, or where an earlier
step should be seen clipped. It is an AND: it only ever removes, and nothing after it can re-admit a
forbidden key.

Differs from the paper in nothing: it is the mask of its decoder, as a step. Costs O(selected) per
query and no memory.
"""

from typing import ClassVar

import attrs

from sah_core import Capabilities, Inputs, Mask, Masker, hookimpl


@attrs.frozen(kw_only=True)
class Causal(Masker):
    """Remove the keys that the query may not attend."""

    name: ClassVar[str] = "causal"
    capabilities: ClassVar[Capabilities] = Capabilities(restricts=True, position_only=True)

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Intersect ``previous`` with the allowed keys."""
        return previous & inputs.allowed


@hookimpl
def sah_masker() -> type[Masker]:
    """Register the masker."""
    return Causal
