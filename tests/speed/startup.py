"""Start-up time of the command: best of several fresh processes.

python tests/speed/startup.py
"""

import subprocess
import sys
import time
from pathlib import Path

COMMANDS = (["--help"], ["plugins", "list"])


def main() -> None:
    program = Path(sys.executable).with_name("sah-bench")
    for arguments in COMMANDS:
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            subprocess.run([program, *arguments], check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        print(f"sah-bench {' '.join(arguments):15s} {min(times):.3f} s (best of {len(times)})")


if __name__ == "__main__":
    main()
