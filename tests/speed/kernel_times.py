"""Microseconds of every kernel of a pipeline's call on a GPU: where its time goes.

    python tests/speed/kernel_times.py [--keys 131072] [--batch 1,4] [--pipeline TEXT ...]

A call is one of a Llama-3.1-8B layer in a decode step, as ``sah-bench profile`` makes it: append
the new key, select, attend. Kernels run one after the other and are timed by torch's profiler,
so that launches are not counted; ``graph`` is the same call replayed as a CUDA graph, back to back.
"""

import argparse
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from _installed import install

CALLS = 20


def measure(text, shape):
    """Print the kernels of a pipeline at a shape."""
    from sah_bench.profiling.forms import PipelineForm
    from sah_bench.profiling.shapes import Call
    from sah_bench.profiling.timing import GRAPH_CALLS, graph_of, graph_timer
    from sah_core import Pipeline

    call = Call.random(shape, torch.device("cuda"))
    form = PipelineForm(text, Pipeline.parse(text), "triton", call)
    for _ in range(3):
        form.captured()
    timer = graph_timer(graph_of(form.captured, GRAPH_CALLS), GRAPH_CALLS)
    graph = min(timer() for _ in range(5)) * 1e6
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            form.captured()
        torch.cuda.synchronize()
    times, counts = Counter(), Counter()
    for event in profile.events():
        times[event.name] += event.device_time
        counts[event.name] += 1
    whole = sum(times.values()) / CALLS
    print(f"\nbatch {shape.batch}: {text}\n  graph {graph:.1f}, kernels {whole:.1f}")
    for name, time in times.most_common(14):
        print(f"  {time / CALLS:8.1f}  {counts[name] / CALLS:4.1f} x  {name[:90]}")


@torch.no_grad()
def main():
    install()
    from methods_gpu import ENDS, artefacts, pipelines

    from sah_bench.profiling.shapes import Shape

    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--pipeline", action="append")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}")
    with tempfile.TemporaryDirectory() as folder:
        texts = given.pipeline or [
            *pipelines(artefacts(Path(folder)))[:2],
            f"{ENDS} | quest(0.05, page_size=16, group_reduction=sum)",
            f"{ENDS} | oracle-top-k(0.05)",
        ]
        for batch in map(int, given.batch.split(",")):
            shape = Shape(
                batch=batch, heads=32, kv_heads=8, query_len=1, keys=given.keys, head_dim=128,
                dtype="bfloat16",
            )  # fmt: skip
            for text in texts:
                measure(text, shape)


if __name__ == "__main__":
    main()
