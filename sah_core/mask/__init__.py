"""The mask: which keys each query row attends, and with which probability each was selected.

A mask is a union of three kinds of parts: ranges (sink, window: two integers per row), selected
keys or pages (indices of a capacity known on the host, with a count on the device) and a dense
tensor (the reference form). Every leading dimension may be 1, which means that batch, heads or
query rows share the selection; ``heads`` may also be a divisor of the query heads, so that a
selection shared inside a KV group is stored once per KV head.

Nothing here waits for the device except the functions that say so.
"""

from sah_core.mask.mask import Mask
from sah_core.mask.parts import KeyRange, Selected, Shape, ranges_length, spread_heads

__all__ = ["KeyRange", "Mask", "Selected", "Shape", "ranges_length", "spread_heads"]
