"""Methods with artefacts, and samplers, on a GPU: the shape of a Llama-3.1-8B layer.

    python tests/speed/methods_gpu.py OUT [--keys 131072] [--batch 1,4]

Writes random artefacts (their content does not change the time), then runs ``sah-bench profile``
with them into OUT, for the tables of ``docs/performance.md``.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from _installed import install

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ENDS = "sink(128) | local(128)"


def artefacts(folder: Path) -> dict[str, Path]:
    """A channel file and hash weights for one layer of the profiled shape."""
    from sah_plugins.maskers.double_sparsity.channels import write_channels
    from sah_plugins.maskers.hash_attention.training import random_functions
    from sah_plugins.maskers.hash_attention.weights import write_weights

    draw = torch.Generator().manual_seed(0)
    order = torch.rand(KV_HEADS, HEAD_DIM, generator=draw).argsort(dim=1)
    channels, weights = folder / "channels.json", folder / "hash.safetensors"
    write_channels(channels, {"k_proj": {0: order}}, {})
    functions = random_functions(HEADS, KV_HEADS, [HEAD_DIM, 128, 128, 32], draw)
    write_weights(weights, {0: functions}, {"model": "random"})
    return {"channels": channels, "weights": weights}


def pipelines(files: dict[str, Path]) -> list[str]:
    channels = f"sorted_channel_file='{files['channels']}', channel_selection=k_proj"
    methods = (
        f"hash-attention(0.05, hat_weight_file='{files['weights']}', group_reduction=sum)",
        f"double-sparsity(0.05, {channels}, group_factor=8, label_bits=4, group_reduction=sum)",
        "adaptive-sampling(max_size=0.1)",
        "magicpig(max_size=0.1)",
    )
    return [f"{ENDS} | {method}" for method in methods]


def main() -> None:
    install()
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--keys", default="131072")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--backend", default="triton")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    profile = Path(__file__).with_name("profile_gpu.py")
    chosen = [part for text in pipelines(artefacts(given.output)) for part in ("--pipeline", text)]
    shape = ["--keys", given.keys, "--batch", given.batch, "--backend", given.backend]
    command = [sys.executable, str(profile), "profile", *chosen, *shape]
    sys.exit(subprocess.run([*command, "--output", str(given.output)], check=False).returncode)


if __name__ == "__main__":
    main()
