"""The 13 tasks of RULER: their settings, and the wording of their prompts.

Settings and wording are those of NVIDIA/RULER at commit c3f5e3b (Apache-2.0).
"""

from math import pi
from typing import Literal

import attrs

from sah_plugins.text.fitting import PromptMeter

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""A unit of the noise haystack."""

ItemKind = Literal["words", "numbers", "uuids"]
HaystackKind = Literal["noise", "essay", "needle"]


@attrs.frozen
class Prompt:
    """One sample: a prompt in its three parts, and what is to be answered."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def input(self) -> str:
        """The prompt without the answer prefix: the field ``input`` of RULER's files."""
        return self.context + self.question

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.question + self.answer_prefix


@attrs.frozen
class Counter:
    """Counts tokens."""

    meter: PromptMeter

    def __call__(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt as the model gets it, its answer prefix included."""
        return self.meter.prompt_tokens(prompt.input, prompt.answer_prefix)

    def text(self, text: str) -> int:
        """Return the tokens of a text by itself."""
        return self.meter.text_tokens(text)


@attrs.frozen
class Wording:
    """The three parts of a prompt with places for ``str.format``."""

    head: str
    question: str
    answer_prefix: str

    def fill(self, context: str, answers: tuple[str, ...], **fields: str | int) -> Prompt:
        """Return the prompt about ``context``."""
        return Prompt(
            context=self.head.format(**fields) + context + "\n",
            question=self.question.format(**fields),
            answer_prefix=self.answer_prefix.format(**fields),
            answers=answers,
        )


@attrs.frozen(kw_only=True)
class Task:
    """One of the 13 tasks.

    ``max_new_tokens`` is the official room for the answer; it counts in the length of a sample.
    """

    name: str
    max_new_tokens: int
    needs_words: bool = False
    needs_essay: bool = False
    match: Literal["all", "part"] = "all"


@attrs.frozen(kw_only=True)
class NiahTask(Task):
    """Needles in a haystack."""

    haystack: HaystackKind
    key_kind: ItemKind = "words"
    value_kind: ItemKind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def wording(self) -> Wording:
        """One value is asked for in the singular."""
        return NIAH_ONE if self.queries * self.values == 1 else NIAH_MANY

    @property
    def value_noun(self) -> str:
        """What the prompt calls the values."""
        return self.value_kind[:-1] if self.queries * self.values == 1 else self.value_kind


@attrs.frozen(kw_only=True)
class QaTask(Task):
    """Questions about documents."""

    form: Literal["squad", "hotpot"]


def _niah(
    name: str,
    haystack: HaystackKind,
    *,
    key_kind: ItemKind = "words",
    value_kind: ItemKind = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> NiahTask:
    return NiahTask(
        name=name,
        max_new_tokens=128,
        needs_words=key_kind == "words",
        needs_essay=haystack == "essay",
        haystack=haystack,
        key_kind=key_kind,
        value_kind=value_kind,
        keys=max(keys, queries),
        values=values,
        queries=queries,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _niah("niah_single_1", "noise"),
        _niah("niah_single_2", "essay"),
        _niah("niah_single_3", "essay", value_kind="uuids"),
        _niah("niah_multikey_1", "essay", keys=4),
        _niah("niah_multikey_2", "needle"),
        _niah("niah_multikey_3", "needle", key_kind="uuids", value_kind="uuids"),
        _niah("niah_multivalue", "essay", values=4),
        _niah("niah_multiquery", "essay", queries=4),
        Task(name="vt", max_new_tokens=30),
        Task(name="cwe", max_new_tokens=120, needs_words=True),
        Task(name="fwe", max_new_tokens=50),
        QaTask(name="qa_1", max_new_tokens=32, match="part", form="squad"),
        QaTask(name="qa_2", max_new_tokens=32, match="part", form="hotpot"),
    )
}

NIAH_MANY = Wording(
    "Some special magic {noun} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun} afterwards.\n",
    "What are all the special magic {noun} for {query} mentioned in the provided text?",
    " The special magic {noun} for {query} mentioned in the provided text are",
)
NIAH_ONE = Wording(
    "A special magic {noun} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {noun} afterwards.\n",
    "What is the special magic {noun} for {query} mentioned in the provided text?",
    " The special magic {noun} for {query} mentioned in the provided text is",
)
VT = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {number} "
    "variables are assigned the value {query}, they are: ",
)
CWE = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_QA_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)
QA = Wording(
    f"{_QA_INSTRUCTION}\n\nThe following are given documents.\n\n",
    f"\n{_QA_INSTRUCTION}\n\nQuestion: {{query}}",
    " Answer:",
)

VT_HOPS = 4
CWE_COMMON = 10
CWE_SHORT = 4096
"""Below this length cwe has shorter lists."""
_FWE_ALPHA = 2.0
_ZETA_2 = pi**2 / 6


@attrs.frozen
class CommonWords:
    """The sizes of the word lists of cwe.

    Attributes:
        shown: Distinct words of the list of the example.
        shown_common: How often its common words come.
        shown_uncommon: How often its others come.
        common: How often the common words of the main list come.
        uncommon: How often its others come.
    """

    shown: int
    shown_common: int
    shown_uncommon: int
    common: int
    uncommon: int


def common_words(length: int) -> CommonWords:
    """Return the sizes of the word lists of a prompt of so many tokens."""
    return CommonWords(20, 3, 1, 6, 1) if length < CWE_SHORT else CommonWords(40, 10, 3, 30, 3)


def frequency(rank: int, size: int) -> int:
    """Return how often the word of a rank, from 1, comes among ``size`` words of fwe."""
    return int(size * rank**-_FWE_ALPHA / _ZETA_2)


def needle(kind: ItemKind, key: str, value: str) -> str:
    """Return the sentence that gives ``value`` to ``key``; the noun stands in the plural always."""
    return f"One of the special magic {kind} for {key} is: {value}."


def enumeration(items: list[str]) -> str:
    """Return ``a``, ``a, and b``, ``a, b, and c``."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])}, and {items[-1]}"


def numbered(words: list[str]) -> str:
    """Return ``1. first 2. second``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def chain_lines(names: list[str], value: str) -> list[str]:
    """Return the assignments that pass ``value`` from name to name; copies end in a space."""
    first = f"VAR {names[0]} = {value}"
    copies = [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False)]
    return [first, *copies]


def documents_text(documents: list[str]) -> str:
    """Return the documents under their numbers."""
    return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
