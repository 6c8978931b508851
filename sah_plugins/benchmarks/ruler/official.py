"""Samples that are byte for byte those of the official generator, NVIDIA/RULER at commit c3f5e3b.

One stream of Python's ``random``, and for variable values one of numpy's legacy ``RandomState``,
feed the size search, each of its probes and the samples one after the other: what a sample holds
depends on the tokenizer, the length and all samples before it. Where the official generator would
loop without end, this one raises.

Cost: a dozen prompts are made and counted to find the size, then one or more per sample.
"""

import random
import string
from collections.abc import Iterator
from functools import cached_property

import attrs

from sah_plugins.text.splitting import Splitter

from .official_maker import OfficialMaker, Streams
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

_DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of the sentences before an essay needle: 40 values from 0 to 100."""


def official_samples(
    task: Task, length: int, streams: Streams, count: Counter, texts: Texts
) -> Iterator[Prompt]:
    """Yield the samples of a task without end; those of qa end with the questions.

    Raises:
        ParameterError: nothing that is small enough could be drawn.
    """
    given = (length, streams, count, texts)
    if isinstance(task, NiahTask):
        return _Niah(task, *given).samples()
    if isinstance(task, QaTask):
        return _Questions(task, *given).samples()
    makers = {"vt": _VariableTracking, "cwe": _CommonWords, "fwe": _FrequentWords}
    return makers[task.name](task, *given).samples()


class _Niah(OfficialMaker):
    task: NiahTask

    def __init__(
        self, task: Task, length: int, streams: Streams, count: Counter, texts: Texts
    ) -> None:
        super().__init__(task, length, streams, count, texts)
        self.step = 500 if self.task.haystack == "essay" else 5 if length < 4096 else 25

    def prompt(self, size: int) -> Prompt:
        task = self.task
        pairs: list[tuple[str, list[str]]] = []
        for _ in range(task.keys):
            key = self._item(task.key_kind)
            pairs.append((key, [self._item(task.value_kind) for _ in range(task.values)]))
        needles = [needle(task.value_kind, key, v) for key, values in pairs for v in values]
        self.streams.shuffle(needles)
        context = (
            self._essay(size, needles) if task.haystack == "essay" else self._lines(size, needles)
        )
        asked = [pairs[i] for i in self.streams.draw.sample(range(task.keys), task.queries)]
        return task.wording.fill(
            context,
            tuple(value for _, values in asked for value in values),
            noun=task.value_noun,
            query=enumeration([key for key, _ in asked]),
        )

    @cached_property
    def _split(self) -> Splitter:
        return self.texts.found_splitter()[1]

    def _item(self, kind: ItemKind) -> str:
        return self.streams.item(kind, self.texts.keys)

    def _essay(self, size: int, needles: list[str]) -> str:
        words = self.texts.essay
        words = words * -(-size // len(words)) if size > len(words) else words
        sentences = self._split(" ".join(words[:size]).strip())
        depths = self.streams.draw.sample(_DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths)]
        parts = []
        for (start, stop), sentence in zip(_pairs(places), needles, strict=True):
            # An empty stretch of sentences leaves its space, as in the official prompts.
            parts += [" ".join(sentences[start:stop]), sentence]
        return " ".join([*parts, " ".join(sentences[places[-1] :])])

    def _lines(self, size: int, needles: list[str]) -> str:
        kind = self.task.value_kind
        if self.task.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                needle(kind, self._item(self.task.key_kind), self._item(kind)) for _ in range(size)
            ]
        places = sorted(self.streams.draw.sample(range(size), len(needles)), reverse=True)
        for place, sentence in zip(places, needles, strict=True):
            lines.insert(place, sentence)
        return "\n".join(lines)


class _VariableTracking(OfficialMaker):
    """One chain in noise, behind a solved example that is drawn first and then disguised."""

    _EXAMPLE_LENGTH = 500
    _EXAMPLE_VALUE = "12345"

    def __init__(
        self, task: Task, length: int, streams: Streams, count: Counter, texts: Texts
    ) -> None:
        super().__init__(task, length, streams, count, texts)
        self.example = ""
        self.name_size = 5

    def samples(self) -> Iterator[Prompt]:
        """Yield samples without end, after drawing the example."""
        self.example = self._draw_example()
        self.step = 5 if self.length < 4096 else 10
        example_tokens = self.counter.text(self.example)
        estimate = self.estimate()
        size = self.search(estimate, self.length, self.room + example_tokens)
        while True:
            self.begin_sample()
            yield self.fitting(size)

    def _draw_example(self) -> str:
        self.step, self.name_size, self.room = 5, 3, 0
        length, self.length = self.length, self._EXAMPLE_LENGTH
        size = self.search(self.estimate(), self.length, 0)
        try:
            prompt = self.fitting(size)
        finally:
            self.length, self.name_size, self.room = length, 5, self.task.max_new_tokens
        return f"{prompt.text} {' '.join(prompt.answers)}\n"

    def count(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt; the example has no chat template around it."""
        return self.counter(prompt) if self.example else self.counter.text(prompt.text)

    def sample(self, size: int) -> Prompt:
        """Return a prompt behind the example."""
        if not self.example:
            return self.prompt(size)
        prompt = self.prompt(size)
        return attrs.evolve(prompt, context=f"{self._disguised_example()}\n{prompt.context}")

    def prompt(self, size: int) -> Prompt:
        """Return a prompt without the example."""
        names = self._names()
        value = self.streams.five_digits() if self.name_size == 5 else self._EXAMPLE_VALUE
        chain = chain_lines(names, value)
        lines = [NOISE] * size
        places = sorted(self.streams.draw.sample(range(size), len(chain)))
        for number, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + number, line)
        context = "\n".join(lines).replace(". \n", ".\n")
        return VT.fill(context, tuple(names), query=value, number=len(names))

    def _names(self) -> list[str]:
        wanted = VT_HOPS + 1
        names: list[str] = []
        while len(names) < wanted or len(set(names)) < wanted:
            names.append(self.streams.letters(string.ascii_uppercase, self.name_size))
        return names[:wanted]

    def _disguised_example(self) -> str:
        example = self.example
        for name in example.split()[-(VT_HOPS + 1) :]:
            # Also where the letters stand by chance, as officially.
            example = example.replace(name, self.streams.letters(string.ascii_uppercase, len(name)))
        return example.replace(self._EXAMPLE_VALUE, self.streams.five_digits())


class _CommonWords(OfficialMaker):
    _PROBE = 4096

    def __init__(
        self, task: Task, length: int, streams: Streams, count: Counter, texts: Texts
    ) -> None:
        super().__init__(task, length, streams, count, texts)
        self.words = list(texts.words())
        random.Random(streams.seed).shuffle(self.words)

    def estimate(self) -> int:
        """Return the upper end of the search, from one large prompt."""
        tokens_per_word = self.count(self.prompt(self._PROBE)) / self._PROBE
        return int(self.length // tokens_per_word) * 2

    def prompt(self, size: int) -> Prompt:
        """Return a prompt whose main list has ``size`` distinct words."""
        sizes = common_words(self.length)
        example, example_answers = self._list(sizes.shown, sizes.shown_common, sizes.shown_uncommon)
        context, answers = self._list(size, sizes.common, sizes.uncommon)
        shown = CWE.fill(example, ())
        prompt = CWE.fill(context, tuple(answers))
        few_shot = f"{shown.text} {numbered(example_answers)}\n"
        return attrs.evolve(prompt, context=few_shot + prompt.context)

    def _list(self, size: int, common: int, uncommon: int) -> tuple[str, list[str]]:
        enough = size <= len(self.words)
        words = self.streams.draw.sample(
            self.words if enough else self.texts.more_words(size), size
        )
        listed = words[:CWE_COMMON] * common + words[CWE_COMMON:] * uncommon
        self.streams.shuffle(listed)
        return numbered(listed), words[:CWE_COMMON]


class _FrequentWords(OfficialMaker):
    _WORD = 6

    def samples(self) -> Iterator[Prompt]:
        """Yield samples without end."""
        limit = self.length - self.room
        step = limit // 32
        if step < 1:
            raise self.too_short(None)
        vocabulary = self._vocabulary(limit)
        size = limit // self._WORD
        while self.count(self._listed(vocabulary, size)) < limit:
            size += step
        size -= step
        while True:
            self.begin_sample()
            vocabulary = self._vocabulary(limit)
            own = size
            while self.count(prompt := self._listed(vocabulary, own)) > limit:
                if own <= 0:
                    raise self.too_short(self.count(prompt) + self.room)
                own -= step
            yield prompt

    def _vocabulary(self, limit: int) -> list[str]:
        wanted = limit // 50
        words: list[str] = []
        while len(words) < wanted or len(set(words)) < wanted:
            words.append(self.streams.letters(string.ascii_lowercase, self._WORD))
        distinct = sorted(set(words))
        self.streams.shuffle(distinct)
        return ["...", *distinct[1:]]

    def _listed(self, vocabulary: list[str], size: int) -> Prompt:
        listed = [
            word for rank, word in enumerate(vocabulary, 1) for _ in range(frequency(rank, size))
        ]
        self.streams.shuffle(listed)
        return FWE.fill(" ".join(listed), tuple(vocabulary[1:4]))


class _Questions(OfficialMaker):
    task: QaTask

    def samples(self) -> Iterator[Prompt]:
        """Yield one sample per question."""
        questions = self.texts.questions_of(self.task).questions
        size = self.search(self.estimate(), self.length, self.room)
        for _ in questions:
            self.begin_sample()
            yield self.fitting(size)

    def prompt(self, size: int) -> Prompt:
        """Return the question with ``size`` documents; the search takes the first question."""
        found = self.texts.questions_of(self.task)
        question = found.questions[self.streams.index or 0]
        total = len(found.documents)
        if size >= total:
            # As officially: the documents come round, and the last round may lack the gold one.
            chosen = [i % total for i in range(size)]
        elif size - len(question.gold) > len(question.related):
            used = {*question.gold, *question.related}
            others = [i for i in range(total) if i not in used]
            count = max(0, size - len(question.gold) - len(question.related))
            chosen = [*question.gold, *question.related, *self.streams.draw.sample(others, count)]
        else:
            related = self.streams.draw.sample(question.related, size - len(question.gold))
            chosen = [*question.gold, *related]
        documents = [found.documents[i] for i in chosen]
        self.streams.shuffle(documents)
        return QA.fill(documents_text(documents), question.answers, query=question.text)


def _pairs(places: list[int]) -> Iterator[tuple[int, int]]:
    return zip(places, places[1:], strict=False)
