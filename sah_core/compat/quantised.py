"""Caches of transformers that keep keys and values in few bits.

Imported on first use, since it imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, QuantizedCache, cache_utils

from sah_core.errors import UnsupportedError, one_line

QUANTISED_LAYER: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
"""The class of their layers."""


class QuantisedCache(QuantizedCache):  # type: ignore[misc]
    """transformers' `QuantizedCache` (after KIVI, arXiv 2402.02750), which names its mistakes.

    Args:
        config: The model's configuration.
        options: Its ``backend`` (``quanto`` unless given) and what the backend takes.

    Raises:
        ValueError: For a backend or a value that it does not take, and for a model that has other
            layers than those of full attention.
        TypeError: For an option that it does not know.
        ImportError: If its backend is not installed.
    """

    def __init__(self, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(config=config, **{"backend": "quanto", **options})

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in transformers.

        Raises:
            UnsupportedError: If the backend cannot quantise tensors of this shape.
        """
        try:
            made: tuple[Tensor, Tensor] = super().update(*args, **kwargs)
        except ValueError as error:
            raise UnsupportedError(
                what="a quantised cache with this cache_config", reason=one_line(str(error))
            ) from error
        return made


def check_options(options: Mapping[str, Any]) -> None:
    """Find what is wrong with the options of a quantised cache, as far as no model is needed.

    Raises:
        ValueError: As `QuantisedCache`, and so for the others.
    """
    QuantisedCache(LlamaConfig(num_hidden_layers=1), options)


def reorders() -> bool:
    """Whether the installed transformers takes the sequences of a quantised cache in another order,
    what is quantised included.
    """
    return "reorder_cache" in vars(cache_utils.QuantizedLayer)


def dequantised(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer: what its next `update` would return, without new tokens."""
    keys = layer._dequantize(layer._quantized_keys)
    values = layer._dequantize(layer._quantized_values)
    if hasattr(layer, "_apply_pending_reorder"):
        keys, values = layer._apply_pending_reorder(keys, values)
    if layer.keys.numel():
        keys = torch.cat([keys, layer.keys], dim=2)
        values = torch.cat([values, layer.values], dim=2)
    return keys, values
