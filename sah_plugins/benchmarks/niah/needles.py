"""Needles: sentences that give a number to a key.

Wording after RULER (Hsieh et al., 2024, arXiv:2404.06654); the word lists are our own.
"""

import attrs

from sah_plugins.text.draws import Draws


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
