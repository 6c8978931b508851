"""The scoring primitives that maskers use, in their reference form.

Maskers reach them through ``inputs.ops`` only. A backend may override some with faster forms that
give the same result; the tests of a backend run over its ops too.
"""

from sah_core.ops.heads import GROUP_REDUCTIONS, channels_of, reduce_groups, take_rows
from sah_core.ops.packing import (
    code_width,
    code_words,
    pack_codes,
    popcount,
    quantise,
    round_to_bits,
    unpack_codes,
)
from sah_core.ops.reference import REFERENCE, Ops
from sah_core.ops.signatures import apply_mlp

__all__ = [
    "GROUP_REDUCTIONS",
    "REFERENCE",
    "Ops",
    "apply_mlp",
    "channels_of",
    "code_width",
    "code_words",
    "pack_codes",
    "popcount",
    "quantise",
    "reduce_groups",
    "round_to_bits",
    "take_rows",
    "unpack_codes",
]
