"""One attention call of a running request: state, mask, backend.

A `Session` belongs to one pipeline on one model. It knows nothing of any model library:
`sah_core.patching` feeds it the tensors of each layer.
"""

from sah_core.attention.backends import Fallback
from sah_core.attention.session import Session, check_layers, infer_phase
from sah_core.attention.states import LayerState, Snapshot, cannot_reorder
from sah_core.attention.steps import build_mask, context_only, layer_info, with_step

__all__ = [
    "Fallback",
    "LayerState",
    "Session",
    "Snapshot",
    "build_mask",
    "cannot_reorder",
    "check_layers",
    "context_only",
    "infer_phase",
    "layer_info",
    "with_step",
]
