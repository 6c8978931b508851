"""InfiniteBench: 12 tasks of about 100,000 tokens each, from books to code and arithmetic.

Zhang et al., "∞Bench: Extending Long Context Evaluation Beyond 100K Tokens" (2024,
arXiv:2402.13718). Prompts are those of OpenBMB/InfiniteBench (88b3daa) for open models, which are
texts to go on with and so have no chat template; token limits and metrics are those of
``compute_scores.py`` there.

``variant=kvpress`` asks and scores as NVIDIA/kvpress (8bb29b9) does and what derives from it: other
prompts in the chat template, their cue at the start of the answer, 20 tokens more, three metrics
that accept more answers.

Differs from these codes in two points. Too long a prompt loses the middle of its context, and never
the instructions. Labels keep their types, so that numbers are compared as numbers (as texts, as the
peers' data has them, every answer to code_run is wrong).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from sah_core import hookimpl
from sah_core.benchmark import Benchmark, DataSource, Example, Protocol, TaskInfo, mean
from sah_core.errors import DataError, short_repr
from sah_core.hashing import text_id
from sah_core.parameters import param
from sah_plugins.data.benchmark import TableBenchmark, texts
from sah_plugins.data.files import Row
from sah_plugins.scorers.infinitebench import scorer_of
from sah_plugins.text.prompts import prompts_of

from . import invented
from .tasks import CHOICE, INTEGERS, NUMBERS, TASKS

_COLUMNS = ("id", "context", "input", "answer")
_LETTERS = "ABCD"
_PEERS = "kvpress"
_PEERS_EXTRA_TOKENS = 20
_FIELD = re.compile(r"\{(\w+)\}")
_CALL = re.compile(r"(func_[0-9]+)\(-?[0-9]+\)")
_TARGET = re.compile(r"The .+ of")
_KV_CUE = "The value associated with the specified key is:"
_FIND_CUE = (
    "You should answer with only one number, no other words. The largest number of the list is:"
)


@attrs.frozen(kw_only=True, slots=False)
class InfiniteBench(TableBenchmark):
    """12 tasks on very long books, dialogues, code, numbers and hidden facts."""

    name: ClassVar[str] = "infinitebench"
    main_score: ClassVar[str] = "score"
    protocol: ClassVar[Protocol] = Protocol(chat=False, truncation="middle", prefix="user")
    exceptions: ClassVar[Mapping[str, str]] = {
        "longdialogue_qa_eng/gold": "the official scorer never finds a name of several words",
        "math_find/gold": "the official scorer passes over the sign of a number",
    }

    variant: str = param(
        "official",
        type=str,
        choices=("official", _PEERS),
        help="official prompts and metrics, or those of kvpress and what derives from it",
    )
    extra_tokens: int = param(
        0,
        type=int,
        minimum=0,
        unit="tokens",
        help="room for answers beyond the variant's limit, which is 20 more for kvpress",
    )

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return an instance that reads a few invented rows per task."""
        invented.write(folder)
        return cls(data_dir=str(folder))

    def tasks(self) -> tuple[str, ...]:
        """Return the 12 tasks."""
        return tuple(TASKS)

    def info(self, task: str) -> TaskInfo:
        """Return the declaration of a task."""
        known = TASKS[task]
        peers = _PEERS_EXTRA_TOKENS if self.variant == _PEERS else 0
        return TaskInfo(
            metric=f"infinitebench_{task}",
            max_new_tokens=known.max_new_tokens + peers + self.extra_tokens,
            official_max_new_tokens=known.max_new_tokens,
            examples=known.examples,
            source=DataSource(
                hub="xinrongzhang2022/InfiniteBench",
                split=task,
                files=f"{task}.jsonl",
                columns=_COLUMNS + (("options",) if task in CHOICE else ()),
                nested=("answer", "options"),
            ),
            licence="Apache-2.0 for InfiniteBench; books and scripts keep their own licences",
        )

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol of the variant: the peers use the chat template."""
        if self.variant == _PEERS:
            return Protocol(chat=True, truncation="middle", prefix="assistant")
        return self.protocol

    def row_examples(self, task: str, index: int, row: Row) -> Iterator[Example]:
        """Yield the question of a row."""
        template = prompts_of(__package__)[self.variant][task]
        fields = self._fields(task, index, row)
        context = _filled(template["context"], fields)
        question = _filled(template["question"], fields)
        answer_prefix = template["answer_prefix"]
        if not question.strip():
            # Two tasks of the peers' have no question; their cue stands for it.
            question, answer_prefix = answer_prefix, ""
        yield Example(
            id=f"{task}-{index}",
            context_id=text_id(context),
            context=context,
            question=question,
            answer_prefix=answer_prefix,
            references=self._label(task, index, row),
            max_new_tokens=self.info(task).max_new_tokens,
            task=task,
            facts={"id": str(row["id"])},
        )

    def _fields(self, task: str, index: int, row: Row) -> dict[str, str]:
        text = str(row["input"] or "")
        fields = {"context": str(row["context"]), "input": text}
        if task in CHOICE:
            options = texts(row["options"])
            if len(options) != len(_LETTERS):
                what = f"the column options holds {len(options)} texts: expected {len(_LETTERS)}"
                raise self._wrong(task, index, what)
            pairs = zip(_LETTERS, options, strict=True)
            fields |= {f"OPTION_{letter}": option for letter, option in pairs}
        if task == "code_run":
            call = self._found(_CALL, text, task, index, "a call such as func_1(2)")
            fields |= {"func_call": call[0], "func": call[1]}
        if task == "math_find":
            target = self._found(_TARGET, text, task, index, "'The ... of'")
            number = target[0].lower().removesuffix(" of")
            fields["prefix"] = f"What is {number} in the following list?"
            fields["kept_input"] = text.replace(_FIND_CUE, "")
        if task == "kv_retrieval":
            fields["bare_input"] = text.replace(_KV_CUE, "")
        return fields

    def _found(
        self, pattern: re.Pattern[str], text: str, task: str, index: int, what: str
    ) -> re.Match[str]:
        found = pattern.search(text)
        if found is None:
            raise self._wrong(
                task, index, f"the column input holds {text!r}: expected {what} in it"
            )
        return found

    def _label(self, task: str, index: int, row: Row) -> tuple[str, ...]:
        answer = row["answer"]
        if isinstance(answer, list) and answer and isinstance(answer[0], list):
            answer = answer[0]
        label = texts(answer)
        if not label:
            raise self._wrong(task, index, "the column answer is empty: expected the right answer")
        if task in NUMBERS:
            try:
                for text in label:
                    _number_of(task, text)
            except ValueError:
                what = f"the column answer holds {short_repr(answer)}: expected numbers"
                raise self._wrong(task, index, what) from None
        if task in CHOICE and len(label) == 1:
            options = texts(row["options"])
            if label[0] not in options:
                what = f"the answer {label[0]!r} is none of the options: expected one of {options}"
                raise self._wrong(task, index, what)
            return (label[0], _LETTERS[options.index(label[0])])
        return label

    def _wrong(self, task: str, index: int, problem: str) -> DataError:
        table = self.table(task)
        return DataError(f"{self.name} {task}", table.place, f"row {index}: {problem}")

    def gold(self, example: Example) -> str:
        """Return an answer that the official scorer takes for right, where there is one."""
        label = example.references
        if example.task == "math_calc":
            return ", ".join(label)
        if example.task == "code_debug":
            return f"{label[1]}. {label[0]}"
        return label[1] if example.task in CHOICE else label[0]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``score``: the task's metric in percent, as the variant has it."""
        task = example.task
        label: list[Any] = list(example.references)
        if task in NUMBERS:
            label = [_number_of(task, text) for text in label]
        return {"score": scorer_of(task, self.variant).percent(prediction, label)}

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the mean over the 12 tasks, where all of them are there."""
        if not all(task in tasks for task in TASKS):
            return {}
        scores = [tasks[task]["scores"].get("score") for task in TASKS]
        return {"overall": mean(score for score in scores if score is not None)}


def _number_of(task: str, text: str) -> int | float:
    if task in INTEGERS or re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text)


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with its fields filled in; braces in what is filled in mean nothing."""
    return _FIELD.sub(lambda found: fields[found[1]], template)


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide InfiniteBench."""
    return InfiniteBench
