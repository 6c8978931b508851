"""How the official generator makes the samples of any task: streams, size search, shrinking."""

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from sah_core.errors import ParameterError

from .tasks import Counter, ItemKind, Prompt, Task
from .texts import Texts

_LAST_TRIES = 200
"""Prompts of the smallest size that are drawn before a sample counts as impossible."""


@attrs.define(kw_only=True)
class Streams:
    """The random state of one run of the official generator.

    Attributes:
        seed: seeds every stream.
        vary_positions: shuffle each sample by a seed of its own. Officially all samples are
            shuffled by one seed, so that lists of one length have the same permutation, and with it
            gold documents and frequent words the same places.
        index: the sample that is being made; None in the size search.
    """

    seed: int
    vary_positions: bool = False
    index: int | None = None
    draw: random.Random = attrs.field(init=False)
    numpy: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        from numpy.random import RandomState

        self.draw = random.Random(self.seed)
        self.numpy = RandomState(self.seed)

    def shuffle(self, items: list[Any]) -> None:
        """Shuffle by the seed alone, whatever was drawn before."""
        own = self.vary_positions and self.index is not None
        random.Random(f"{self.seed}/{self.index}" if own else self.seed).shuffle(items)

    def letters(self, alphabet: str, size: int) -> str:
        """Return a random word."""
        return "".join(self.draw.choices(alphabet, k=size))

    def item(self, kind: ItemKind, keys: Callable[[], Sequence[str]]) -> str:
        """Return a random key or value; only for words the keys are asked for."""
        if kind == "words":
            return self.draw.choice(keys())
        if kind == "numbers":
            return str(self.draw.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=self.draw.getrandbits(128), version=4))

    def five_digits(self) -> str:
        """Return the value of a variable."""
        return str(self.numpy.randint(10000, 99999))


class OfficialMaker:
    """Makes the samples of a task.

    Subclasses give ``step``, by which a sample shrinks, and :meth:`prompt`. Every call of it draws
    from the streams.

    Args:
        task: what is made.
        length: the tokens that prompt and answer may have.
        streams: the random state, shared by the size search and all samples.
        count: counts the tokens of a prompt.
        texts: what the task draws on.
    """

    step = 10

    def __init__(
        self, task: Task, length: int, streams: Streams, count: Counter, texts: Texts
    ) -> None:
        self.task = task
        self.length = length
        self.room = task.max_new_tokens
        self.streams = streams
        self.counter = count
        self.texts = texts

    def count(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt."""
        return self.counter(prompt)

    def prompt(self, size: int) -> Prompt:
        """Return a new prompt with a haystack of ``size`` units."""
        raise NotImplementedError

    def sample(self, size: int) -> Prompt:
        """Return a new prompt as it is kept, which may have more to it than those of the search."""
        return self.prompt(size)

    def estimate(self) -> int:
        """Return the upper end of the size search."""
        return int(self.length / (self.count(self.prompt(self.step)) / self.step) * 3)

    def samples(self) -> Iterator[Prompt]:
        """Yield samples without end."""
        size = self.search(self.estimate(), self.length, self.room)
        while True:
            self.begin_sample()
            yield self.fitting(size)

    def begin_sample(self) -> None:
        """Note that the next sample is being made."""
        index = self.streams.index
        self.streams.index = 0 if index is None else index + 1

    def search(self, estimate: int, limit: int, overhead: int) -> int:
        """Return the largest size whose prompt, as drawn, fits; the step if none does."""
        low, high, best = self.step, max(estimate, 2 * self.step), self.step
        while low <= high:
            middle = (low + high) // 2
            if self.count(self.prompt(middle)) + overhead <= limit:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def fitting(self, size: int) -> Prompt:
        """Return a prompt of ``size`` units, or of the most units that come to fit."""
        least = None
        tries = 0
        while tries < _LAST_TRIES:
            try:
                prompt = self.sample(size)
            except ValueError:
                # More was to be drawn than there is: the size is too small for the task.
                pass
            else:
                tokens = self.count(prompt) + self.room
                if tokens <= self.length:
                    return prompt
                least = tokens if least is None else min(least, tokens)
            if size > self.step:
                size -= self.step
            else:
                tries += 1
        raise self.too_short(least)

    def too_short(self, least: int | None) -> ParameterError:
        """The error that nothing fits, where the official generator would not end."""
        needed = "more" if least is None else f"about {least}"
        return ParameterError(
            "ruler",
            "lengths",
            self.length,
            f"{needed} tokens for {self.task.name} with this tokenizer in mode=official, whose "
            "generator would never end; take a longer length or mode=portable",
        )
