"""What a benchmark plugin provides: examples to answer, an official score, an aggregate.

A benchmark is an attrs-frozen class whose fields are declared with
:func:`sah_core.parameters.param`. It knows nothing about models: it is handed a tokenizer, to fit
a context to a number of tokens, and predictions, to score them. Scores are percentages, 0 to 100,
in every benchmark; a score that cannot be computed is ``None``, never NaN.

The least that a benchmark needs is ``name``, ``main_score``, ``protocol``, :meth:`Benchmark.load`
and :meth:`Benchmark.score`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from typing import Protocol as StructuralType

import attrs

from .errors import RequestError

if TYPE_CHECKING:
    from sah_core.requests import Likelihood

Truncation = Literal["none", "middle", "head"]
PrefixPlacement = Literal["assistant", "user"]
Reading = Literal["question", "decode"]


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


@attrs.frozen(kw_only=True)
class DataSource:
    """Where the rows of a task come from on a hub of data sets."""

    hub: str
    """The data set, such as ``THUDM/LongBench-v2``."""
    config: str | None = None
    split: str
    revision: str | None = None
    """The commit; None where none is pinned, so that the commit at hand is found and recorded."""
    files: str | None = None
    """Path of the file in the data set, for those whose rows come by a script that we never run:
    ``data/passkey.jsonl``, or ``data.zip::data/trec.jsonl`` inside an archive."""
    columns: tuple[str, ...]
    """The columns that every row must have; more do no harm."""
    nested: tuple[str, ...] = ()
    """Those of them that hold lists or mappings: JSON text in a CSV file."""


@attrs.frozen(kw_only=True)
class TaskInfo:
    """What a benchmark declares about one task, beside the task's `Protocol`."""

    metric: str
    """The name of the metric, as ``registry.scorers`` knows it or as the benchmark calls it."""
    max_new_tokens: int
    """Room for an answer under the benchmark's parameters."""
    official_max_new_tokens: int | None = None
    """What the official code gives; None where there is none."""
    examples: int | None = None
    """How many examples the whole task has officially; None where it is as large as asked for."""
    length: int | None = None
    """The most tokens of prompt and answer together, of a task that is made to a length."""
    source: DataSource | None = None
    """None for a task that is generated."""
    licence: str = ""
    """Of the data, in words."""


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
    predicted: Reading | None = None
    """Not None where ``question`` is no question but a text whose tokens are given and predicted:
    in one pass, as a question is read, or one by one, as generated tokens are. Such an example is
    scored by :meth:`Benchmark.score_text`."""

    def without_context(self) -> Self:
        """Return what a score may depend on: results keep this much of an example."""
        return attrs.evolve(self, context="")


@attrs.frozen(kw_only=True)
class ScoredExample:
    """What :meth:`Benchmark.aggregate` sees of an answered example."""

    id: str
    task: str
    scores: Mapping[str, float]
    """The result of :meth:`Benchmark.score`: percentages, 0 to 100, where no unit is declared."""
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
    units: ClassVar[Mapping[str, str]] = {}
    """Units of the scores, and of the figures of :meth:`summary`, that are no percentages: by name,
    such as nats per token of a loss."""
    independent: ClassVar[bool] = False
    """Whether examples are independent draws, so that the first N are as good as any N."""
    exceptions: ClassVar[Mapping[str, str]] = {}
    """What the conformance checks must not ask, with the reason: ``task/gold`` where :meth:`gold`
    does not score 100, ``task/empty`` where no answer does not score 0; ``*`` is any task."""

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return a small instance for the conformance checks.

        A benchmark of outside data writes a few invented rows in the official columns into
        ``folder`` and returns an instance that reads them.
        """
        return cls()

    @classmethod
    def check_golden(
        cls, content: Mapping[str, Any], folder: Path
    ) -> Iterable[tuple[str, str]] | None:
        """Check a golden file of this benchmark's own kind, such as samples of its generator.

        Args:
            content: of a JSON file that names no metric.
            folder: where the file lies.

        Returns:
            Per case its name and what differs, nothing if it agrees; None if the file is not for
            this benchmark.
        """
        return None

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol of ``task`` under these parameters."""
        return self.protocol

    def generation_for(self, task: str) -> Mapping[str, Any]:
        """Return generation arguments that ``task`` prescribes, such as a temperature.

        Those that an experiment gives come before them; both are part of what a result is.
        """
        return {}

    def info(self, task: str) -> TaskInfo | None:
        """Return what is declared about ``task``, without loading any data; None if nothing is."""
        return None

    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks, in the order in which they run by default.

        A benchmark of one task need not say more than its own name.
        """
        return (self.name,)

    def for_task(self, task: str) -> Self:
        """Return this benchmark for one task alone, with the same examples.

        Results belong to what this returns: a parameter that only lists tasks is to be narrowed to
        ``task`` here, so that listing more tasks does not make new results of the old ones.
        """
        return self

    def load(self, task: str) -> Iterator[Example]:
        """Yield the examples of ``task``, where they depend on neither tokenizer nor seed."""
        raise NotImplementedError(f"{type(self).__name__} defines neither load nor examples")

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the examples of ``task``, those of one context consecutively.

        They are made as they are asked for, so that memory stays flat over a task of any size.

        Args:
            task: one of :meth:`tasks`.
            tokenizer: the model's; only token counts may depend on it.
            seed: the only source of randomness.

        Raises:
            ParameterError: the task is unknown, or the parameters cannot be met.
            DataError: the data is missing, empty or not what it should be.
        """
        return self.load(task)

    def count(self, task: str) -> int | None:
        """Return how many examples :meth:`examples` yields; None if only making them tells."""
        return None

    def examples_at(
        self, task: str, tokenizer: Tokenizer, seed: int, indexes: Sequence[int]
    ) -> Iterator[Example]:
        """Yield those of :meth:`examples` at the ascending positions ``indexes``.

        This makes all up to the last and leaves out the others; a benchmark that can make one
        without the others does so here.
        """
        wanted = iter(indexes)
        index = next(wanted, None)
        if index is None:
            return
        for position, example in enumerate(self.examples(task, tokenizer, seed)):
            if position == index:
                yield example
                index = next(wanted, None)
                if index is None:
                    return

    def follow_up(self, example: Example, prediction: str) -> Example | None:
        """Return the next question of a chain, built from an answer; None if that was the last.

        The first example's id stands for the chain: :meth:`score` sees that example, and the
        prediction of the last one.
        """
        return None

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return the scores of one prediction by name, as percentages from 0 to 100.

        Depends on nothing but the example without its context and the prediction, so that finished
        results can be scored again; and needs no data.
        """
        raise NotImplementedError

    def score_text(self, example: Example, likelihood: "Likelihood") -> dict[str, float]:
        """Return the scores of a text that was predicted, see :attr:`Example.predicted`."""
        raise NotImplementedError(f"{type(self).__name__} has no texts to be predicted")

    def gold(self, example: Example) -> str:
        """Return an answer that scores 100; the first reference, unless the metric wants more."""
        return example.references[0]

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

    def submission(self, predictions: Mapping[str, Mapping[str, str]]) -> str:
        """Return the text of the file that the benchmark's leaderboard takes.

        Args:
            predictions: by task, by the id of the example.

        Raises:
            RequestError: the benchmark has no leaderboard, or it does not take these predictions.
        """
        raise RequestError(f"the benchmark {self.name} has no leaderboard that takes a file")

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return figures over several tasks, such as category means, from their metrics.

        They are percentages, except those of which :attr:`units` says otherwise.

        Args:
            tasks: by task, what :meth:`aggregate` returned of it; tasks that were not run or not
                finished are absent.
        """
        return {}

    def data_of(self, task: str) -> Mapping[str, Any] | None:
        """Read all data of ``task`` and say ``place``, ``revision`` and number of ``rows``.

        ``expected`` is how many rows there are officially, where that is known.

        Returns:
            None for a task without outside data.

        Raises:
            DataError: the data is missing, empty or not what it should be.
        """
        return None

    def fetch_data(self, task: str, folder: Path) -> Path | None:
        """Copy the data of ``task`` from the hub into ``folder``, as a ``data_dir`` has it.

        Returns:
            The file; None for a task without outside data.

        Raises:
            DataError: the hub does not give it.
        """
        return None

    def revision(self) -> str:
        """Return what identifies the data: a hub revision, a hash, a generator's version.

        By default only that it is this version of the protocol's data: a benchmark whose data can
        change by itself must say more.

        Raises:
            DataError: the data is not there.
        """
        return f"{self.name}-{self.protocol.version}"


def spread(count: int, size: int, seed: int) -> list[int]:
    """Return ``size`` of the positions 0 to ``count - 1``, ascending and spread evenly over them.

    Which ones depends on the seed, and those of a smaller size are among those of a larger one.
    They are the first of a van der Corput sequence, turned by an offset that the seed draws.
    """
    if size >= count:
        return list(range(count))
    bits = (count - 1).bit_length()
    # The fractional part of seed times the golden ratio spreads the offsets of successive seeds.
    offset = math.modf((seed + 0.5) * 0.6180339887498949)[0]
    chosen: dict[int, None] = {}
    for step in range(1 << bits):
        fraction = int(format(step, f"0{bits}b")[::-1], 2) / (1 << bits) if bits else 0.0
        if len(chosen) == size:
            break
        chosen[int((fraction + offset) % 1.0 * count)] = None
    return sorted(chosen)


def mean(values: Iterable[float]) -> float | None:
    """Return the arithmetic mean, the same in any order, or ``None`` of nothing."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else None


def _summary(samples: Sequence[ScoredExample]) -> dict[str, Any]:
    names = sorted({name for sample in samples for name in sample.scores})
    return {
        "n": len(samples),
        "scores": {
            name: mean(sample.scores[name] for sample in samples if name in sample.scores)
            for name in names
        },
    }
