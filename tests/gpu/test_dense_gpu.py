"""Dense attention of the backend `sdpa` on a real GPU, on whatever kernel torch picks."""

import pytest
import torch

from sah_core import Allowed, Inputs, Mask
from sah_plugins.backends.eager import Eager
from sah_plugins.backends.sdpa import Sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("query_len", [1, 5, 90])
@pytest.mark.parametrize(("first", "window"), [(None, None), ([0, 7], None), (None, 20)])
def test_it_is_what_the_definition_says(dtype, dim, heads, kv_heads, query_len, first, window):
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": dtype}
    # as models make them: rows before heads in memory
    query = torch.randn(2, query_len, heads, dim, **make).transpose(1, 2)
    key, value = (torch.randn(2, kv_heads, 90, dim, **make) for _ in range(2))
    first = None if first is None else torch.tensor(first, dtype=torch.int32, device="cuda")
    allowed = Allowed.causal(query_len, 90, first=first, window=window, device="cuda")
    inputs = Inputs(
        query=query, key=key, value=value, allowed=allowed, scaling=dim**-0.5, key_len=90
    )
    full = Mask.full(inputs.shape)
    output, _ = Sdpa().attend(inputs, full)
    right, _ = Eager().attend(inputs, full)
    rows = allowed.to_dense(90).any(-1).expand(2, heads, -1).transpose(1, 2)
    error = (output.float() - right.float())[rows]
    assert error.norm() / right.float()[rows].norm() <= TOLERANCE[dtype]
