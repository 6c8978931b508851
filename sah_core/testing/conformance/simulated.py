"""A device that is simulated on the CPU: its tensors are computed for real and watched.

A tensor of this device says that it lives on ``meta``, so that whoever asks for the device takes
the path of an accelerator, and holds its values in a tensor of the CPU. What would wait for a real
device, copy to it, mix devices there or take much memory is seen on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sah_core.ops import Ops

DEVICE = torch.device("meta")

_READS = {
    "_local_scalar_dense": "reads a number from the device (item(), int(), bool(), a slice)",
    "is_nonzero": "reads a truth value from the device",
    "equal": "compares tensors on the host (torch.equal)",
    "nonzero": "asks how many entries are not zero (nonzero(), where() of one argument)",
    "masked_select": "selects by a boolean mask, whose length the host must know",
    "bincount": "counts bins, whose number the host must know",
}
_READS |= dict.fromkeys(
    ("_unique", "_unique2", "unique_dim", "unique_consecutive"),
    "asks for the distinct values (unique())",
)


class _Far(Tensor):
    """A tensor of the simulated device."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> _Far:
        made: _Far = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"far {self.near!r}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError("a tensor of the simulated device was used outside of it")


def far(tensor: Tensor) -> Tensor:
    """The tensor on the simulated device; the values are shared."""
    return tensor if isinstance(tensor, _Far) else _Far(tensor)


def near(tensor: Tensor) -> Tensor:
    """The values of a tensor of the simulated device."""
    return tensor.near if isinstance(tensor, _Far) else tensor


class Simulated:
    """The simulated device, as a context in which its tensors can be used.

    Attributes:
        waits: What made the host wait while it was watched, in words.
        strays: Operations that mixed its tensors with tensors of the host.
        largest: Bytes of the largest tensor made while it was watched.
        ops: The reference ops, which may wait: those of a device do not, and are tested with it.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.strays: list[str] = []
        self.largest = 0
        self.ops = _ops_of(self)
        self._watching = False
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        for context in (torch.no_grad(), _Constructors(self), _Operations(self)):
            self._entered.enter_context(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Take note of what happens."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Take no note of what waits."""
        before = len(self.waits)
        try:
            yield
        finally:
            del self.waits[before:]

    def waited(self, what: str) -> None:
        """The host would have waited here."""
        if self._watching:
            self.waits.append(what)

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on the values."""
        wrappers: dict[int, Tensor] = {}

        def unwrapped(leaf: Any) -> Any:
            if isinstance(leaf, _Far):
                wrappers[id(leaf.near)] = leaf
                return leaf.near
            return leaf

        name = func.overloadpacket.__name__
        given, options = tree_map(unwrapped, (args, dict(kwargs)))
        result_is_far = bool(wrappers)
        if options.get("device") is not None:
            result_is_far = _is_far(options["device"])
            options["device"] = "cpu"
        self._judge(name, tree_leaves((args, kwargs)), args, result_is_far)
        storages = {t.untyped_storage().data_ptr() for t in wrappers.values() for t in [near(t)]}
        result = func(*given, **options)
        for wrapper in wrappers.values():
            if wrapper.shape != near(wrapper).shape:
                raise NotImplementedError(
                    f"{name} changes a shape in place, which the simulated device cannot follow: "
                    "use the form that returns a new tensor"
                )

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not result_is_far:
                return leaf
            if id(leaf) in wrappers:
                return wrappers[id(leaf)]
            storage = leaf.untyped_storage()
            if self._watching and storage.data_ptr() not in storages:
                self.largest = max(self.largest, storage.nbytes())
            return _Far(leaf)

        return tree_map(wrapped, result)

    def _judge(self, name: str, leaves: list[Any], args: Any, result_is_far: bool) -> None:
        """Take note of what a real device would mind."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        here = [t for t in tensors if not isinstance(t, _Far)]
        there = [t for t in tensors if isinstance(t, _Far)]
        if name in ("_to_copy", "copy_"):
            if here and (there or result_is_far):
                self.waited("copies a tensor of the host to the device")
            elif there and not result_is_far:
                self.waited("copies a tensor to the host")
            return
        if not there:
            return
        if self._watching and any(t.dim() for t in here):
            self.strays.append(name)
        if name in _READS:
            self.waited(_READS[name])
        elif name in ("index", "index_put_", "index_put") and _by_mask(name, args):
            self.waited("indexes by a boolean mask, whose length the host must know")
        elif name == "repeat_interleave" and tensors[0] is args[0] and len(args) == 1:
            self.waited("repeats by a tensor without output_size")


def _by_mask(name: str, args: Any) -> bool:
    by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    # a single value is filled in without looking at the mask
    return by_mask and (name == "index" or args[2].numel() > 1)


def _is_far(device: Any) -> bool:
    return torch.device(device).type == DEVICE.type


class _Operations(TorchDispatchMode):
    """Everything below the Python functions of torch."""

    def __init__(self, device: Simulated) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.device.run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """The functions that go round the operations: from host data to tensors and back."""

    def __init__(self, device: Simulated) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        makes = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if makes and kwargs.get("device") is not None and _is_far(kwargs["device"]):
            self.device.waited("copies host data to the device (torch.tensor of a list)")
            return _Far(func(*args, **{**kwargs, "device": "cpu"}))
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], _Far):
            self.device.waited(f"copies a tensor to the host ({func.__name__}())")
            return func(args[0].near)
        return func(*args, **kwargs)


def _ops_of(device: Simulated) -> Ops:
    """The reference ops, each unwatched."""

    def excused(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with device.unwatched():
                return function(*args, **kwargs)

        return call

    ops = Ops()
    for name in dir(Ops):
        if not name.startswith("_") and callable(getattr(ops, name)):
            setattr(ops, name, excused(getattr(ops, name)))
    return ops
