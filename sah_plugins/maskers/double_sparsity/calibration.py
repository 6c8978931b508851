"""Calibration: which channels of a head its logits come from.

For every causal pair of a query i and a key j ≤ i of the calibration text, channel c adds
``|q_ic k_jc|`` to its score; the mean over all pairs is the ``E |q_c k_c|`` of the paper's section
3.1. Queries and keys are those that attention sees, rotary embedding applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import Inputs, param
from sah_core.artifacts import Material, ModelTool, Progress, watch_attention
from sah_plugins.artifacts.texts import check_length, token_windows

from .channels import SELECTIONS, write_channels


@attrs.frozen(kw_only=True)
class ChannelCalibration(ModelTool):
    """Rank the channels of every head of a model: JSON for a name in .json, else safetensors."""

    samples: int = param(256, minimum=1, help="Windows of text, evenly spread.")
    length: int = param(512, minimum=2, help="Tokens per window.", unit="tokens")
    per_kv_head: bool = param(
        False,
        help="Rank once per KV head, over its query heads together: labels take that much less.",
    )

    def make(self, material: Material, output: Path, progress: Progress) -> Mapping[str, Any]:
        """Read the windows, add up the channels, write the file."""
        check_length(material.model, self.length)
        windows = token_windows(material.tokenizer, material.texts, self.length, self.samples)
        sums = ChannelSums(per_kv_head=self.per_kv_head)
        for done, window in enumerate(windows, start=1):
            watch_attention(material.model, window.to(material.model.device), sums.add)
            progress(done, len(windows), f"{self.length} tokens each")
        orders = sums.orders()
        facts = {
            **material.metadata,
            "samples": str(len(windows)),
            "length": str(self.length),
            "heads": "kv" if self.per_kv_head else "query",
        }
        write_channels(output, orders, facts)
        return {**facts, "layers": len(orders["qk_proj"])}


class ChannelSums:
    """Sums of channel magnitudes over the windows read so far, float64.

    Args:
        per_kv_head: Add the query heads of a group up.
    """

    def __init__(self, *, per_kv_head: bool = False) -> None:
        self.per_kv_head = per_kv_head
        self.sums: dict[str, dict[int, Tensor]] = {selection: {} for selection in SELECTIONS}

    def add(self, inputs: Inputs) -> None:
        """Take in one layer of one window."""
        query = inputs.query.abs().double()
        key = inputs.key.abs().double()
        batch, heads, tokens, head_dim = query.shape
        grouped = query.view(batch, inputs.kv_heads, -1, tokens, head_dim)
        # the sum over keys j <= i of |k_jc|, so that every causal pair counts once
        earlier = key.cumsum(dim=2).unsqueeze(2)
        found = {
            "qk_proj": (grouped * earlier).sum(dim=(0, 3)),
            "q_proj": grouped.sum(dim=(0, 3)),
        }
        if self.per_kv_head:
            found = {name: total.sum(dim=1) for name, total in found.items()}
        else:
            found = {name: total.flatten(0, 1) for name, total in found.items()}
        found["k_proj"] = key.sum(dim=(0, 2))
        for name, total in found.items():
            layers = self.sums[name]
            layers[inputs.layer] = layers[inputs.layer] + total if inputs.layer in layers else total

    def orders(self) -> dict[str, dict[int, Tensor]]:
        """Channels by falling sum, of equal ones the lower first."""
        return {
            name: {
                layer: torch.sort(total, dim=-1, descending=True, stable=True).indices
                for layer, total in layers.items()
            }
            for name, layers in self.sums.items()
        }
