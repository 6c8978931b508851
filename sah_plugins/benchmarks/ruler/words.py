"""The words that RULER draws keys and lists from: those of the package ``wonderwords``."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import overload

from sah_core.errors import MissingLibraryError, ParameterError
from sah_core.hashing import text_id

_NAMES = ("noun", "adjective", "verb")


class HyphenatedPairs(Sequence[str]):
    """The sorted distinct strings ``first-second``, found by index without listing them all.

    All strings that begin with ``red-`` are neighbours, so the list is one block per first word;
    only where a first word and its hyphen begin another one (``red-`` and ``red-hot-``) are their
    strings listed and sorted together.
    """

    def __init__(self, firsts: Sequence[str], seconds: Sequence[str]) -> None:
        self._seconds = sorted(set(seconds))
        groups: list[list[str]] = []
        for first in sorted(set(firsts), key=lambda word: word + "-"):
            if groups and (first + "-").startswith(groups[-1][0] + "-"):
                groups[-1].append(first)
            else:
                groups.append([first])
        self._heads = [group[0] for group in groups]
        self._merged = {
            index: sorted({f"{first}-{second}" for first in group for second in self._seconds})
            for index, group in enumerate(groups)
            if len(group) > 1
        }
        sizes = (len(self._merged.get(i, self._seconds)) for i in range(len(groups)))
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, place)
        place -= self._ends[group - 1] if group else 0
        if group in self._merged:
            return self._merged[group][place]
        return f"{self._heads[group]}-{self._seconds[place]}"


@cache
def key_words() -> HyphenatedPairs:
    """Return the keys of niah, ``adjective-noun``: 6,171,620 of them in wonderwords 3.0.1."""
    return HyphenatedPairs(_listed("adjective"), _listed("noun"))


@cache
def list_words() -> tuple[str, ...]:
    """Return the sorted words of cwe: 8,166 of them in wonderwords 3.0.1."""
    return tuple(sorted({word for name in _NAMES for word in _listed(name)}))


def more_words(words_path: str | None, size: int) -> tuple[str, ...]:
    """Return the words of cwe where a list takes ``size`` of them, more than :func:`list_words`.

    RULER turns to another list, ``english_words.json``, which is not part of its repository.
    Without that file ours are the words of `list_words` and behind them as many keys as it takes,
    evenly spread over the sorted `key_words`.

    Raises:
        ParameterError: the file has fewer words.
    """
    if words_path is None:
        listed, keys = list_words(), key_words()
        known = {word for word in listed if "-" in word}
        missing = max(0, size - len(listed)) + len(known)
        more = (keys[i * len(keys) // missing] for i in range(missing))
        return (*listed, *(word for word in more if word not in known))
    found = extra_words(words_path)
    if len(found) < size:
        raise ParameterError("ruler", "words_path", words_path, f"at least {size} words")
    return found


@cache
def extra_words(words_path: str) -> tuple[str, ...]:
    """Return the words of a file: RULER's ``english_words.json``, or a text with one a line.

    Raises:
        ParameterError: the file cannot be read as either.
    """
    path = Path(words_path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            words = tuple(content.values() if isinstance(content, dict) else content)
        else:
            words = tuple(word for line in text.splitlines() if (word := line.strip()))
    except (OSError, ValueError, TypeError):
        words = ()
    if not words or not all(isinstance(word, str) for word in words):
        raise ParameterError(
            "ruler", "words_path", words_path, "a JSON object or list of words, or one word a line"
        )
    return words


@cache
def words_digest() -> str:
    """Return the SHA-256 of the package's lists, as 16 hexadecimal digits."""
    content = json.dumps([_listed(name) for name in _NAMES])
    return text_id(content)


def _listed(name: str) -> list[str]:
    spec = find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        raise MissingLibraryError(
            "ruler, in its tasks niah_* and cwe,", "wonderwords", "benchmarks"
        )
    path = Path(spec.submodule_search_locations[0]) / "assets" / f"{name}list.txt"
    return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
