"""Synonyms from WordNet's own database files, as the reader of NLTK 3.8 finds them.

Fellbaum (ed.), "WordNet: An Electronic Lexical Database" (1998). The index files are sorted, so
that a word is found by bisection and nothing is read ahead. Nothing is ever downloaded: the files
are looked for in the folder that the variable ``WNSEARCHDIR`` names, where Debian's package
``wordnet-base`` puts them, and among the data of NLTK.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from zipfile import ZipFile

from sah_core.errors import MissingLibraryError

_SUFFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z")),
        *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    ),
    "verb": (
        *(("s", ""), ("ies", "y"), ("es", "e"), ("es", "")),
        *(("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
"""By part of speech: endings that an inflected form has, and those of the base form."""

_MARKER = "data.noun"
_DEBIAN = Path("/usr/share/wordnet")
_NLTK = ("/usr/share/nltk_data", "/usr/local/share/nltk_data", "/usr/lib/nltk_data")


@cache
def synonyms(word: str) -> frozenset[str]:
    """Return the single words that share a meaning with a word, itself included.

    Raises:
        MissingLibraryError: WordNet is not there.
    """
    found = {word}
    for part in _SUFFIXES:
        for form in _base_forms(word.lower(), part):
            for offset in _offsets(form, part):
                found.update(_words_at(offset, part))
    return frozenset(found)


def _base_forms(word: str, part: str) -> list[str]:
    """The forms of a word that WordNet lists, by its exceptions, or by its rules of inflection."""
    exceptions = _exceptions(part).get(word)
    if exceptions is not None:
        return _listed([word, *exceptions], part)
    forms = _uninflected([word], part)
    known = _listed([word, *forms], part)
    while forms and not known:
        forms = _uninflected(forms, part)
        known = _listed(forms, part)
    return known


def _uninflected(forms: Iterable[str], part: str) -> list[str]:
    return [
        form.removesuffix(ending) + base
        for form in forms
        for ending, base in _SUFFIXES[part]
        if form.endswith(ending)
    ]


def _listed(forms: Iterable[str], part: str) -> list[str]:
    return [form for form in dict.fromkeys(forms) if _offsets(form, part)]


@lru_cache(maxsize=65536)
def _offsets(word: str, part: str) -> tuple[int, ...]:
    """Where the meanings of a word lie in the data file."""
    if not word or " " in word or "\n" in word:
        return ()
    line = _line_of(_file(f"index.{part}"), word.encode(errors="surrogatepass"))
    if line is None:
        return ()
    fields = line.split()
    return tuple(int(field) for field in fields[-int(fields[2]) :])


def _line_of(file: mmap.mmap | bytes, word: bytes) -> bytes | None:
    """The line of a sorted file that begins with a word and a space."""
    low, high, key = 0, len(file), word + b" "
    while low < high:
        start = file.rfind(b"\n", low, (low + high) // 2) + 1 or low
        end = file.find(b"\n", start)
        end = len(file) if end < 0 else end
        line = file[start:end]
        if line.startswith(key):
            return line
        if line < key:
            low = end + 1
        else:
            high = start
    return None


def _words_at(offset: int, part: str) -> Iterator[str]:
    file = _file(f"data.{part}")
    fields = file[offset : file.find(b"\n", offset)].decode("utf-8", "replace").split(" ")
    for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
        if "_" not in name:
            yield name.partition("(")[0]  # the marker of an adjective's place is no part of it


@cache
def _exceptions(part: str) -> dict[str, list[str]]:
    lines = bytes(_file(f"{part}.exc")[:]).decode("utf-8", "replace").splitlines()
    return {fields[0]: fields[1:] for fields in map(str.split, lines) if fields}


@cache
def _file(name: str) -> mmap.mmap | bytes:
    return _database()(name)


@cache
def _database() -> Callable[[str], mmap.mmap | bytes]:
    for place in _places():
        if (place / _MARKER).is_file():
            return lambda name: _mapped(place / name)
        if place.suffix == ".zip" and place.is_file():
            return lambda name: _unpacked(place, name)
    raise MissingLibraryError(
        "METEOR",
        "WordNet 3.0",
        command="apt install wordnet-base, or name its folder of index.* and data.* files "
        "in WNSEARCHDIR",
    )


def _places() -> Iterator[Path]:
    named = os.environ.get("WNSEARCHDIR")
    if named:
        yield Path(named)
    yield _DEBIAN
    for folder in filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)):
        yield from _in_nltk(Path(folder))
    for root in (Path.home() / "nltk_data", Path(sys.prefix) / "nltk_data", *map(Path, _NLTK)):
        yield from _in_nltk(root)


def _in_nltk(root: Path) -> Iterator[Path]:
    yield root / "corpora" / "wordnet"
    yield root / "corpora" / "wordnet.zip"


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _unpacked(path: Path, name: str) -> bytes:
    with ZipFile(path) as archive:
        return archive.read(f"wordnet/{name}")
