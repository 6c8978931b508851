"""Triton: attention over selected keys in one kernel, and GPU forms of the scoring primitives.

Reads the selected keys and values once, whatever the mask is made of: ranges as they lie, pages and
single keys through their indices, and a selection that is shared inside a KV group once for the
whole group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, lru_cache, wraps
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from sah_core import Backend, Inputs, Mask, Ops, Problem, hookimpl

MAX_QUERY_LEN = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def has_triton() -> bool:
    """Whether the package `triton` is installed."""
    return find_spec("triton") is not None


Function = TypeVar("Function", bound=Callable[..., Any])


def on_its_device(function: Function) -> Function:
    """A function that runs with the device of its first argument that has one as the current one.

    Triton launches on the current device, whatever device the tensors are on; in a model that is
    spread over several devices that is not the one of every layer.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device for a in args if hasattr(a, "device")), None)
        if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return cast(Function, run)


class TritonBackend(Backend):
    """Fused sparse attention for decoding and questions."""

    name: ClassVar[str] = "triton"
    rank: ClassVar[int] = 30
    realised: ClassVar[bool] = True

    @cached_property
    def ops(self) -> Ops:
        """GPU forms of the scoring primitives."""
        from .ops import TritonOps

        return TritonOps()

    def refuses(self, problem: Problem) -> str | None:
        """Why not, from static facts."""
        if problem.device != "cuda" and not is_interpreted():
            return f"no kernels for {problem.device}"
        return refusal(problem)

    @on_its_device
    def attend(self, inputs: Inputs, mask: Mask) -> tuple[Tensor, Tensor]:
        """Compute the attention in one launch."""
        from .attention import attend

        return attend(inputs, mask)


@lru_cache(maxsize=4096)
def refusal(problem: Problem) -> str | None:
    """The first reason that speaks against a problem, or None."""
    selections, kv_heads = problem.mask_heads, problem.kv_heads
    reasons = (
        (not has_triton(), "the package triton is not installed"),
        (problem.dtype not in DTYPES, f"no kernels for {problem.dtype}"),
        (problem.is_full, "everything is selected: dense attention is faster"),
        (problem.has_dense, "the mask has a dense part"),
        (problem.has_keep, "what may be attended is not an interval per row"),
        (problem.range_count > 4, "more than 4 ranges"),
        (problem.query_len > MAX_QUERY_LEN, f"more than {MAX_QUERY_LEN} query rows"),
        (max(problem.head_dim, problem.value_dim) > 256, "more than 256 channels"),
        (
            selections % kv_heads != 0 and kv_heads % selections != 0,
            f"{selections} selections do not line up with {kv_heads} KV heads",
        ),
    )
    return next((reason for fails, reason in reasons if fails), None)


@hookimpl
def sah_backend() -> type[Backend]:
    """Register the backend."""
    return TritonBackend
