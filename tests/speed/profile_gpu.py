"""``sah-bench`` from the source tree, without an installation; every argument is passed on.

    python tests/speed/profile_gpu.py profile --pipeline 'sink(128) | local(128)' --output out
    python tests/speed/profile_gpu.py targets OUT

``targets OUT`` runs the two GPU profiles of ``docs/performance.md`` into ``OUT/attention`` and
``OUT/decode``.
"""

import subprocess
import sys

from _installed import install

ENDS = "sink(128) | local(128)"
PIPELINES = (
    ENDS,
    f"{ENDS} | quest(0.05, page_size=32, group_reduction=sum)",
    f"{ENDS} | quest(0.05, page_size=16, group_reduction=sum)",
    f"{ENDS} | quest(0.05, page_size=16)",
    f"{ENDS} | oracle-top-k(0.05)",
)
DECODE = (ENDS, PIPELINES[1])


def targets(folder: str) -> int:
    attention = [part for text in PIPELINES for part in ("--pipeline", text)]
    attention += ["--backend", "triton", "--keys", "32768,131072", "--batch", "1,4"]
    decode = [part for text in DECODE for part in ("--pipeline", text)]
    decode += ["--backend", "triton", "--model-shape", "llama-3.1-8b"]
    decode += ["--context", "131072", "--batch", "2", "--new-tokens", "30", "--rounds", "3"]
    codes = [
        subprocess.run(
            [sys.executable, __file__, "profile", *arguments, "--output", f"{folder}/{name}"],
            check=False,
        ).returncode
        for name, arguments in (("attention", attention), ("decode", decode))
    ]
    return max(codes)


if __name__ == "__main__":
    install()
    if sys.argv[1:2] == ["targets"]:
        sys.exit(targets(*sys.argv[2:3] or ["profile"]))
    from sah_bench.cli import main

    main(prog_name="sah-bench")
