"""Needles: sentences that give a number to a key, and the randomness that picks them.

Wording after RULER (Hsieh et al., 2024, arXiv:2404.06654); the word lists are our own.
"""

import hashlib
import json

import attrs


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    """
    amber ancient arctic azure bashful brazen breezy bronze candid cheerful clever cobalt copper
    crimson curious dapper distant dusty eager elegant emerald fearless fluffy frosty gallant
    gentle glossy golden graceful hidden hollow humble indigo ivory jolly lively lunar mellow
    misty nimble noble opal patient polite proud quiet rapid rugged rustic scarlet shiny silent
    silver sleepy solar steady stormy swift velvet violet
    """
)
_NOUNS = _words(
    """
    acorn anchor badger bakery balloon banjo barrel basket beacon blanket bridge bucket butterfly
    cactus camel candle canyon castle cello compass cottage dolphin dragon falcon feather forest
    fountain garden giraffe glacier guitar hammer harbor helmet island jacket jungle kettle
    ladder lantern magnet marble meadow mirror mountain nutmeg orchard otter paddle panther parrot
    pepper pillow pumpkin rabbit river saddle teapot walnut window
    """
)

MOST_NEEDLES = len(_ADJECTIVES) * len(_NOUNS)

INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


class Draws:
    """Random integers that depend on their identity alone.

    Each draw is a SHA-256 hash of the identity and a counter, so equal identities give equal draws
    on every Python version, in every process and in any order of use.
    """

    def __init__(self, *identity: int | float | str) -> None:
        self._identity = json.dumps(identity)
        self._count = 0

    def below(self, limit: int) -> int:
        """Return an integer in ``[0, limit)``, uniform up to one part in 2**100 or so."""
        digest = hashlib.sha256(f"{self._identity}/{self._count}".encode()).digest()
        self._count += 1
        return int.from_bytes(digest[:20], "big") % limit

    def sample(self, population: int, size: int) -> list[int]:
        """Return ``size`` distinct integers of ``[0, population)``, in random order."""
        moved: dict[int, int] = {}
        picked = []
        for i in range(size):
            j = i + self.below(population - i)
            picked.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return picked


@attrs.frozen
class Needle:
    """A key, its number, and where in the haystack it lies."""

    key: str
    value: str
    depth: float
    """Percent of the haystack's units that stand before it, 0 to 100."""

    @property
    def sentence(self) -> str:
        """The sentence to hide."""
        return f"The special magic number for {self.key} is: {self.value}."

    @property
    def question(self) -> str:
        """The question whose answer is :attr:`value`."""
        return f"What is the special magic number for {self.key} mentioned in the provided text?"

    @property
    def answer_prefix(self) -> str:
        """The words that the answer continues."""
        return f" The special magic number for {self.key} is:"


def draw_needles(draws: Draws, depths: list[float]) -> list[Needle]:
    """Return one needle per depth, with distinct keys and distinct 7-digit numbers.

    Up to 60 needles share neither adjective nor noun.
    """
    count = len(depths)
    if count <= min(len(_ADJECTIVES), len(_NOUNS)):
        pairs = list(
            zip(
                draws.sample(len(_ADJECTIVES), count), draws.sample(len(_NOUNS), count), strict=True
            )
        )
    else:
        pairs = [divmod(i, len(_NOUNS)) for i in draws.sample(MOST_NEEDLES, count)]
    values = draws.sample(9 * 10**6, count)
    return [
        Needle(f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}", str(10**6 + value), depth)
        for (adjective, noun), value, depth in zip(pairs, values, depths, strict=True)
    ]
