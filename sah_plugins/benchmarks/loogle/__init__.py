"""LooGLE: seven tasks on documents of more than 24,000 tokens that are younger than their models.

Li et al., "LooGLE: Can Long-Context Language Models Understand Long Contexts?" (2023,
arXiv:2311.04939). Prompts, token limits, the repetition penalty and the automatic metrics are those
of bigai-nlco/LooGLE (6734382). The long-dependency questions are four tasks by their ``type``; the
table over tasks has their mean, which the official code gives alone.

``score`` is recall of ROUGE-L for questions and summaries, the share of masks filled rightly for
clozes, and the mean similarity of four for timelines. Judging by another language model is left
out. Neither data nor answers are ever run as code. Metrics differ from the official ones where
`sah_plugins.scorers.loogle` says so.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
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
    mean,
)
from sah_core.errors import DataError, MissingLibraryError, short_repr
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark
from sah_plugins.data.files import Row
from sah_plugins.scorers.loogle import DEVIATIONS, SCORERS
from sah_plugins.text.prompts import prompts_of

from . import invented
from .tasks import CLOZE, KINDS, LONG_QA, REORDER, TASKS

_log = logging.getLogger(__name__)

_COLUMNS = ("input", "qa_pairs", "output")
_NO_PAIRS = "none"
_TEXT_METRICS: Mapping[str, tuple[str, dict[str, str]]] = {
    "bleu1": ("loogle_bleu", {"key": "bleu1"}),
    "bleu4": ("loogle_bleu", {"key": "bleu4"}),
    "rouge_1": ("loogle_rouge_recall", {"key": "rouge-1"}),
    "rouge_2": ("loogle_rouge_recall", {"key": "rouge-2"}),
    "rouge_l": ("loogle_rouge_recall", {"key": "rouge-l"}),
}
_METEOR, _BERTSCORE = "loogle_meteor", "loogle_bertscore"


@attrs.frozen(kw_only=True, slots=False)
class Loogle(TableBenchmark):
    """Questions, clozes, timelines and summaries of long recent documents."""

    name: ClassVar[str] = "loogle"
    main_score: ClassVar[str] = "score"
    protocol: ClassVar[Protocol] = Protocol(chat=False, truncation="middle", prefix="user")
    one_per_row: ClassVar[bool] = False

    repetition_penalty: float = param(
        2.0,
        type=float,
        minimum=0,
        exclusive_minimum=True,
        help="of generation, officially 2; 1 is none, as other harnesses have it",
    )
    meteor: bool = param(
        True, type=bool, help="score METEOR too, which needs WordNet; left out where that is not"
    )
    bertscore: bool = param(
        False, type=bool, help="score BERTScore too: the package bert-score and its model"
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance that reads a few invented rows."""
        invented.write(folder)
        return cls(data_dir=str(folder))

    def tasks(self) -> tuple[str, ...]:
        """Return the seven tasks."""
        return tuple(TASKS)

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a task."""
        known = TASKS[task]
        return TaskInfo(
            metric=known.metric,
            max_new_tokens=known.max_new_tokens,
            official_max_new_tokens=known.max_new_tokens,
            examples=known.examples,
            source=DataSource(
                hub="bigainlco/LooGLE",
                config=known.config,
                split="test",
                files=f"data.zip::{known.config}.json",
                columns=_COLUMNS,
                nested=(),
            ),
            licence="CC BY-SA 4.0",
        )

    def generation_for(self, task: str) -> Mapping[str, Any]:
        """Return the repetition penalty."""
        if self.repetition_penalty == 1.0:
            return {}
        return {"repetition_penalty": self.repetition_penalty}

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the questions of a row that belong to the task."""
        known = TASKS[task]
        head, _, tail = prompts_of(__package__)[known.prompt].partition("{input}")
        context = head + str(row["input"])
        for number, (question, references) in enumerate(self._pairs(task, index, row)):
            facts = {"masks": len(json.loads(references[0]))} if task == CLOZE else {}
            yield Example(
                id=f"{task}-{index}-{number}",
                context_id=text_id(context),
                context=context,
                question=tail.replace("{Q}", question),
                references=references,
                max_new_tokens=known.max_new_tokens,
                task=task,
                facts=facts,
            )

    def _pairs(self, task: str, index: int, row: Row) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The questions of a row and their answers; a cloze's answer is JSON."""
        if TASKS[task].prompt == "summary":
            yield "", (str(row["output"]),)
            return
        for pair in self._parsed(task, index, row["qa_pairs"]):
            if TASKS[task].kinds:
                kind = str(pair.get("type"))
                if kind not in KINDS:
                    what = f"a question has the type {kind!r}: expected one of {', '.join(KINDS)}"
                    raise self._wrong(task, index, what)
                if KINDS[kind] != task:
                    continue
            answer = pair["A"]
            if task == CLOZE:
                answer = self._names(index, answer)
            yield str(pair["Q"]), (str(answer),)

    def _parsed(self, task: str, index: int, pairs: object) -> list[dict[str, Any]]:
        """The list of questions, which the data set has as a Python literal in a text."""
        if isinstance(pairs, str):
            if pairs == _NO_PAIRS:
                return []
            try:
                pairs = ast.literal_eval(pairs)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pairs = None
        if not isinstance(pairs, list) or not all(
            isinstance(pair, dict) and {"Q", "A"} <= pair.keys() for pair in pairs
        ):
            what = f"the column qa_pairs holds {short_repr(pairs)}: expected a list of questions, "
            raise self._wrong(task, index, what + "each with Q and A")
        return pairs

    def _names(self, index: int, answer: object) -> str:
        if not isinstance(answer, dict) or not answer:
            what = f"the answer of a cloze is {short_repr(answer)}: expected names by mask"
            raise self._wrong(CLOZE, index, what)
        names = {str(mask): str(name) for mask, name in answer.items() if name is not None}
        if not names:
            raise self._wrong(CLOZE, index, "the answer of a cloze names nothing for its masks")
        return json.dumps(names, ensure_ascii=False)

    def _wrong(self, task: str, index: int, problem: str) -> DataError:
        return DataError(f"{self.name} {task}", self.table(task).place, f"row {index}: {problem}")

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``score`` and the automatic metrics of the task, in percent."""
        if example.task == CLOZE:
            return _cloze_scores(example, prediction)
        scores = {
            name: SCORERS[metric].percent(prediction, example.references, **keywords)
            for name, (metric, keywords) in _TEXT_METRICS.items()
        }
        if self.meteor:
            try:
                scores["meteor"] = SCORERS[_METEOR].percent(prediction, example.references)
            except MissingLibraryError as error:
                _say_once(f"no METEOR: {error}")
        if self.bertscore:
            scores["bertscore"] = SCORERS[_BERTSCORE].percent(prediction, example.references)
        if example.task == REORDER:
            return _reorder_scores(example, prediction) | scores
        return {"score": scores["rouge_l"], **scores}

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Return the means; scores of clozes are those over all masks of all questions."""
        metrics = super().aggregate(samples)
        clozes = [sample for sample in samples if sample.task == CLOZE]
        if clozes:
            means = {name: _over_masks(clozes, name) for name in ("score", "partial")}
            metrics["tasks"][CLOZE]["scores"].update(means)
            if len(clozes) == len(samples):
                metrics["scores"].update(means)
        return metrics

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the metrics of all long-dependency questions together, where all are there."""
        if not all(task in tasks and tasks[task]["n"] for task in LONG_QA):
            return {}
        counts = {task: int(tasks[task]["n"]) for task in LONG_QA}
        return {
            f"longdep_qa {name}": sum(
                counts[task] * tasks[task]["scores"][name] for task in LONG_QA
            )
            / sum(counts.values())
            for name in (*_TEXT_METRICS, "meteor")
            if all(name in tasks[task]["scores"] for task in LONG_QA)
        }


def _cloze_scores(example: Example, prediction: str) -> dict[str, float]:
    right = [json.loads(example.references[0])]
    return {
        "score": SCORERS["loogle_cloze_exact"].percent(prediction, right),
        "partial": SCORERS["loogle_cloze_partial"].percent(prediction, right),
    }


def _reorder_scores(example: Example, prediction: str) -> dict[str, float]:
    scorer = SCORERS["loogle_reorder_similarity"]
    found = {
        fn.removesuffix("_deviation"): scorer.percent(prediction, example.references, fn=fn)
        for fn in DEVIATIONS
    }
    return {"score": sum(found.values()) / len(found), **found}


def _over_masks(samples: Sequence[ScoredExample], name: str) -> float | None:
    return mean(
        sample.scores[name] for sample in samples for _ in range(int(sample.facts["masks"]))
    )


@cache
def _say_once(line: str) -> None:
    _log.warning("%s", line)


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide LooGLE."""
    return Loogle
