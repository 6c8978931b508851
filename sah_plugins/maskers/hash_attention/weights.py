"""The weights of the hash functions: one small MLP per layer and head for queries, one for keys.

A safetensors file. For every layer, side (``query`` or ``key``) and linear layer of the MLP it has

    layers.<layer>.<side>.<n>.weight   (heads, inputs, outputs)
    layers.<layer>.<side>.<n>.bias     (heads, outputs)

applied as ``x @ weight + bias`` with SiLU between; the signs of the last outputs are the signature.
Heads are query heads, or KV heads for a key side that is shared inside the group. The metadata has
``format`` (``hash-attention-weights``), ``version``, ``layers``, ``heads``, ``key_heads``,
``head_dim``, ``bits`` and ``model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.errors import ArtifactError, UnsupportedError
from sah_core.state import LayerInfo
from sah_plugins.artifacts.files import read_safetensors, write_safetensors

FORMAT = "hash-attention-weights"
VERSION = "1"
SIDES = ("query", "key")

_NAME = re.compile(r"layers\.(\d+)\.(query|key)\.(\d+)\.(weight|bias)")
_MAKE = "make them for the model with 'sah-bench artifacts train hash-attention'."

Linear = tuple[Tensor, Tensor]
"""Weight ``(heads, inputs, outputs)`` and bias ``(heads, 1, outputs)``."""


@attrs.frozen(eq=False)
class HashFunctions:
    """The hash functions of one layer.

    Attributes:
        query: MLP of each head, layer by layer.
        key: Likewise.
    """

    query: tuple[Linear, ...]
    key: tuple[Linear, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> HashFunctions:
        """Itself: nothing writes to weights, and a copy of a masker's state shares them."""
        return self

    @property
    def key_heads(self) -> int:
        """Heads that keys have signatures for."""
        return self.key[0][0].shape[0]

    @property
    def head_dim(self) -> int:
        """Channels that go in."""
        return self.query[0][0].shape[1]

    @property
    def bits(self) -> int:
        """Signs that come out."""
        return self.query[-1][0].shape[2]

    def to(self, device: torch.device) -> HashFunctions:
        """The same on another device."""
        sides = (
            tuple((weight.to(device), bias.to(device)) for weight, bias in side)
            for side in (self.query, self.key)
        )
        return HashFunctions(*sides)


@attrs.frozen(eq=False)
class HashWeights:
    """What a weight file says.

    Attributes:
        path: The file.
        layers: Hash functions by layer, float32 on the CPU.
        metadata: As it stands in the file.
        placed: Copies on other devices, made when first asked for.
    """

    path: str
    layers: Mapping[int, HashFunctions]
    metadata: Mapping[str, str]
    placed: dict[tuple[int, torch.device], HashFunctions] = attrs.field(factory=dict)

    @property
    def bits(self) -> int:
        """Bits of a signature."""
        return next(iter(self.layers.values())).bits

    def require_bits(self, bits: int) -> None:
        """Check the number of bits.

        Raises:
            ArtifactError: If it is another one.
        """
        if self.bits != bits:
            reason = f"its signatures have {self.bits} bits; set hat_bits={self.bits}, or {_MAKE}"
            raise ArtifactError(self.path, reason)

    def functions(self, layer: LayerInfo) -> HashFunctions:
        """The hash functions of a layer, on its device.

        Raises:
            ArtifactError: If the file has no such layer.
            UnsupportedError: If it is of another model.
        """
        reason = self._misfit(layer)
        if reason:
            what = f"hash weights {self.path!r} with this model"
            raise UnsupportedError(what=what, reason=f"{reason}; {_MAKE}")
        if layer.index not in self.layers:
            raise ArtifactError(self.path, f"it has no layer {layer.index}; {_MAKE}")
        place = (layer.index, layer.device)
        if place not in self.placed:
            self.placed[place] = self.layers[layer.index].to(layer.device)
        return self.placed[place]

    def _misfit(self, layer: LayerInfo) -> str | None:
        if max(self.layers) >= layer.count:
            return f"it has a layer {max(self.layers)}, but the model has {layer.count} layers"
        if layer.index not in self.layers:
            return None
        functions = self.layers[layer.index]
        sides = {"query": functions.query[0][0].shape[0], "key": functions.key_heads}
        for side, heads in sides.items():
            if heads != layer.heads and (side == "query" or heads != layer.kv_heads):
                return (
                    f"its layer {layer.index} has {heads} {side} heads, but the model's has "
                    f"{layer.heads} query heads on {layer.kv_heads} KV heads"
                )
        if functions.head_dim != layer.head_dim:
            return (
                f"its layer {layer.index} takes heads of {functions.head_dim} channels, but the "
                f"model's are of {layer.head_dim}"
            )
        return None


def read_weights(path: Path) -> HashWeights:
    """Read a weight file.

    Raises:
        ArtifactError: If it is none, or is damaged.
    """
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise ArtifactError(
            str(path),
            "a pickle may run code and is not loaded; convert it with 'sah-bench artifacts convert "
            f"hash-attention {path} --output {path.with_suffix('.safetensors').name}'.",
        )
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"{metadata.get('format', 'no format')} {metadata.get('version', '')}".strip()
        reason = f"its metadata says {found}, expected {FORMAT} {VERSION}; {_MAKE}"
        raise ArtifactError(str(path), reason)
    found_layers: dict[int, dict[str, dict[int, dict[str, Tensor]]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ArtifactError(str(path), f"nothing is known of its tensor {name!r}; {_MAKE}")
        sides = found_layers.setdefault(int(match[1]), {})
        sides.setdefault(match[2], {}).setdefault(int(match[3]), {})[match[4]] = tensor
    layers = {
        layer: checked_functions(
            path,
            layer,
            {
                side: [
                    (linear.get("weight"), linear.get("bias"))
                    for _, linear in sorted(sides.get(side, {}).items())
                ]
                for side in SIDES
            },
        )
        for layer, sides in sorted(found_layers.items())
    }
    return checked_weights(path, layers, metadata)


def checked_weights(
    path: Path, layers: Mapping[int, HashFunctions], metadata: Mapping[str, str]
) -> HashWeights:
    """Weights of which every layer has signatures of the same length.

    Raises:
        ArtifactError: If there is no layer, or the lengths differ.
    """
    if not layers:
        raise ArtifactError(str(path), f"it has no layers; {_MAKE}")
    bits = {functions.bits for functions in layers.values()}
    if len(bits) > 1:
        raise ArtifactError(
            str(path), f"its layers have signatures of {sorted(bits)} bits; {_MAKE}"
        )
    return HashWeights(str(path), layers, metadata)


def checked_functions(
    path: Path, layer: int, sides: Mapping[str, Sequence[tuple[Tensor | None, Tensor | None]]]
) -> HashFunctions:
    """The hash functions of a layer, from matrices and biases that need not fit together.

    Raises:
        ArtifactError: If they do not.
    """

    def error(reason: str) -> ArtifactError:
        return ArtifactError(str(path), f"layer {layer}: {reason}; {_MAKE}")

    made: dict[str, tuple[Linear, ...]] = {}
    for side in SIDES:
        mlp = []
        width = None
        for index, (weight, bias) in enumerate(sides.get(side, ())):
            if weight is None or bias is None:
                raise error(
                    f"{side} matrix {index} lacks its {'bias' if bias is None else 'matrix'}"
                )
            if not (weight.is_floating_point() and bias.is_floating_point()) or weight.dim() != 3:
                raise error(f"{side} matrix {index} is no float tensor (heads, inputs, outputs)")
            heads, inputs, outputs = weight.shape
            if not weight.numel():
                raise error(f"{side} matrix {index} of shape {tuple(weight.shape)} is empty")
            if bias.numel() != heads * outputs or (width is not None and width != (heads, inputs)):
                raise error(f"{side} matrix {index} of shape {tuple(weight.shape)} does not fit")
            if not bool(weight.isfinite().all()) or not bool(bias.isfinite().all()):
                raise error(f"{side} matrix {index} has values that are not finite")
            mlp.append((weight.float(), bias.float().reshape(heads, 1, outputs)))
            width = (heads, outputs)
        if not mlp:
            raise error(f"there are no {side} matrices")
        made[side] = tuple(mlp)
    functions = HashFunctions(made["query"], made["key"])
    (query_in, query_out), (key_in, key_out) = (
        (side[0][0].shape[1], side[-1][0].shape[2]) for side in (functions.query, functions.key)
    )
    if (query_in, query_out) != (key_in, key_out):
        raise error(
            f"queries go from {query_in} channels to {query_out} bits, "
            f"keys from {key_in} to {key_out}"
        )
    return functions


def write_weights(
    path: Path, layers: Mapping[int, HashFunctions], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write a weight file; what follows from the tensors is added to the metadata.

    Returns:
        The metadata that was written.
    """
    tensors = {}
    for layer, functions in layers.items():
        for side, mlp in (("query", functions.query), ("key", functions.key)):
            for index, (weight, bias) in enumerate(mlp):
                name = f"layers.{layer}.{side}.{index}"
                tensors[f"{name}.weight"] = weight
                tensors[f"{name}.bias"] = bias.squeeze(1)
    first = next(iter(layers.values()))
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "layers": str(len(layers)),
        "heads": str(first.query[0][0].shape[0]),
        "key_heads": str(first.key_heads),
        "head_dim": str(first.head_dim),
        "bits": str(first.bits),
        **metadata,
    }
    write_safetensors(path, tensors, facts)
    return facts
