"""Conversion of the authors' weights, a pickle, without running what is in it.

The pickle is ``{layer: {"query_matrix": [...], "query_bias": [...], "key_matrix": [...],
"key_bias": [...]}}``, one tensor per linear layer of the MLPs: matrices ``(heads, inputs,
outputs)``, biases ``(heads, outputs)`` or ``(heads, 1, outputs)``; the last bias may be missing.

A pickle is a program that calls whatever it names. Here every name leads to a recorder of this
module or to nothing: tensors and arrays are rebuilt from the recorded bytes and numbers, and a
pickle that names anything else is refused before it can call it.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import param
from sah_core.artifacts import ConvertTool
from sah_core.errors import ArtifactError

from .weights import HashFunctions, checked_functions, checked_weights, write_weights

_LAYER = re.compile("[0-9]{1,9}")

_NO_CODE = "only tensors, arrays and containers are allowed; nothing in the file was run."


@attrs.frozen(kw_only=True)
class PickleConversion(ConvertTool):
    """Turn the authors' pickle of hash weights into safetensors; no code in it is run."""

    model: str = param("", type=str, help="What model the weights are of, for the metadata.")

    def make(self, source: Path, output: Path) -> Mapping[str, Any]:
        """Read the pickle, check it and write the weights."""
        layers = layers_of(source, load_tensors(source))
        weights = checked_weights(source, layers, {})
        return write_weights(output, weights.layers, {"model": self.model or source.stem})


def layers_of(path: Path, content: Any) -> dict[int, HashFunctions]:
    """The hash functions in what the authors' pickle holds.

    Raises:
        ArtifactError: If it holds something else.
    """
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(str(path), "it holds no weights by layer")
    layers = {}
    for name, parts in content.items():
        if not _LAYER.fullmatch(str(name)) or int(name) in layers:
            raise ArtifactError(str(path), f"{name!r} is no layer number, or one that comes twice")
        layer = int(name)
        if not isinstance(parts, Mapping):
            raise ArtifactError(str(path), f"layer {layer} holds no matrices by name")
        sides = {side: _pairs(path, layer, side, parts) for side in ("query", "key")}
        layers[layer] = checked_functions(path, layer, sides)
    return dict(sorted(layers.items()))


def _pairs(
    path: Path, layer: int, side: str, parts: Mapping[Any, Any]
) -> list[tuple[Tensor | None, Tensor | None]]:
    matrices, biases = (
        _tensors(path, layer, f"{side}_{what}", parts) for what in ("matrix", "bias")
    )
    if len(biases) == len(matrices) - 1:
        last = matrices[-1]
        biases.append(torch.zeros(last.shape[0], last.shape[-1]))
    if len(biases) != len(matrices):
        reason = f"layer {layer} has {len(matrices)} {side} matrices and {len(biases)} biases"
        raise ArtifactError(str(path), reason)
    return list(zip(matrices, biases, strict=True))


def _tensors(path: Path, layer: int, name: str, parts: Mapping[Any, Any]) -> list[Tensor]:
    found = parts.get(name)
    if isinstance(found, Tensor):
        found = [found]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ArtifactError(str(path), f"layer {layer} has no {name}")
    tensors = [t for t in found if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors):
        raise ArtifactError(str(path), f"{name} of layer {layer} holds something else than tensors")
    return [t.detach() for t in tensors]


def load_tensors(path: Path) -> Any:
    """Containers of tensors from a pickle, or from what ``torch.save`` wrote.

    Raises:
        ArtifactError: If the file holds anything else, or is cut short.
    """
    try:
        if zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True)
        with path.open("rb") as file:
            return _finished(_Unpickler(file).load())
    except _Forbidden as error:
        reason = f"the pickle names {error}, which is no tensor: {_NO_CODE}"
        raise ArtifactError(str(path), reason) from error
    except pickle.UnpicklingError as error:
        # torch's own reader says in many lines what it does not allow
        line = str(error).partition("\n")[0]
        foreign = "Unsupported" in str(error) or "GLOBAL" in str(error)
        reason = f"it holds something else: {_NO_CODE}" if foreign else f"it is damaged ({line})"
        raise ArtifactError(str(path), reason) from error
    except Exception as error:  # a damaged pickle raises anything
        reason = f"it is no whole pickle ({type(error).__name__}: {error})"
        raise ArtifactError(str(path), reason) from error


class _Forbidden(Exception):
    """A pickle names what it may not."""


class _Array:
    """Records what a NumPy array is rebuilt from."""

    def __init__(self, *arguments: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)

    def tensor(self) -> Tensor:
        """The array as a tensor."""
        import numpy

        _, shape, dtype, is_fortran, data = self.state
        kind = numpy.dtype(dtype.letters).newbyteorder(dtype.order)
        array = numpy.frombuffer(bytes(data), dtype=kind)
        array = array.reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))


class _Dtype:
    """Records a NumPy dtype."""

    def __init__(self, letters: Any, *arguments: Any) -> None:
        if not isinstance(letters, str) or letters[:1] not in ("f", "i", "u", "b"):
            raise _Forbidden(f"the NumPy type {letters!r}")
        self.letters = letters
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">", "="):
            self.order = state[1]


class _Recorder:
    """Stands for a callable of the pickle; calling it records, and nothing can be set on it."""

    __slots__ = ("call",)
    call: Any

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Forbidden(f"the attribute {name!r}")


def _storage(data: Any) -> Any:
    """The storage that torch wrote inside a pickle; read as weights, never as a program."""
    return torch.load(io.BytesIO(bytes(data)), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """A tensor from its storage; a view past its end is refused."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _Forbidden("a tensor without a storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min([offset, *size, *stride]) < 0 or (0 not in size and last >= storage._size()):
        raise pickle.UnpicklingError("a tensor lies outside its storage")
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, tuple(size), tuple(stride)).clone()


def _parameter(data: Any, *others: Any) -> Any:
    return data


def _encode(text: Any, *others: Any) -> bytes:
    if not isinstance(text, str):
        raise _Forbidden("text that is none")
    return text.encode("latin1")


_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")

_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): None,
    **{(module, "_reconstruct"): _Array for module in _ARRAY_MODULES},
}


class _Unpickler(pickle.Unpickler):
    """Leads every name of a pickle to a recorder."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Forbidden(f"{module}.{name}")
        return _Recorder(_ALLOWED[module, name])

    def persistent_load(self, pid: Any) -> Any:
        raise _Forbidden("objects outside of it")


def _finished(value: Any) -> Any:
    """Containers with every recorded array made a tensor."""
    if isinstance(value, _Array):
        return value.tensor()
    if isinstance(value, Mapping):
        return {key: _finished(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finished(item) for item in value]
    return value
