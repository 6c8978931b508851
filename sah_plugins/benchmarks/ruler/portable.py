"""Samples of our own streams: each depends on its seed, task and number alone.

The tasks, wording and proportions are RULER's. What differs from the official generator:

* A sample is drawn by hashes of the seed, the task and its number. It does not depend on the
  samples before it, nor on the tokenizer, nor on the length: keys, values, words, questions and
  relative places are the same in every length.
* Only the size of the haystack is fitted, sample by sample, to the largest one of a coarse grid
  (steps of 3 to 6 %) that fits: tokenizers of similar length so come to the same bytes. A larger
  haystack holds all of a smaller one.
* Places are drawn per sample: no place is more likely than another to hold the answer. An essay
  starts at a sentence drawn per sample.
* Distractor keys never repeat a key that is asked for. Words beyond the first four of fwe never
  come as often as the fourth. The documents of qa always hold the answer.
* Below 1,024 tokens cwe has no example and its words come 3 times; the example of vt has at most 12
  lines of noise, fewer below 2,048 tokens. Of the documents of a question of HotpotQA those that
  support the answer are always there, the others as far as they fit.
"""

import string
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs

from sah_core.errors import ParameterError
from sah_plugins.text.draws import Draws
from sah_plugins.text.fitting import largest_near

from .tasks import (
    CWE,
    CWE_COMMON,
    FWE,
    NOISE,
    QA,
    VT,
    VT_HOPS,
    Counter,
    ItemKind,
    NiahTask,
    Prompt,
    QaTask,
    Task,
    chain_lines,
    common_words,
    documents_text,
    enumeration,
    frequency,
    needle,
    numbered,
)
from .texts import Texts

_STEPS = 16
"""Steps of the grid of sizes per doubling."""

_TINY = 1024

Item = TypeVar("Item")

Build = Callable[[int], Prompt]
"""Makes a sample with a haystack of so many units; 0 is the least."""


@attrs.frozen(kw_only=True)
class Maker:
    """Makes the samples of one task, each from its number.

    Attributes:
        task: what is made.
        length: the tokens that prompt and answer may have.
        seed: the only source of randomness.
        count: counts the tokens of a prompt.
        texts: what the task draws on.
    """

    task: Task
    length: int
    seed: int
    count: Counter
    texts: Texts

    def sample(self, index: int) -> Prompt:
        """Return sample number ``index``.

        Raises:
            ParameterError: it does not fit the length even without a haystack.
        """
        draws = Draws(self.seed, "ruler", self.task.name, index)
        return self._fitted(self._builder(draws, index))

    def _builder(self, draws: Draws, index: int) -> Build:
        if isinstance(self.task, NiahTask):
            return self._niah(self.task, draws)
        if isinstance(self.task, QaTask):
            return self._question(self.task, draws, index)
        if self.task.name == "vt":
            return self._variable_tracking(draws)
        if self.task.name == "cwe":
            return self._common_words(draws)
        return self._frequent_words(draws)

    def _fitted(self, build: Build) -> Prompt:
        limit = self.length - self.task.max_new_tokens
        prompts: dict[int, tuple[Prompt, int]] = {}

        def made(size: int) -> tuple[Prompt, int]:
            if size not in prompts:
                # Only the last two are kept: those of a long haystack are large.
                while len(prompts) > 1:
                    del prompts[next(iter(prompts))]
                prompt = build(size)
                prompts[size] = (prompt, self.count(prompt))
            return prompts[size]

        least = made(0)[1]
        if least > limit:
            raise ParameterError(
                "ruler",
                "lengths",
                self.length,
                f"at least {least + self.task.max_new_tokens} tokens for {self.task.name} with "
                "this tokenizer",
            )
        guess = 0
        for probe in (16, 256):
            guess = (limit - least) * probe // max(1, made(probe)[1] - least)
            if guess < 256:
                break
        step = largest_near(lambda step: made(grid_size(step))[1] <= limit, grid_step(guess))
        return made(grid_size(step))[0]

    def _item(self, kind: ItemKind, draw: int) -> str:
        """Return the key or value that a random integer of 128 bits stands for."""
        if kind == "words":
            keys = self.texts.keys()
            return keys[draw % len(keys)]
        if kind == "numbers":
            return str(10**6 + draw % (9 * 10**6))
        return str(uuid.UUID(int=draw, version=4))

    def _distinct(self, kind: ItemKind, size: int, draws: Draws) -> list[str]:
        items: dict[str, None] = {}
        while len(items) < size:
            items[self._item(kind, draws.below(2**128))] = None
        return list(items)

    def _niah(self, task: NiahTask, draws: Draws) -> Build:
        keys = self._distinct(task.key_kind, task.keys, draws)
        values = self._distinct(task.value_kind, task.keys * task.values, draws)
        owned = [values[i * task.values : (i + 1) * task.values] for i in range(task.keys)]
        placed = [
            (draws.below(2**53), needle(task.value_kind, key, value))
            for key, own in zip(keys, owned, strict=True)
            for value in own
        ]
        haystack = self._haystack(task, keys, draws)
        separator = " " if task.haystack == "essay" else "\n"

        def build(size: int) -> Prompt:
            units = insert(haystack(size), placed)
            return task.wording.fill(
                separator.join(units),
                tuple(value for own in owned[: task.queries] for value in own),
                noun=task.value_noun,
                query=enumeration(keys[: task.queries]),
            )

        return build

    def _haystack(
        self, task: NiahTask, taken: list[str], draws: Draws
    ) -> Callable[[int], list[str]]:
        if task.haystack == "noise":
            return lambda size: [NOISE] * size
        if task.haystack == "essay":
            sentences = self.texts.sentences
            start = draws.below(len(sentences))
            return lambda size: [sentences[(start + i) % len(sentences)] for i in range(size)]

        def distractors(size: int) -> list[str]:
            parts = [draws.stream(name, size) for name in ("key", "key 2", "value", "value 2")]
            lines = []
            for high_key, low_key, high, low in zip(*parts, strict=True):
                key = self._item(task.key_kind, high_key << 64 | low_key)
                while key in taken:
                    high_key += 1
                    key = self._item(task.key_kind, (high_key % 2**64) << 64 | low_key)
                value = self._item(task.value_kind, high << 64 | low)
                lines.append(needle(task.value_kind, key, value))
            return lines

        return distractors

    def _variable_tracking(self, draws: Draws) -> Build:
        names = _letter_words(string.ascii_uppercase, 5, 2 * (VT_HOPS + 1), draws)
        values = [str(10_000 + draws.below(90_000)) for _ in range(2)]
        places = [sorted(draws.below(2**53) for _ in range(VT_HOPS + 1)) for _ in range(2)]

        def chain(number: int, size: int) -> Prompt:
            own = names[number * (VT_HOPS + 1) : (number + 1) * (VT_HOPS + 1)]
            lines = chain_lines(own, values[number])
            placed = list(zip(places[number], lines, strict=True))
            context = "\n".join(insert([NOISE] * size, placed)).replace(". \n", ".\n")
            return VT.fill(context, tuple(own), query=values[number], number=len(own))

        shown = chain(0, min(12, self.length // 170))
        example = f"{shown.text} {' '.join(shown.answers)}\n\n"

        def build(size: int) -> Prompt:
            prompt = chain(1, size)
            return attrs.evolve(prompt, context=example + prompt.context)

        return build

    def _common_words(self, draws: Draws) -> Build:
        words = self.texts.words()
        order = _shuffled(words, draws.stream("order", len(words)))
        tiny, sizes = self.length < _TINY, common_words(self.length)
        common, uncommon = (3, 1) if tiny else (sizes.common, sizes.uncommon)
        example_words = _shuffled(words, draws.stream("example order", len(words)))
        # The words of the example are the last ones of the main list to be used.
        shown = example_words[: sizes.shown]
        taken = set(shown)
        order = [word for word in order if word not in taken] + shown

        def word_list(words: list[str], common: int, uncommon: int, label: str) -> str:
            listed = words[:CWE_COMMON] * common
            keys = list(draws.stream(f"{label} common", len(listed)))
            rest = len(words) - CWE_COMMON
            for turn in range(uncommon):
                listed += words[CWE_COMMON:]
                keys += draws.stream(f"{label} {turn}", rest)
            return numbered(_shuffled(listed, keys))

        few_shot = ""
        if not tiny:
            listed = word_list(shown, sizes.shown_common, sizes.shown_uncommon, "example")
            few_shot = f"{CWE.fill(listed, ()).text} {numbered(shown[:CWE_COMMON])}\n"

        def build(size: int) -> Prompt:
            wanted = CWE_COMMON + size
            chosen = order[:wanted]
            if wanted > len(order):
                chosen = chosen + self._more_words(wanted - len(order), draws)
            prompt = CWE.fill(
                word_list(chosen, common, uncommon, "main"), tuple(order[:CWE_COMMON])
            )
            return attrs.evolve(prompt, context=few_shot + prompt.context)

        return build

    def _more_words(self, size: int, draws: Draws) -> list[str]:
        """Return distinct hyphenated pairs, since no more single words are left."""
        keys = self.texts.keys()
        known = set(self.texts.words())
        found: dict[str, None] = {}
        wanted = size
        while len(found) < size:
            # A longer stream begins with the shorter one, so that more words leave these in place.
            wanted += size // 64 + 16
            for draw in draws.stream("pairs", wanted):
                word = keys[draw % len(keys)]
                if word not in known:
                    found[word] = None
                if len(found) == size:
                    break
        return list(found)

    def _frequent_words(self, draws: Draws) -> Build:
        # The fourth most frequent word and the one behind it make the least list.
        size_of_vocabulary = max(5, (self.length - self.task.max_new_tokens) // 50)
        words = _letter_words(string.ascii_lowercase, 6, size_of_vocabulary - 1, draws)
        vocabulary = ["...", *words]
        least = 27

        def build(size: int) -> Prompt:
            counts = [frequency(rank, least + size) for rank in range(1, len(vocabulary) + 1)]
            listed: list[str] = []
            keys: list[int] = []
            for rank, (word, count) in enumerate(zip(vocabulary, counts, strict=True)):
                times = min(count, counts[3] - 1) if rank > 3 else count
                if not times:
                    break
                listed += [word] * times
                keys += draws.stream(f"places of {rank}", times)
            return FWE.fill(" ".join(_shuffled(listed, keys)), tuple(vocabulary[1:4]))

        return build

    def _question(self, task: QaTask, draws: Draws, index: int) -> Build:
        found = self.texts.questions_of(task)
        turns, place = divmod(index, len(found.questions))
        if turns:
            raise IndexError(index)
        order = Draws(self.seed, "ruler", task.name).sample(
            len(found.questions), len(found.questions)
        )
        question = found.questions[order[place]]
        keys = draws.stream("order", len(found.documents))
        own = {*question.gold, *question.related}
        first = [i for i in question.gold if i not in question.needed]
        related = sorted(question.related, key=keys.__getitem__)
        others = sorted(
            (i for i in range(len(found.documents)) if i not in own), key=keys.__getitem__
        )
        distractors = [*first, *dict.fromkeys(related), *others]

        def build(size: int) -> Prompt:
            chosen = list(dict.fromkeys(question.needed))
            if distractors:
                # All come round again only once all were there.
                chosen += [distractors[i % len(distractors)] for i in range(size)]
            places = draws.stream("places", len(chosen))
            documents = [found.documents[i] for i in _shuffled(chosen, places)]
            return QA.fill(documents_text(documents), question.answers, query=question.text)

        return build


def grid_size(step: int) -> int:
    """Return the size at a step of the grid: 0 to 31 singly, then 16 sizes per doubling."""
    if step < 2 * _STEPS:
        return step
    octave, part = divmod(step, _STEPS)
    return (_STEPS + part) << (octave - 1)


def grid_step(size: int) -> int:
    """Return the last step of the grid whose size is not above ``size``."""
    octave = max(0, size.bit_length() - _STEPS.bit_length())
    return (size >> octave) + octave * _STEPS


def insert(units: list[str], placed: Sequence[tuple[int, str]]) -> list[str]:
    """Put each text behind its share, of ``2**53``, of the units; those of one place in order."""
    result: list[str] = []
    done = 0
    for place, text in sorted(placed, key=lambda pair: pair[0]):
        start = (len(units) + 1) * place >> 53
        result += units[done:start]
        result.append(text)
        done = start
    return result + units[done:]


def _shuffled(items: Sequence[Item], keys: Sequence[int]) -> list[Item]:
    """Return the items in the order of their keys."""
    return [item for _, item in sorted(zip(keys, items, strict=True), key=lambda pair: pair[0])]


def _letter_words(alphabet: str, size: int, count: int, draws: Draws) -> list[str]:
    """Return distinct random words."""
    words: dict[str, None] = {}
    while len(words) < count:
        draw = draws.below(len(alphabet) ** size)
        letters = []
        for _ in range(size):
            draw, letter = divmod(draw, len(alphabet))
            letters.append(alphabet[letter])
        words["".join(letters)] = None
    return list(words)
