r"""AIME: 30 problems a year whose answers are integers from 0 to 999, each asked several times.

The American Invitational Mathematics Examination of the Mathematical Association of America. There
is no official prompt, limit or scorer. By default a problem is asked with a request for a boxed
answer, eight samples at temperature 0.6; the integer in the last ``\boxed{…}`` counts, whose braces
are matched, or else the last integer of the last line. ``prompt=lm-eval`` asks as
lm-evaluation-harness does for 2025, and ``lm_eval`` is its score.

Each sample is an example with an id, and so a seed, of its own; the problem is read once. The
metrics of a year add pass@1 with a 95 % interval, unbiased pass@k (Chen et al., 2021) and the
majority's answer. ``extracted`` is the share of answers with an integer in a box.
"""

from __future__ import annotations

import json
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
from sah_core.errors import DataError, ParameterError
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark
from sah_plugins.data.files import Row
from sah_plugins.data.table import HubTable, Table, find
from sah_plugins.scorers.aime import GREATEST, SCORERS, answer_of

from .estimates import interval, majority_share, pass_at_k

_PROBLEMS = 30
_TOKENS = 32768
_BOXED, _LM_EVAL = "boxed", "lm-eval"

_SOURCES: Mapping[str, DataSource] = {
    "2024": DataSource(
        hub="Maxwell-Jia/AIME_2024", split="train", columns=("ID", "Problem", "Answer")
    ),
    "2025": DataSource(hub="math-ai/aime25", split="test", columns=("problem", "answer")),
    "2026": DataSource(hub="math-ai/aime26", split="test", columns=("problem", "answer")),
}
_PROMPTS: Mapping[str, tuple[str, str]] = {
    _BOXED: (
        "Solve the following AIME (American Invitational Mathematics Examination) problem.\n\n"
        "Problem: {problem}\n\n"
        "Instructions:\n- The answer should be an integer between 0 and 999\n"
        "- You must wrap your final answer in \\boxed{...} format",
        "\n\nWhat is the answer to this problem?",
    ),
    _LM_EVAL: ("Question: {problem}", "\nAnswer:"),
}


@attrs.frozen(kw_only=True, slots=False)
class Aime(TableBenchmark):
    """Problems of the AIME, several samples each: pass@1 with its interval, pass@k, majority."""

    name: ClassVar[str] = "aime"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=True, truncation="none", prefix="user")
    units: ClassVar[Mapping[str, str]] = {"answer": "integer"}
    one_per_row: ClassVar[bool] = False

    years: tuple[int, ...] = param(
        (2024, 2025),
        type=tuple[int, ...],
        minimum=2024,
        maximum=2026,
        help="which years are tasks",
        selects=True,
    )
    samples: int = param(8, type=int, minimum=1, help="answers per problem")
    temperature: float = param(0.6, type=float, minimum=0, help="of sampling; 0 is greedy")
    top_p: float = param(
        0.95, type=float, minimum=0, maximum=1, exclusive_minimum=True, help="of sampling"
    )
    prompt: str = param(
        _BOXED,
        type=str,
        choices=(_BOXED, _LM_EVAL),
        help="a request for a boxed answer, or lm-evaluation-harness' prompt of 2025",
    )
    max_new_tokens: int = param(
        _TOKENS, type=int, minimum=1, unit="tokens", help="room for reasoning and answer"
    )

    def __attrs_post_init__(self) -> None:
        if self.temperature == 0 and self.samples > 1:
            raise ParameterError(
                self.name, "samples", self.samples, "1 where temperature is 0: greedy answers agree"
            )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance of three samples that reads a few invented rows per year."""
        folder.mkdir(parents=True, exist_ok=True)
        for year in _SOURCES:
            lines = (json.dumps(row, ensure_ascii=False) for row in invented_rows(year))
            (folder / f"{year}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return cls(data_dir=str(folder), samples=3, years=(2024, 2025, 2026))

    def tasks(self) -> tuple[str, ...]:
        """Return the years."""
        return tuple(str(year) for year in self.years)

    def for_task(self, task: str) -> Self:
        """Return this benchmark for one year."""
        chosen = super().for_task(task)
        return attrs.evolve(chosen, years=(int(task),)) if task in self.tasks() else chosen

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a year."""
        return TaskInfo(
            metric="aime_integer",
            max_new_tokens=self.max_new_tokens,
            examples=_PROBLEMS * self.samples,
            source=_SOURCES[task],
            licence="problems of the Mathematical Association of America",
        )

    def generation_for(self, task: str) -> Mapping[str, Any]:
        """Return sampling at the temperature."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}

    def table(self, task: str) -> Table:
        """Return the problems of a year; a local folder has them as ``2025.jsonl`` and the like."""
        if self.data_dir is None:
            return super().table(task)
        source, owner = attrs.evolve(self.source(task), config=task), f"{self.name} {task}"
        folder = Path(self.data_dir).expanduser()
        if not folder.is_dir():
            raise DataError(owner, str(folder), "no such folder: expected the data_dir to be one")
        return find(source, owner, [folder / self.name, folder])

    def fetch_data(self, task: str, folder: Path) -> Path:
        """Copy the problems of a year from the hub, into a folder of the year's name."""
        table = HubTable(owner=f"{self.name} {task}", source=self.source(task))
        return table.save(folder / self.name / task)

    def count(self, task: str) -> int:
        """Return the number of samples of all problems."""
        return len(self.table(task)) * self.samples

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the samples of a problem."""
        source = _SOURCES[task]
        text, answer = (row[name] for name in source.columns[-2:])
        name = str(row.get("ID") or index + 1)
        head, question = _PROMPTS[self.prompt]
        for number in range(self.samples):
            yield Example(
                id=f"{name}-{number}",
                context_id=name,
                context=head.replace("{problem}", str(text)),
                question=question,
                references=(str(self._right(task, index, answer)),),
                max_new_tokens=self.max_new_tokens,
                task=task,
                facts={"problem": name, "sample": number},
            )

    def _right(self, task: str, index: int, answer: object) -> int:
        text = str(answer).strip()
        if text.isascii() and text.isdigit() and int(text) <= GREATEST:
            return int(text)
        problem = f"row {index}: the answer is {answer!r}: expected an integer from 0 to {GREATEST}"
        raise DataError(f"{self.name} {task}", self.table(task).place, problem)

    def gold(self, example: Example) -> str:
        """Return the answer in a box."""
        return f"\\boxed{{{example.references[0]}}}"

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``accuracy``, ``extracted``, ``lm_eval`` and the ``answer``, if there is one."""
        number, boxed = answer_of(prediction)
        scores = {
            "accuracy": SCORERS["aime_integer"].percent(prediction, example.references),
            "extracted": 100.0 * boxed,
            "lm_eval": SCORERS["aime_lm_eval"].percent(prediction, example.references),
        }
        return scores if number is None else {**scores, "answer": float(number)}

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Add ``pass@1`` with its interval, ``pass@k`` and ``majority`` to the means, by year."""
        metrics = super().aggregate(samples)
        for summary in (metrics, *metrics["tasks"].values()):
            summary["scores"].pop("answer", None)
        for task, summary in metrics["tasks"].items():
            summary.update(_estimates([s for s in samples if s.task == task]))
        if len(metrics["tasks"]) == 1:
            metrics.update(_estimates(samples))
        return metrics

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return pass@k and the majority's score over all years, each problem counting once."""
        years = [metrics for metrics in tasks.values() if metrics.get("problems")]
        if len(years) < 2:
            return {}
        total = sum(metrics["problems"] for metrics in years)
        known = [k for k in years[0]["pass@k"] if all(k in metrics["pass@k"] for metrics in years)]
        figures = {f"pass@{k}": [(m["problems"], m["pass@k"][k]) for m in years] for k in known}
        figures["majority"] = [(m["problems"], m["majority"]) for m in years]
        return {
            name: sum(count * value for count, value in pairs) / total
            for name, pairs in figures.items()
        }


def _estimates(samples: Sequence[ScoredExample]) -> dict[str, Any]:
    """Figures of one year in percent; a problem counts as much as another."""
    problems: dict[str, list[ScoredExample]] = {}
    for sample in samples:
        problems.setdefault(str(sample.facts["problem"]), []).append(sample)
    if not problems:
        return {}
    groups = list(problems.values())
    right = [sum(sample.scores["accuracy"] > 0 for sample in group) for group in groups]
    shares = [count / len(group) for count, group in zip(right, groups, strict=True)]
    bounds = interval(shares, len(samples))
    least = min(len(group) for group in groups)
    ks = [k for k in (2**power for power in range(least.bit_length())) if k <= least]
    return {
        "problems": len(groups),
        "pass@1": {
            "value": _percent(shares),
            "interval": None if bounds is None else [100.0 * bound for bound in bounds],
        },
        "pass@k": {
            str(k): _percent(
                pass_at_k(len(group), count, k) for count, group in zip(right, groups, strict=True)
            )
            for k in ks
        },
        "majority": _percent(_majority(group) for group in groups),
    }


def _majority(group: Sequence[ScoredExample]) -> float:
    answers = [s.scores.get("answer") for s in group]
    right = next((s.scores["answer"] for s in group if s.scores["accuracy"] > 0), None)
    return 0.0 if right is None else majority_share(answers, right)


def _percent(shares: Any) -> float | None:
    return mean(100.0 * share for share in shares)


def invented_rows(year: str) -> list[dict[str, str]]:
    """Return three invented problems in the columns of a year's data."""
    problems = (("Find 2 + 31.", "033"), ("Find $7^2$.", "49"), ("Find \\{x\\} - x + 1.", "1"))
    if year == "2024":
        return [
            {"ID": f"2024-I-{n}", "Problem": p, "Solution": "", "Answer": a}
            for n, (p, a) in enumerate(problems, 1)
        ]
    return [{"id": str(n), "problem": p, "answer": a} for n, (p, a) in enumerate(problems)]


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide AIME."""
    return Aime
