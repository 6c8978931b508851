"""The reference form of every scoring primitive."""

from __future__ import annotations

from sah_core.code_ops import CodeOps
from sah_core.ops.counts import CountOps
from sah_core.ops.draws import DrawOps
from sah_core.ops.labels import LabelOps
from sah_core.ops.moments import MomentOps
from sah_core.ops.pages import PageOps
from sah_core.ops.signatures import SignatureOps


class Ops(DrawOps, CountOps, MomentOps, PageOps, LabelOps, SignatureOps, CodeOps):
    """Reference forms in plain torch: right on every device, fast on the CPU."""


REFERENCE = Ops()
