"""The sizes of a measured attention call, and its random tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core.errors import ExperimentError

COMMAND = "sah-bench profile"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def bad_option(option: str, message: str) -> ExperimentError:
    """The error for a bad value of an option; the caller raises it."""
    return ExperimentError(COMMAND, option, message)


@attrs.frozen(kw_only=True)
class Shape:
    """The sizes of an attention call; the queries are the last keys.

    Raises:
        ExperimentError: If they do not fit together.
    """

    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    query_len: int
    dtype: str

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if name != "dtype" and value < 1:
                raise bad_option(f"--{name.replace('_', '-')}", f"{value} is not positive")
        if self.heads % self.kv_heads:
            message = f"{self.heads} is not a multiple of {self.kv_heads}, the KV heads"
            raise bad_option("--heads", message)
        if self.query_len >= self.keys:
            message = f"{self.query_len} query rows need more than {self.keys} keys"
            raise bad_option("--query-len", message)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        itemsize = DTYPES[self.dtype].itemsize
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim * itemsize

    def __str__(self) -> str:
        return (
            f"{self.keys} keys, batch {self.batch}, {self.heads} heads on {self.kv_heads}, "
            f"head_dim {self.head_dim}, query_len {self.query_len}, {self.dtype}"
        )


def shapes(sizes: dict[str, Sequence[Any]]) -> Iterator[Shape]:
    """All combinations of the sizes that are given by field."""
    for values in product(*sizes.values()):
        yield Shape(**dict(zip(sizes, values, strict=True)))


@attrs.frozen(eq=False)
class Call:
    """The tensors of an attention call.

    Attributes:
        query: ``(batch, heads, query_len, head_dim)``.
        key: ``(batch, kv_heads, keys, head_dim)``.
        value: Likewise.
    """

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> Call:
        """Normal random numbers, the same for equal shapes on one kind of device."""
        torch.manual_seed(0)
        make: dict[str, Any] = {"device": device, "dtype": DTYPES[shape.dtype]}
        cached = (shape.batch, shape.kv_heads, shape.keys, shape.head_dim)
        return cls(
            torch.randn(shape.batch, shape.heads, shape.query_len, shape.head_dim, **make),
            torch.randn(*cached, **make),
            torch.randn(*cached, **make),
        )

    @property
    def scaling(self) -> float:
        """Factor on ``q . k``."""
        return float(self.query.shape[3] ** -0.5)

    @property
    def grouped(self) -> Tensor:
        """The query with the group as rows: ``(batch, kv_heads, group * query_len, head_dim)``."""
        batch, kv_heads, _, head_dim = self.key.shape
        return self.query.reshape(batch, kv_heads, -1, head_dim)
