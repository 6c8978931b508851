"""The one place that knows transformers' attention interface and cache internals.

Nothing of transformers is imported before a function here is called.
"""

from sah_core.compat.cache import (
    cached_tensors,
    check_cache,
    check_quantised,
    keeping_order,
    kind_of,
    make_cache,
    make_quantised_cache,
    repeated_cache,
    restore_cache,
    snapshot_cache,
    window_of,
    without_cached,
)
from sah_core.compat.capture import Capture
from sah_core.compat.interface import (
    IMPLEMENTATION,
    attention_configs,
    implementation_of,
    keep_softcap,
    own_attention,
    register,
    run_attention,
    set_implementation,
)
from sah_core.compat.limits import causal_limits, left_padding, padding_mask
from sah_core.compat.models import (
    attention_modules,
    cache_argument,
    caches_latents,
    check_is_model,
    check_supported,
    devices_of,
    input_device,
    layer_types,
    takes_tokens_back,
    text_config,
    vocabulary_size,
)

__all__ = [
    "IMPLEMENTATION",
    "Capture",
    "attention_configs",
    "attention_modules",
    "cache_argument",
    "cached_tensors",
    "caches_latents",
    "causal_limits",
    "check_cache",
    "check_is_model",
    "check_quantised",
    "check_supported",
    "devices_of",
    "implementation_of",
    "input_device",
    "keep_softcap",
    "keeping_order",
    "kind_of",
    "layer_types",
    "left_padding",
    "make_cache",
    "make_quantised_cache",
    "own_attention",
    "padding_mask",
    "register",
    "repeated_cache",
    "restore_cache",
    "run_attention",
    "set_implementation",
    "snapshot_cache",
    "takes_tokens_back",
    "text_config",
    "vocabulary_size",
    "window_of",
    "without_cached",
]
