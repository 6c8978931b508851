"""LongBench: 21 tasks of six categories in English, Chinese and code, and the 13 of LongBench-E.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding" (2023,
arXiv:2308.14508). Tasks of LongBench-E, whose lengths are spread evenly, end in ``_e``; their
scores are also given by length. Prompts, token limits and metrics are those of THUDM/LongBench
(2e00731); prompts go without a chat template where they do there.

Differs from the official code in three points. Too long a prompt loses the middle of its context,
and never the instructions. An answer to samsum is cut at its first line but generation does not
stop there; officially it also may not begin with a line break. ROUGE of long sentences is computed
where the official code fails and takes 0.
"""

from __future__ import annotations

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
    mean,
)
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark, texts
from sah_plugins.data.files import Row
from sah_plugins.scorers.longbench import BUCKETS, METRIC_OF_TASK, bucket_of, example_score
from sah_plugins.text.prompts import prompts_of

from . import invented
from .tasks import CATEGORIES, CLASSIFICATION, EXTENDED, SUFFIX, TASKS, WITHOUT_CHAT, base_of

_COLUMNS = ("_id", "input", "context", "answers", "length")


@attrs.frozen(kw_only=True, slots=False)
class LongBench(TableBenchmark):
    """21 long-context tasks of six categories, and 13 of them with evenly spread lengths."""

    name: ClassVar[str] = "longbench"
    main_score: ClassVar[str] = "score"
    protocol: ClassVar[Protocol] = Protocol(chat=True, truncation="middle", prefix="user")

    extra_tokens: int = param(
        0,
        type=int,
        minimum=0,
        unit="tokens",
        help="room for answers beyond the official limit; other harnesses give 20",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance that reads a few invented rows per task."""
        invented.write(folder)
        return cls(data_dir=str(folder))

    def tasks(self) -> tuple[str, ...]:
        """Return the 21 tasks, then the 13 of LongBench-E."""
        return (*TASKS, *EXTENDED)

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a task."""
        base = base_of(task)
        columns = _COLUMNS + (("all_classes",) if base.name in CLASSIFICATION else ())
        return TaskInfo(
            metric=METRIC_OF_TASK[base.name],
            max_new_tokens=base.max_new_tokens + self.extra_tokens,
            official_max_new_tokens=base.max_new_tokens,
            examples=base.extended_examples if task.endswith(SUFFIX) else base.examples,
            source=DataSource(
                hub="THUDM/LongBench",
                config=task,
                split="test",
                files=f"data.zip::data/{task}.jsonl",
                columns=columns,
                nested=("answers", "all_classes"),
            ),
            licence="MIT for LongBench; the data sets it draws on keep their own licences",
        )

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol: no chat template for few-shot and code tasks."""
        return attrs.evolve(self.protocol, chat=base_of(task).name not in WITHOUT_CHAT)

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the question of a row."""
        head, tail = _template(base_of(task).name)
        context = head + str(row["context"])
        facts: dict[str, Any] = {"length": int(row["length"]), "language": row.get("language")}
        if row.get("all_classes"):
            facts["all_classes"] = list(row["all_classes"])
        yield Example(
            id=str(row["_id"]),
            context_id=text_id(context),
            context=context,
            question=tail.replace("{input}", str(row["input"])),
            references=texts(row["answers"]),
            max_new_tokens=self.info(task).max_new_tokens,
            task=task,
            facts=facts,
        )

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``score``: the task's metric, the best over the references, in percent."""
        base = base_of(example.task).name
        classes = example.facts.get("all_classes")
        return {"score": 100.0 * example_score(base, prediction, example.references, classes)}

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Add ``buckets``: number and score of the samples of LongBench-E by length."""
        metrics = super().aggregate(samples)
        extended = [sample for sample in samples if sample.task.endswith(SUFFIX)]
        if extended:
            metrics["buckets"] = {bucket: _in_bucket(extended, bucket) for bucket in BUCKETS}
        return metrics

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return category means and their mean, and that of LongBench-E by length.

        A mean is given only where all of its tasks are there. Where the Chinese tasks are not, the
        English (and code) tasks stand for themselves, and so the other way round.
        """
        scores = {task: metrics["scores"].get("score") for task, metrics in tasks.items()}
        for languages, label in (
            (("en", "zh", "code"), ""),
            (("en", "code"), " (en)"),
            (("zh", "code"), " (zh)"),
        ):
            figures = _category_means(scores, languages, label)
            if figures:
                break
        return {**figures, **_length_means(tasks)}


def _in_bucket(samples: Sequence[ScoredExample], bucket: str) -> dict[str, Any]:
    scores = [
        sample.scores["score"] for sample in samples if bucket_of(sample.facts["length"]) == bucket
    ]
    return {"n": len(scores), "score": mean(scores)}


def _category_means(
    scores: Mapping[str, float | None], languages: Sequence[str], label: str
) -> dict[str, float | None]:
    tasks = [task for task in TASKS.values() if task.language in languages]
    if not all(task.name in scores for task in tasks):
        return {}
    return _means({task.name: scores[task.name] for task in tasks}, label, "overall")


def _length_means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    if not all(task in tasks for task in EXTENDED):
        return {}
    found = {}
    for bucket in BUCKETS:
        scores = {base_of(t).name: tasks[t]["buckets"][bucket]["score"] for t in EXTENDED}
        found[f"E {bucket}"] = _means(scores, "", "overall")["overall"]
    return found


def _means(scores: Mapping[str, float | None], label: str, overall: str) -> dict[str, float | None]:
    """The mean of each category over the tasks that have a score, and the mean of these."""
    categories = {
        category: mean(
            score
            for name, score in scores.items()
            if TASKS[name].category == category and score is not None
        )
        for category in CATEGORIES
    }
    known = [value for value in categories.values() if value is not None]
    named = {f"{category}{label}": value for category, value in categories.items()}
    return {**named, f"{overall}{label}": mean(known)}


def _template(task: str) -> tuple[str, str]:
    """The prompt before and after the context."""
    head, _, tail = prompts_of(__package__)[task].partition("{context}")
    return head, tail


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide LongBench."""
    return LongBench
