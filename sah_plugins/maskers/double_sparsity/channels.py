"""The channel file: for every layer and head, all channels in falling order of importance.

Two forms with the same names, ``model.layers.<layer>.self_attn.<selection>`` with the selections
``qk_proj``, ``q_proj`` and ``k_proj``: the JSON of the method's authors, whose values are lists
``[heads][head_dim]``, and safetensors, whose values are integer tensors ``(heads, head_dim)``. The
heads are query heads or KV heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.errors import ArtifactError, UnsupportedError
from sah_core.state import LayerInfo
from sah_plugins.artifacts.files import read_safetensors, write_bytes, write_safetensors

SELECTIONS = ("qk_proj", "q_proj", "k_proj")
FORMAT = "double-sparsity-channels"

_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(qk_proj|q_proj|k_proj)")
_MAKE = "make one for the model with 'sah-bench artifacts calibrate double-sparsity'."


@attrs.frozen(eq=False)
class Channels:
    """What a channel file says.

    Attributes:
        path: The file.
        orders: By selection and layer, int64 ``(heads, head_dim)``.
    """

    path: str
    orders: Mapping[str, Mapping[int, Tensor]]

    def order(self, selection: str, layer: LayerInfo) -> Tensor:
        """The channels of one layer by falling importance, int64 ``(heads | kv_heads, head_dim)``.

        Raises:
            ArtifactError: If the file has no such layer.
            UnsupportedError: If it is of another model.
        """
        self.require(selection)
        layers = self.orders[selection]
        reason = self._misfit(layers, layer)
        if reason:
            what = f"channel file {self.path!r} with this model"
            raise UnsupportedError(what=what, reason=f"{reason}; {_MAKE}")
        if layer.index not in layers:
            reason = f"it holds no {selection} channels of layer {layer.index}; {_MAKE}"
            raise ArtifactError(self.path, reason)
        return layers[layer.index]

    def require(self, selection: str) -> None:
        """Check that there are channels of a selection.

        Raises:
            ArtifactError: If there are none.
        """
        if selection not in self.orders:
            there = " or ".join(self.orders)
            reason = f"it holds no {selection} channels; set channel_selection to {there}; {_MAKE}"
            raise ArtifactError(self.path, reason)

    @staticmethod
    def _misfit(layers: Mapping[int, Tensor], layer: LayerInfo) -> str | None:
        if max(layers) >= layer.count:
            return f"it has a layer {max(layers)}, but the model has {layer.count} layers"
        if layer.index not in layers:
            return None
        heads, head_dim = layers[layer.index].shape
        if heads not in (layer.heads, layer.kv_heads):
            return (
                f"its layer {layer.index} has {heads} heads, but the model's has {layer.heads} "
                f"query heads on {layer.kv_heads} KV heads"
            )
        if head_dim != layer.head_dim:
            return (
                f"its layer {layer.index} has heads of {head_dim} channels, but the model's are "
                f"of {layer.head_dim}"
            )
        return None


def read_channels(path: Path) -> Channels:
    """Read a channel file in either form.

    Raises:
        ArtifactError: If it is no channel file.
    """
    if path.suffix == ".safetensors":
        content: Mapping[str, Any] = read_safetensors(path)[0]
    else:
        content = _read_json(path)
    orders: dict[str, dict[int, Tensor]] = {}
    for name, value in content.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            order = _order(path, name, value)
            orders.setdefault(match[2], {})[int(match[1])] = order
    if not orders:
        raise ArtifactError(
            str(path), f"nothing in it is named like 'model.layers.0.self_attn.qk_proj'; {_MAKE}"
        )
    return Channels(str(path), orders)


def write_channels(
    path: Path, orders: Mapping[str, Mapping[int, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a channel file: JSON where the name says so, else safetensors.

    The JSON form has no place for metadata.
    """
    content = {
        f"model.layers.{layer}.self_attn.{selection}": order
        for selection in orders
        for layer, order in sorted(orders[selection].items())
    }
    if path.suffix == ".json":
        lists = {name: order.tolist() for name, order in content.items()}
        write_bytes(path, json.dumps(lists).encode())
    else:
        small = {name: order.to(torch.int16) for name, order in content.items()}
        write_safetensors(path, small, {"format": FORMAT, "version": "1", **metadata})


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"it is no whole JSON file ({error}). copy or make it again."
        raise ArtifactError(str(path), reason) from error
    if not isinstance(content, dict):
        raise ArtifactError(str(path), f"it is JSON, but no object of named lists; {_MAKE}")
    return content


def _order(path: Path, name: str, value: Any) -> Tensor:
    """Check that every head's list holds each channel once."""
    try:
        order = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(str(path), f"{name} is no table of integers; {_MAKE}") from error
    kind = order.dtype
    no_integers = kind.is_floating_point or kind.is_complex or kind == torch.bool
    if no_integers or order.dim() != 2:
        raise ArtifactError(
            str(path), f"{name} is no table of integers, heads by channels; {_MAKE}"
        )
    order = order.long()
    wanted = torch.arange(order.shape[1]).expand_as(order)
    wrong = (order.sort(dim=1).values != wanted).any(dim=1)
    if not order.numel() or bool(wrong.any()):
        head = int(wrong.nonzero()[0]) if order.numel() else 0
        raise ArtifactError(
            str(path),
            f"{name}, head {head}: expected each of the channels 0 to {order.shape[1] - 1} once; "
            f"{_MAKE}",
        )
    return order
