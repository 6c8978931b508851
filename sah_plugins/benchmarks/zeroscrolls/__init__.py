"""ZeroSCROLLS: ten tasks of understanding long texts, without examples.

Shaham et al., "ZeroSCROLLS: A Zero-Shot Benchmark for Long Text Understanding" (2023,
arXiv:2305.14196). The validation split, of about 20 examples per task, has answers and is scored.
The test split has none: ``sah-bench export`` writes its predictions as the leaderboard takes
them. Prompts are the column ``input``, as it stands; token limits and metrics are the official
ones.

With ``max_tokens`` too long a prompt loses the end of its document, in whose place the official
separator stands, as in tau-nlp/zero_scrolls (c994676); otherwise the model's own limit takes
its middle out. ``chat=true`` asks as that code asks chat models: in the template, for no
explanation, without the cue at the end, except where nothing but the cue follows the document.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from sah_core import hookimpl
from sah_core.benchmark import (
    Benchmark,
    DataSource,
    Example,
    Protocol,
    ScoredExample,
    TaskInfo,
    Tokenizer,
    mean,
)
from sah_core.errors import DataError, ParameterError, RequestError
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark
from sah_plugins.data.files import Row
from sah_plugins.scorers.zeroscrolls import SCORERS, geometric_mean, rouge_parts
from sah_plugins.text.fitting import PromptMeter, largest_size

from . import invented
from .tasks import SUMMARIES, TASKS

_PLACES = (
    "document_start_index",
    "document_end_index",
    "query_start_index",
    "query_end_index",
)
_COLUMNS = ("id", "input", "output", *_PLACES, "truncation_seperator")
_NO_EXPLANATION = "Do not provide any explanation."
_TEST = "test"
_HEADER = ("Task", "ID", "Prediction")


@attrs.frozen
class _Prompt:
    """A row's prompt in its parts: ``text`` up to ``document_end``, then the query."""

    text: str
    document_end: int
    query_start: int
    separator: str


@attrs.frozen(kw_only=True, slots=False)
class ZeroScrolls(TableBenchmark):
    """Summaries, questions and orders of long texts, asked without examples."""

    name: ClassVar[str] = "zeroscrolls"
    main_score: ClassVar[str] = "score"
    protocol: ClassVar[Protocol] = Protocol(chat=False, truncation="middle", prefix="user")
    one_per_row: ClassVar[bool] = False

    split: str = param(
        "validation",
        type=str,
        choices=("validation", _TEST),
        help="the small split with answers, or the test split, which only the leaderboard scores",
    )
    chat: bool = param(False, type=bool, help="ask as the official code asks chat models")
    max_tokens: int | None = param(
        None,
        type=int,
        minimum=1,
        unit="tokens",
        help="longest prompt: the document's end is cut off as the official code does",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance that reads a few invented rows per task."""
        invented.write(folder)
        return cls(data_dir=str(folder))

    def tasks(self) -> tuple[str, ...]:
        """Return the ten tasks."""
        return tuple(TASKS)

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a task."""
        known = TASKS[task]
        return TaskInfo(
            metric=known.metric,
            max_new_tokens=known.max_new_tokens,
            official_max_new_tokens=known.max_new_tokens,
            examples=known.test_examples if self.split == _TEST else None,
            source=DataSource(
                hub="tau/zero_scrolls",
                config=task,
                split=self.split,
                files=f"{task}.zip::{task}/{self.split}.jsonl",
                columns=_COLUMNS,
            ),
            licence="the data sets that it draws on keep their own licences",
        )

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol: the chat template if asked for."""
        return attrs.evolve(self.protocol, chat=self.chat)

    def load(self, task: str) -> Iterator[Example]:
        """Yield the examples, whole; the rows of one id are one example with several answers."""
        return self._all(task, None)

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the examples, cut to ``max_tokens`` if it is given."""
        return self._all(task, tokenizer if self.max_tokens is not None else None)

    def _all(self, task: str, tokenizer: Tokenizer | None) -> Iterator[Example]:
        table = self.table(task)
        answers: dict[str, list[str]] = {}
        for row in table.checked():
            given = answers.setdefault(str(row["id"]), [])
            if row["output"]:
                given.append(str(row["output"]))
        for index, row in enumerate(table.checked()):
            references = answers.pop(str(row["id"]), None)
            if references is not None:
                prompt = self._prompt(task, index, row)
                yield self._example(task, str(row["id"]), prompt, references, tokenizer)

    def _example(
        self,
        task: str,
        name: str,
        prompt: _Prompt,
        references: Sequence[str],
        tokenizer: Tokenizer | None,
    ) -> Example:
        context, question = self._cut(task, prompt, tokenizer)
        return Example(
            id=name,
            context_id=text_id(context),
            context=context,
            question=question,
            references=references,
            max_new_tokens=self.info(task).max_new_tokens,
            task=task,
        )

    def _prompt(self, task: str, index: int, row: Row) -> _Prompt:
        text = str(row["input"])
        _, document_end, query_start, query_end = places = [int(row[name]) for name in _PLACES]
        if not 0 <= places[0] <= document_end <= query_start <= query_end <= len(text):
            problem = f"row {index}: the places of document and query are {places}: expected them "
            problem += f"to ascend within the {len(text)} characters of the input"
            raise DataError(f"{self.name} {task}", self.table(task).place, problem)
        shift = 0
        if self.chat:
            if query_end > query_start and text[query_start:query_end].strip():
                text = text[:query_end]
            if task not in SUMMARIES:
                end = text.find("\n\n")
                text = f"{text[:end].strip()} {_NO_EXPLANATION}{text[end:]}"
                shift = len(_NO_EXPLANATION) + 1
        return _Prompt(
            text=text,
            document_end=document_end + shift,
            query_start=query_start + shift,
            separator=str(row["truncation_seperator"]),
        )

    def _cut(self, task: str, prompt: _Prompt, tokenizer: Tokenizer | None) -> tuple[str, str]:
        """Context and question, the document's end replaced by the separator if need be."""
        whole = prompt.text[: prompt.document_end], prompt.text[prompt.document_end :]
        if tokenizer is None or self.max_tokens is None:
            return whole
        meter, limit = PromptMeter(tokenizer, self.chat), self.max_tokens
        if meter.prompt_tokens(prompt.text, "") <= limit:
            return whole
        head, query = prompt.text[: prompt.query_start], prompt.text[prompt.query_start :]

        def fits(size: int) -> bool:
            text = head[:size] + prompt.separator + query
            return size <= len(head) and meter.prompt_tokens(text, "") <= limit

        if not fits(0):
            expected = f"at least the tokens of the query of every example of {task}"
            raise ParameterError(self.name, "max_tokens", limit, expected)
        size = largest_size(fits, min(len(head), 4 * limit))
        return head[:size] + prompt.separator, query

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``score`` in percent, with ROUGE its parts; only ``answered`` without answers."""
        if not example.references:
            return {"answered": 100.0 * bool(prediction.strip())}
        if example.task in SUMMARIES:
            parts = rouge_parts(prediction, example.references)
            return {"score": geometric_mean(parts), **parts}
        scorer = SCORERS[TASKS[example.task].metric]
        return {"score": scorer.percent(prediction, example.references)}

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Return the official scores: of a summary task the geometric mean of its three means."""
        metrics = super().aggregate(samples)
        for task, summary in metrics["tasks"].items():
            if task in SUMMARIES and "score" in summary["scores"]:
                summary["scores"]["score"] = geometric_mean(summary["scores"])
        scores = [summary["scores"].get("score") for summary in metrics["tasks"].values()]
        if scores and None not in scores:
            metrics["scores"]["score"] = mean(scores)
        return metrics

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the mean over the ten tasks, where all of them are there and scored."""
        scores = [tasks[task]["scores"].get("score") for task in TASKS if task in tasks]
        if len(scores) < len(TASKS) or None in scores:
            return {}
        return {"overall": mean(score for score in scores if score is not None)}

    def submission(self, predictions: Mapping[str, Mapping[str, str]]) -> str:
        """Return the CSV file of the leaderboard: ``Task``, ``ID`` and ``Prediction``.

        Raises:
            RequestError: The predictions are not of the test split, or not of all ten tasks.
        """
        if self.split != _TEST:
            raise RequestError(
                "the leaderboard of zeroscrolls takes predictions of the test split alone: run the "
                "benchmark as 'zeroscrolls(split=test)'"
            )
        missing = [task for task in TASKS if task not in predictions]
        if missing:
            raise RequestError(
                f"the leaderboard of zeroscrolls takes all ten tasks: no predictions of "
                f"{', '.join(missing)}"
            )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_HEADER)
        for task in TASKS:
            writer.writerows((task, name, answer) for name, answer in predictions[task].items())
        return text.getvalue()


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide ZeroSCROLLS."""
    return ZeroScrolls
