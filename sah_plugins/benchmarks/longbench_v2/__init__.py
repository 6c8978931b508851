"""LongBench v2: 503 questions of four choices about long and very long texts.

Bai et al., "LongBench v2: Towards Deeper Understanding and Reasoning on Realistic Long-context
Multitasks" (2024, arXiv:2412.15204). The task ``0shot`` asks for the letter at once. The task
``cot`` asks in two calls: for reasoning about the text, then, without the text, for the letter.
Prompts, token limits, temperature and extraction are those of THUDM/LongBench (2e00731).

Differs from the official code in one point: too long a prompt loses the middle of its text, and
never the question.
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
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark
from sah_plugins.data.files import Row
from sah_plugins.scorers.longbench_v2 import BLANK_CREDIT, COLUMNS, extract_answer, in_column
from sah_plugins.text.prompts import prompts_of

_CHOICES = tuple("ABCD")
_COLUMNS = (
    *("_id", "difficulty", "length", "question"),
    *(f"choice_{letter}" for letter in _CHOICES),
    *("answer", "context"),
)
_ANSWER_TOKENS = 128
_REASONING_TOKENS = 1024
_STAGE = "stage"


@attrs.frozen(kw_only=True, slots=False)
class LongBenchV2(TableBenchmark):
    """Questions of four choices about long texts, answered at once or after reasoning."""

    name: ClassVar[str] = "longbench-v2"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=True, truncation="middle", prefix="user")

    temperature: float = param(
        0.1, type=float, minimum=0, help="of sampling, officially 0.1; 0 is greedy"
    )
    extra_tokens: int = param(
        0,
        type=int,
        minimum=0,
        unit="tokens",
        help="room for answers and reasoning beyond the official limit; other harnesses give 20",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance that reads a few invented rows."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(invented_rows(), ensure_ascii=False, indent=1)
        (folder / "data.json").write_text(text, encoding="utf-8")
        return cls(data_dir=str(folder))

    def tasks(self) -> tuple[str, ...]:
        """Return the two ways to ask."""
        return ("0shot", "cot")

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a task."""
        official = _REASONING_TOKENS if task == "cot" else _ANSWER_TOKENS
        return TaskInfo(
            metric="longbench_v2_extract",
            max_new_tokens=official + self.extra_tokens,
            official_max_new_tokens=official,
            examples=503,
            source=DataSource(hub="THUDM/LongBench-v2", split="train", columns=_COLUMNS),
            licence="Apache-2.0",
        )

    def generation_for(self, task: str) -> Mapping[str, Any]:
        """Return sampling at the temperature."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature}

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the question of a row."""
        head, tail = prompts_of(__package__)[task].split("$DOC$")
        context = head + str(row["context"]).strip()
        fields = [("$Q$", row["question"])]
        fields += [(f"$C_{letter}$", row[f"choice_{letter}"]) for letter in _CHOICES]
        for mark, text in fields:
            tail = tail.replace(mark, str(text).strip())
        facts = {name: row.get(name) for name in ("domain", "sub_domain", "difficulty", "length")}
        yield Example(
            id=str(row["_id"]),
            context_id=text_id(context),
            context=context,
            question=tail,
            references=(str(row["answer"]),),
            max_new_tokens=self.info(task).max_new_tokens,
            task=task,
            facts=facts,
        )

    def follow_up(self, example: Example, prediction: str) -> Example | None:
        """Return the question for the letter after reasoning; None after that."""
        if example.task != "cot" or example.facts.get(_STAGE):
            return None
        head, rest = prompts_of(__package__)["cot_answer"].split("$QUESTION$")
        # The first prompt ends in the question and the cue, behind the end of the text.
        question = example.question.removeprefix("\n</text>\n\n")
        return attrs.evolve(
            example,
            id=f"{example.id}-answer",
            context_id=f"{example.id}-answer",
            context=head,
            question=question + rest.replace("$COT$", prediction.strip()),
            max_new_tokens=_ANSWER_TOKENS + self.extra_tokens,
            facts={**example.facts, _STAGE: "answer"},
        )

    def gold(self, example: Example) -> str:
        """Return the right letter in the prescribed words."""
        return f"The correct answer is ({example.references[0]})"

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``accuracy``, ``compensated`` (25 for no letter) and ``answered``."""
        letter = extract_answer(prediction)
        right = 100.0 * (letter == example.references[0])
        return {
            "accuracy": right,
            "compensated": 100.0 * BLANK_CREDIT if letter is None else right,
            "answered": 100.0 * (letter is not None),
        }

    def aggregate(self, samples: Sequence[ScoredExample]) -> dict[str, Any]:
        """Add ``columns``: number and scores by difficulty and length, as in the official table."""
        columns = {column: _column(samples, column) for column in COLUMNS[1:]}
        return {**super().aggregate(samples), "columns": columns}


def _column(samples: Sequence[ScoredExample], column: str) -> dict[str, Any]:
    chosen = [
        sample
        for sample in samples
        if in_column(column, str(sample.facts["difficulty"]), str(sample.facts["length"]))
    ]
    names = ("accuracy", "compensated")
    return {"n": len(chosen), **{n: mean(sample.scores[n] for sample in chosen) for n in names}}


def invented_rows() -> list[dict[str, str]]:
    """Return six invented rows in the official columns."""
    return [
        {
            "_id": f"row-{number}",
            "domain": "Single-Document QA",
            "sub_domain": "Invented",
            "difficulty": ("easy", "hard")[number % 2],
            "length": ("short", "medium", "long")[number % 3],
            "question": f" Which of the four is number {number}? ",
            **{f"choice_{letter}": f"Choice {letter} of {number}" for letter in _CHOICES},
            "answer": _CHOICES[number % 4],
            "context": f"\nAn invented text, number {number // 2}. " * 5,
        }
        for number in range(6)
    ]


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide LongBench v2."""
    return LongBenchV2
