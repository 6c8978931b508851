"""The reference form of every scoring primitive."""

from __future__ import annotations

from typing import Any, Self

from sah_core.code_ops import CodeOps
from sah_core.ops.counts import CountOps
from sah_core.ops.draws import DrawOps
from sah_core.ops.labels import LabelOps
from sah_core.ops.moments import MomentOps
from sah_core.ops.pages import PageOps
from sah_core.ops.signatures import SignatureOps


class Ops(DrawOps, CountOps, MomentOps, PageOps, LabelOps, SignatureOps, CodeOps):
    """Reference forms in plain torch: right on every device, fast on the CPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: it holds no data, and a copy of a masker's state shares it."""
        return self


REFERENCE = Ops()
