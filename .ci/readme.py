"""Run what the documentation shows.

    readme.py command NAME      print the shell command that follows `<!-- NAME -->` in the README
    readme.py snippets FILE...  run the blocks of each file and compare what they print

What runs, in the order of the file:

* A Python block; those of one file share a namespace. If the next block is `text`, it must print
  exactly that text.
* A `bash` block that a `text` block follows at once (blank lines only). It runs in a temporary
  folder that the blocks of one file share, and must print that text and end with exit code 0, or
  with N after `<!-- exits: N -->`. What it prints is its standard output; its standard error counts
  where it fails. Other `bash` blocks do not run: they show what not every machine should do.
* A block after `<!-- file: NAME -->` is written into that folder under that name.

A block after `<!-- skip: reason -->` is left out, and the reason is printed.

In a `text` block `…` stands for anything within a line, so that times need not be foreseen, and a
line that is only `…` for any number of lines. The width of blank space and of rules does not count.

Packages that a block installs with pip go into the temporary folder.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = re.compile(
    r"(?P<before>(?:^<!--[^\n]*-->\n+)?)^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.M | re.S
)
LONGEST = 300
"""Seconds after which a shell block is given up."""


def command(name: str) -> str:
    """The shell block of the README that is marked with ``name``."""
    for match in BLOCK.finditer(Path("README.md").read_text()):
        if match["before"].strip() == f"<!-- {name} -->":
            return match["body"]
    raise SystemExit(f"README.md has no block marked <!-- {name} -->")


def lines_of(text: str) -> list[str]:
    """The lines of a text, without what only alignment makes."""
    lines = [re.sub(r"─+", "─", re.sub(r"[ \t]+", " ", line)).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def matches(shown: str, printed: str) -> bool:
    """Whether a text was printed as it is shown; ``…`` stands for anything."""
    pattern = ""
    for line in lines_of(shown):
        if line == "…":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            pattern += "[^\n]*".join(re.escape(part) for part in line.split("…")) + "\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines_of(printed))) is not None


PIP = """#!/bin/sh
if [ "$1" = install ]; then
    shift
    set -- install --target '{site}' "$@"
fi
exec '{python}' -m pip "$@"
"""
"""A pip that installs into a folder of the page's own."""


class Page:
    """A file of the documentation and the folder in which its blocks run."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.text = path.read_text()
        self.namespace = {"__name__": "__main__"}
        site = str(folder / "site-packages")
        search = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH", "")]))
        own = folder / "programs"
        own.mkdir(exist_ok=True)
        # PIP_TARGET would reach the environments in which pip builds, where it is not understood
        (own / "pip").write_text(PIP.format(python=sys.executable, site=site))
        (own / "pip").chmod(0o755)
        folders = [str(own), str(Path(sys.executable).parent), os.environ["PATH"]]
        programs = os.pathsep.join(folders)
        self.environment = {
            **os.environ,
            "PATH": programs,
            "PYTHONPATH": search,
            "PIP_QUIET": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self) -> int:
        """Run all blocks and return how many there were."""
        blocks = list(BLOCK.finditer(self.text))
        count = 0
        for index, block in enumerate(blocks):
            follows = blocks[index + 1] if index + 1 < len(blocks) else None
            if follows is not None and follows["kind"] != "text":
                follows = None
            mark = block["before"].strip().removeprefix("<!--").removesuffix("-->").strip()
            is_shell = block["kind"] == "bash" and follows is not None
            is_shell = is_shell and not self.text[block.end() : follows.start()].strip()
            if mark.startswith("skip:"):
                print(f"{self.path}: {mark}")
            elif mark.startswith("file:"):
                self.write(mark.removeprefix("file:").strip(), block["body"])
            elif block["kind"] == "python":
                printed = self.run_python(block)
                if printed.strip() and follows is not None:
                    self.compare(block, follows["body"], printed)
                count += 1
            elif is_shell:
                status = int(mark.removeprefix("exits:")) if mark.startswith("exits:") else 0
                self.compare(block, follows["body"], self.run_shell(block, status))
                count += 1
        return count

    def write(self, name: str, body: str) -> None:
        """Put a shown file into the folder."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(body)

    def run_python(self, block: re.Match[str]) -> str:
        """Execute a block here and return what it prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
            exec(compile(block["body"], self.place(block), "exec"), self.namespace)
        return printed.getvalue()

    def run_shell(self, block: re.Match[str], status: int) -> str:
        """Execute a block in a shell and return what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block["body"]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        if done.returncode != status:
            raise SystemExit(
                f"{self.place(block)} ended with exit code {done.returncode}, not {status}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done.stdout + (done.stderr if status else "")

    def compare(self, block: re.Match[str], shown: str, printed: str) -> None:
        """Stop if a block printed something else than the page shows."""
        if not matches(shown, printed):
            raise SystemExit(f"{self.place(block)} printed\n{printed}\ninstead of\n{shown}")

    def place(self, block: re.Match[str]) -> str:
        """File and line of a block."""
        return f"{self.path}:{self.text[: block.start('kind')].count(chr(10)) + 1}"


def main() -> None:
    """Dispatch on the first argument."""
    action, *rest = sys.argv[1:]
    if action == "command":
        print(command(rest[0]), end="")
        return
    for name in rest:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="docs-") as folder:
            count = Page(Path(name), Path(folder)).run()
        print(f"{name}: {count} snippets ran in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
