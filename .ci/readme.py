"""Run what the documentation shows.

    readme.py command NAME      print the shell command that follows `<!-- NAME -->` in the README
    readme.py snippets FILE...  execute the Python blocks of each file, in one namespace per file

A Python block whose next block is `text` must print exactly that text. A block after `<!-- skip:
reason -->` is left out, and the reason is printed.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

BLOCK = re.compile(
    r"(?P<before>(?:^<!--[^\n]*-->\n+)?)^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.M | re.S
)


def command(name: str) -> str:
    """The shell block of the README that is marked with ``name``."""
    for match in BLOCK.finditer(Path("README.md").read_text()):
        if match["before"].strip() == f"<!-- {name} -->":
            return match["body"]
    raise SystemExit(f"README.md has no block marked <!-- {name} -->")


def run_snippets(path: Path) -> int:
    """Execute the Python blocks of a file and compare what they print."""
    blocks = list(BLOCK.finditer(path.read_text()))
    namespace = {"__name__": "__main__"}
    count = 0
    for index, match in enumerate(blocks):
        if match["kind"] != "python":
            continue
        if "skip:" in match["before"]:
            print(f"{path}: {match['before'].strip()}")
            continue
        line = path.read_text()[: match.start()].count("\n") + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match["body"], f"{path}:{line}", "exec"), namespace)
        count += 1
        follows = blocks[index + 1] if index + 1 < len(blocks) else None
        shown = follows["body"].strip() if follows is not None else ""
        told = printed.getvalue().strip()
        if told and follows is not None and follows["kind"] == "text" and told != shown:
            raise SystemExit(f"{path}:{line} printed\n{told}\ninstead of\n{shown}")
    return count


def main() -> None:
    """Dispatch on the first argument."""
    action, *rest = sys.argv[1:]
    if action == "command":
        print(command(rest[0]), end="")
        return
    for name in rest:
        path = Path(name)
        if path.exists():
            print(f"{path}: {run_snippets(path)} snippets ran")


main()
