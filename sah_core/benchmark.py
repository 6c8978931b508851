"""What a benchmark plugin provides: examples to answer, an official score, an aggregate.

A benchmark is an attrs-frozen class whose fields are declared with
:func:`sah_core.parameters.param`. It knows nothing about models: it is handed a tokenizer, to fit
a context to a number of tokens, and predictions, to score them. Scores are percentages, 0 to 100,
in every benchmark; a score that cannot be computed is ``None``, never NaN.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self
from typing import Protocol as StructuralType

import attrs

Truncation = Literal["none", "middle", "head"]
PrefixPlacement = Literal["assistant", "user"]


class Tokenizer(StructuralType):
    """The one thing that a benchmark may ask of a tokenizer: the tokens of a text."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return a mapping whose ``input_ids`` is the list of token ids of ``text``."""
        ...


@attrs.frozen(kw_only=True)
class Protocol:
    """How a benchmark's prompts meet the model; two numbers compare only under one protocol."""

    chat: bool
    """Whether the prompt is wrapped in the tokenizer's chat template, where it has one."""
    truncation: Truncation = "none"
    """What happens to a prompt above the token limit: an error, its middle or its head cut out."""
    prefix: PrefixPlacement = "assistant"
    """Whether the answer prefix opens the assistant's turn or ends the user's."""
    version: str = "1"
    """Changes whenever prompts or scoring change, so that old results are not mixed with new."""

    def to_plain(self) -> dict[str, str | bool]:
        """Return the fields as plain data."""
        return attrs.asdict(self)


def _as_tuple(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(texts)


@attrs.frozen(kw_only=True)
class Example:
    """One question about one context.

    The prompt is ``context + question``, then ``answer_prefix`` where the protocol places it; the
    texts already hold every separator. Examples of one context follow one another and share its
    ``context_id``, so that a runner prefills the context once.
    """

    id: str
    """Unique in the task and stable across runs: a killed run resumes by it."""
    context_id: str
    context: str
    question: str
    answer_prefix: str = ""
    references: tuple[str, ...] = attrs.field(converter=_as_tuple)
    """Accepted answers; how several of them count is the benchmark's metric."""
    max_new_tokens: int
    """Room for the answer, in tokens, as the benchmark prescribes."""
    task: str
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    """JSON-able extras that scoring, breakdowns or readers use (depth, length, language, …)."""


@attrs.frozen(kw_only=True)
class ScoredExample:
    """What :meth:`Benchmark.aggregate` sees of an answered example."""

    id: str
    task: str
    scores: Mapping[str, float]
    """The result of :meth:`Benchmark.score`: percentages, 0 to 100."""
    facts: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of(cls, example: Example, scores: Mapping[str, float]) -> "ScoredExample":
        """Return the scored form of ``example``."""
        return cls(id=example.id, task=example.task, scores=scores, facts=example.facts)


class Benchmark:
    """Base of benchmark plugins; subclasses are attrs-frozen, their fields the parameters.

    Equal parameters, tokenizer and seed give equal bytes: in any process, in any order of calls.
    """

    name: ClassVar[str]
    main_score: ClassVar[str]
    """The score that tables show, one of the keys of :meth:`score`."""
    protocol: ClassVar[Protocol]
    """The default protocol; :meth:`protocol_for` is what a runner asks."""

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol of ``task`` under these parameters."""
        return self.protocol

    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks, in the order in which they run by default."""
        raise NotImplementedError

    def for_task(self, task: str) -> Self:
        """Return this benchmark for one task alone, with the same examples.

        Results belong to what this returns: a parameter that only lists tasks is to be narrowed to
        ``task`` here, so that listing more tasks does not make new results of the old ones.
        """
        return self

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the examples of ``task``, those of one context consecutively.

        Args:
            task: one of :meth:`tasks`.
            tokenizer: the model's; only token counts may depend on it.
            seed: the only source of randomness.

        Raises:
            ParameterError: the task is unknown, or the parameters cannot be met.
        """
        raise NotImplementedError

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return the scores of one prediction by name, as percentages from 0 to 100."""
        raise NotImplementedError

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Return the metrics of a set of scored examples as JSON-able data.

        The form is ``{"n", "scores", "tasks": {task: {"n", "scores"}}}``, where scores are means
        over examples, as percentages; subclasses add breakdowns under keys of their own.
        """
        by_task: dict[str, list[ScoredExample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)
        return {
            **_summary(samples),
            "tasks": {task: _summary(group) for task, group in by_task.items()},
        }

    def revision(self) -> str:
        """Return what identifies the data: a hub revision, a hash, a generator's version."""
        raise NotImplementedError


def mean(values: Iterable[float]) -> float | None:
    """Return the arithmetic mean, or ``None`` of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _summary(samples: Sequence[ScoredExample]) -> dict[str, Any]:
    names = sorted({name for sample in samples for name in sample.scores})
    return {
        "n": len(samples),
        "scores": {
            name: mean(sample.scores[name] for sample in samples if name in sample.scores)
            for name in names
        },
    }
