"""Metrics of attention on the GPU give what they give on the CPU, and wait for nothing."""

import pytest
import torch

from sah_core import Allowed, Inputs, Pipeline
from sah_core.attention import build_mask
from sah_plugins.backends.gather import Gather
from sah_plugins.metrics.mass import Mass
from sah_plugins.metrics.output_error import OutputError
from sah_plugins.metrics.recall import Recall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METRICS = (OutputError, Mass, Recall)


def call(device: str, dtype: torch.dtype, query_len: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(2, heads, rows, 64, generator=generator).to(device, dtype)

    first = torch.tensor([0, 100], dtype=torch.int32, device=device)
    return Inputs(
        query=draw(8, query_len),
        key=draw(2, 600),
        value=draw(2, 600),
        allowed=Allowed.causal(query_len, 600, device=device, first=first),
        scaling=0.3,
        key_len=600,
        softcap=20.0,
        sinks=torch.linspace(-1, 1, 8, device=device),
    )


@pytest.mark.parametrize("query_len", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_values_are_those_of_the_cpu(metric, dtype, query_len):
    found = []
    backend = Gather()
    for device in ("cpu", "cuda"):
        inputs = call(device, dtype, query_len)
        mask = build_mask(Pipeline.parse("sink(4) | local(16) | oracle-top-k(5%)").steps, inputs)
        output, _ = backend.attend(inputs, mask)
        one = metric(every=3)
        one.sah_attention_computed(inputs, mask, output)
        found.append(one.result())
    cpu, cuda = found
    assert cuda["rows"] == cpu["rows"]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name in ("mean", "min", "max"):
        assert cuda[name] == pytest.approx(cpu[name], rel=tolerance, abs=tolerance)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("metric", METRICS)
def test_measuring_a_call_does_not_wait_for_the_device(metric):
    inputs = call("cuda", torch.bfloat16, 1)
    mask = build_mask(Pipeline.parse("sink(4) | local(16) | oracle-top-k(32)").steps, inputs)
    output, _ = Gather().attend(inputs, mask)
    one = metric()
    one.sah_attention_computed(inputs, mask, output)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.sah_attention_computed(inputs, mask, output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert one.result()["rows"] == 4
