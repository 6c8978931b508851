"""Microseconds of sparse attention on a GPU beside every dense form of torch, in one process.

Every time is that of a CUDA graph of one call, replayed back to back; buffers exceed the L2 cache.

    python tests/speed/gpu_kernels.py [--keys 131072 32768] [--batch 1 4]
"""

import argparse
import statistics
import warnings
from datetime import date

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sah_core.allowed import Allowed
from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.state import LayerInfo
from sah_plugins.backends.triton.backend import TritonBackend
from sah_plugins.maskers.local import Local
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.quest import Quest
from sah_plugins.maskers.sink import Sink

HEADS, KV_HEADS, DIM = 32, 8, 128
BACKEND = TritonBackend()
ENDS = (Sink(sink_size=128), Local(window_size=128))
PIPELINES = {
    "sink(128) local(128)": ENDS,
    "+ quest 5% page 32 shared": (
        *ENDS, Quest(heavy_size=0.05, page_size=32, group_reduction="sum"),
    ),
    "+ quest 5% page 16 shared": (
        *ENDS, Quest(heavy_size=0.05, page_size=16, group_reduction="sum"),
    ),
    "+ quest 5% page 16 per head": (*ENDS, Quest(heavy_size=0.05, page_size=16)),
    "+ oracle-top-k 5%": (*ENDS, OracleTopK(heavy_size=0.05)),
}  # fmt: skip


def microseconds(function, repeats=5, calls=40):
    """Median over ``repeats`` of the mean time of one replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth():
    """Bytes read and written per second of a large copy, in TB/s: the best of ten."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mul(source, 1.0, out=target)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return 2 * source.nbytes / min(times[1:]) / 1e6


def make_inputs(batch, keys):
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(batch, HEADS, 1, DIM, **make)
    key, value = (torch.randn(batch, KV_HEADS, keys, DIM, **make) for _ in range(2))
    allowed = Allowed.causal(1, keys, device="cuda")
    return Inputs(
        query=query, key=key, value=value, allowed=allowed, scaling=DIM**-0.5, key_len=keys,
        ops=BACKEND.ops,
    )  # fmt: skip


def dense_forms(inputs):
    """Name and function of every dense form."""
    query, key, value = inputs.query, inputs.key, inputs.value
    grouped = query.view(inputs.batch, KV_HEADS, HEADS // KV_HEADS, DIM)
    forms = {}
    for kind in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        name = kind.name.split("_")[0].lower()

        def gqa(kind=kind):
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        def rows(kind=kind):
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(grouped, key, value)

        forms[f"sdpa {name} gqa"] = gqa
        forms[f"sdpa {name} group as rows"] = rows

    def matmul():
        weights = (grouped @ key.transpose(2, 3) * inputs.scaling).softmax(-1)
        return weights @ value

    forms["matmul"] = matmul
    return forms


def with_state(masker, inputs):
    if not masker.is_stateful():
        return inputs
    state = masker.init_state(
        LayerInfo(
            index=0, count=1, batch=inputs.batch, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM,
            value_dim=DIM, capacity=inputs.capacity, first=None, dtype=inputs.key.dtype,
            device=inputs.device, ops=inputs.ops,
        )
    )  # fmt: skip
    masker.append(state, inputs.key, inputs.value, 0)
    copy = Inputs(
        query=inputs.query, key=inputs.key, value=inputs.value, allowed=inputs.allowed,
        scaling=inputs.scaling, key_len=inputs.key_len, ops=inputs.ops, state=state,
    )  # fmt: skip
    copy.__dict__["query_position"] = inputs.query_position
    return copy


def parts_of(steps, inputs):
    """Functions of the whole and of its parts for a pipeline."""
    prefix = Mask.empty(inputs.shape)
    for masker in steps[:2]:
        prefix = masker.add_mask(inputs, prefix)
    if len(steps) == 2:
        return {"whole": lambda: BACKEND.attend(inputs, prefix)}
    last, given = steps[2], with_state(steps[2], inputs)
    mask = last.add_mask(given, prefix)
    ops = inputs.ops
    parts = {
        "whole": lambda: BACKEND.attend(given, last.add_mask(given, prefix)),
        "selection": lambda: last.add_mask(given, prefix),
        "attention": lambda: BACKEND.attend(given, mask),
    }
    if isinstance(last, Quest):
        low, high = given.state.low, given.state.high
        reduction = last.group_reduction
        scores = ops.page_scores(given.query, low, high, reduction)
        pages = last.page_budget(given)[0]
        at = torch.tensor([inputs.capacity - 1], dtype=torch.int32, device="cuda")
        new = inputs.key[:, :, -1:]
        parts["scores"] = lambda: ops.page_scores(given.query, low, high, reduction)
        parts["top-k"] = lambda: ops.masked_topk(
            scores, pages, start=inputs.allowed.start, stop=inputs.allowed.stop,
            page_size=last.page_size, origin=inputs.allowed.first,
        )  # fmt: skip
        parts["append"] = lambda: ops.page_bounds_update(low, high, new, at, last.page_size)
    else:
        scores = ops.logits(given.query, given.key, given.scaling)
        budget = inputs.budget(last.heavy_size).capacity
        parts["scores"] = lambda: ops.logits(given.query, given.key, given.scaling)
        parts["top-k"] = lambda: ops.masked_topk(
            scores, budget, start=inputs.allowed.start, stop=inputs.allowed.stop,
            taken=prefix.ranges,
        )  # fmt: skip
    return parts


@torch.inference_mode()
def floor(batch, keys, bandwidth, fraction=0.1):
    """The attention kernel alone over a share of the keys, beside the time that its bytes take."""
    inputs = make_inputs(batch, keys)
    quest = Quest(heavy_size=fraction, page_size=16, group_reduction="sum")
    given = with_state(quest, inputs)
    mask = quest.add_mask(given, Mask.empty(inputs.shape))
    time = microseconds(lambda: BACKEND.attend(given, mask))
    moved = quest.page_budget(given)[0] * 16 * 2 * DIM * 2 * KV_HEADS * batch
    least = moved / bandwidth / 1e6
    name = f"attention alone, {fraction:.0%} shared"
    print(f"  {name:30s} {time:9.1f}  bytes alone {least:.1f}, {time / least:.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}")
    print(f"bf16, {HEADS} heads, {KV_HEADS} KV heads, head_dim {DIM}, one query")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth:.2f} TB/s")
    for keys in options.keys:
        for batch in options.batch:
            table(batch, keys)
            floor(batch, keys, bandwidth)


@torch.inference_mode()
def table(batch, keys):
    inputs = make_inputs(batch, keys)
    print(f"\n{keys} keys, batch {batch}")
    best = float("inf")
    for name, function in dense_forms(inputs).items():
        try:
            time = microseconds(function)
        except RuntimeError as error:
            print(f"  {name:30s} {str(error).splitlines()[0][:60]}")
            continue
        best = min(best, time)
        print(f"  {name:30s} {time:9.1f}")
    for name, steps in PIPELINES.items():
        if isinstance(steps[-1], OracleTopK) or "page" in name or len(steps) == 2:
            parts = {part: microseconds(f) for part, f in parts_of(steps, inputs).items()}
            whole = parts.pop("whole")
            rest = "  ".join(f"{part} {time:.1f}" for part, time in parts.items())
            print(f"  {name:30s} {whole:9.1f}  {best / whole:6.2f}x  {rest}")


if __name__ == "__main__":
    main()
