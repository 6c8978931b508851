"""One attention call on the CPU, against the fastest dense form of torch.

    python tests/speed/cpu_attention.py [--keys 32768]

Decode shape (one query, 32 heads on 8 KV heads, head_dim 128, float32); selection and attention
together, minimum over interleaved rounds in one process after a warm-up.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from sah_core import Allowed, Inputs, Pipeline
from sah_core.attention import Session

PIPELINES = (
    "sink(128) | local(128)",
    "sink(128) | local(128) | quest(0.05, page_size=16, group_reduction=sum)",
    "sink(128) | local(128) | quest(0.05, page_size=32, group_reduction=sum)",
    "sink(128) | local(128) | oracle-top-k(0.05)",
    "sink(4) | local(64) | magicpig(lsh_l=150, lsh_k=10)",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="gather")
    options = parser.parse_args()
    torch.manual_seed(0)
    heads, kv_heads, dim = 32, 8, 128
    query = torch.randn(1, heads, 1, dim)
    key = torch.randn(1, kv_heads, options.keys, dim)
    value = torch.randn(1, kv_heads, options.keys, dim)
    grouped = query.view(1, kv_heads, heads // kv_heads, dim)
    forms: dict[str, Callable[[], object]] = {
        "dense: SDPA, enable_gqa": lambda: scaled_dot_product_attention(
            query, key, value, enable_gqa=True
        ),
        "dense: SDPA, query as (kv_heads, group)": lambda: scaled_dot_product_attention(
            grouped, key, value
        ),
    }
    for text in PIPELINES:
        pipeline = Pipeline.parse(text)
        session = Session(pipeline, ("full_attention",), backend=options.backend)
        # the states see the context once, the timed calls its last key again and again
        context = Inputs(
            query=query[:, :, :0],
            key=key[:, :, :-1],
            value=value[:, :, :-1],
            allowed=Allowed.causal(0, options.keys - 1),
            scaling=dim**-0.5,
            key_len=options.keys - 1,
        )
        session.end_prefill({0: context})
        before = session.snapshot()

        def call(session: Session = session, before: object = before) -> None:
            session.restore(before)
            allowed = Allowed.causal(1, options.keys)
            session.attend(0, query, key, value, allowed, dim**-0.5)

        forms[text] = call
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(options.rounds + 2):
        for name, call in forms.items():
            begin = time.perf_counter()
            call()
            if round_ > 1:
                times[name].append(time.perf_counter() - begin)
    dense = min(min(t) for name, t in times.items() if name.startswith("dense"))
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, {options.keys} keys")
    for name, seconds in times.items():
        print(f"{name:80s} {1e3 * min(seconds):8.3f} ms  {min(seconds) / dense:6.3f} x dense")


if __name__ == "__main__":
    main()
