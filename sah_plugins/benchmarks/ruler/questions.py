"""Documents and questions for qa: our own, or files in the schema of SQuAD or of HotpotQA."""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import attrs

from sah_core.errors import ParameterError
from sah_core.hashing import text_id

Form = Literal["squad", "hotpot"]

_OWN = "own_questions.json"


@attrs.frozen
class Question:
    """A question and where its answer stands.

    Attributes:
        text: the question.
        answers: accepted answers.
        gold: the documents that come with it always, as indices.
        related: documents on the same subject, the first to be added.
        needed: those of ``gold`` without which it cannot be answered.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()
    needed: tuple[int, ...] = ()


@attrs.frozen
class QuestionSet:
    """The sorted distinct documents of a file, and its questions in order."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of all documents and questions, as 16 hexadecimal digits."""
        content = json.dumps([self.documents, [attrs.astuple(q) for q in self.questions]])
        return text_id(content)


def read_questions(parameter: str, path: str, form: Form) -> QuestionSet:
    """Read a JSON file in the official schema.

    Raises:
        ParameterError: there is no such file, or it has another schema or no questions.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        return parse_questions(content, form)
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    file = "SQuAD, like dev-v2.0.json" if form == "squad" else "HotpotQA, like dev_distractor_v1"
    raise ParameterError(
        "ruler", parameter, path, f"a JSON file in the schema of {file} ({reason})"
    )


def parse_questions(content: Any, form: Form) -> QuestionSet:
    """Return the questions of a file's content; raises what its parts raise when they are wrong."""
    found = _squad(content) if form == "squad" else _hotpot(content)
    if not found.questions:
        raise ValueError("no questions")
    return found


@cache
def own_questions(form: Form) -> QuestionSet:
    """Return the project's own documents and questions, brought into the official schema.

    Of HotpotQA's kind is a question whose answer takes two documents; eight more come with it.
    """
    text = resources.files(__package__).joinpath(_OWN).read_text(encoding="utf-8")
    content = json.loads(text)
    return parse_questions(_as_squad(content) if form == "squad" else _as_hotpot(content), form)


def _as_squad(content: Mapping[str, Any]) -> dict[str, Any]:
    asked: dict[str, list[dict[str, Any]]] = {}
    for question in content["questions"]:
        [title] = question["documents"]
        answers = [{"text": answer} for answer in question["answers"]]
        asked.setdefault(title, []).append({"question": question["text"], "answers": answers})
    data = []
    for article in content["articles"]:
        paragraphs = [
            {"context": document["text"], "qas": asked.get(document["title"], [])}
            for document in article["documents"]
        ]
        data.append({"title": article["title"], "paragraphs": paragraphs})
    return {"data": data}


def _as_hotpot(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    documents = [document for article in content["articles"] for document in article["documents"]]
    sentences = {
        document["title"]: re.split(r"(?<=\.)(?= )", document["text"]) for document in documents
    }
    titles = list(sentences)
    rows = []
    for number, question in enumerate(content["two_hop_questions"]):
        support = question["documents"]
        # Documents from all over the set; 7 shares no factor with their number.
        turned = (titles[(number + 7 * i) % len(titles)] for i in range(len(titles)))
        others = [title for title in turned if title not in support]
        rows.append(
            {
                "question": question["text"],
                "answer": question["answer"],
                "supporting_facts": [[title, 0] for title in support],
                "context": [[t, sentences[t]] for t in sorted(support + others[:8])],
            }
        )
    return rows


def _squad(content: Mapping[str, Any]) -> QuestionSet:
    articles = [list(article["paragraphs"]) for article in content["data"]]
    documents = sorted({p["context"] for paragraphs in articles for p in paragraphs})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for paragraphs in articles:
        ids = [place[p["context"]] for p in paragraphs]
        for own, paragraph in zip(ids, paragraphs, strict=True):
            related = tuple(i for i in ids if i != own)
            for entry in paragraph["qas"]:
                if entry.get("is_impossible"):
                    continue
                answers = tuple(answer["text"] for answer in entry["answers"])
                questions.append(Question(entry["question"], answers, (own,), related, (own,)))
    return QuestionSet(tuple(documents), tuple(questions))


def _hotpot(content: list[Mapping[str, Any]]) -> QuestionSet:
    entries = [
        {title: f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]}
        for entry in content
    ]
    documents = sorted({text for texts in entries for text in texts.values()})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for entry, texts in zip(content, entries, strict=True):
        gold = tuple(place[f"{title}\n{''.join(s)}"] for title, s in entry["context"])
        supporting = {title for title, _ in entry.get("supporting_facts", ())}
        needed = tuple(place[text] for title, text in texts.items() if title in supporting)
        questions.append(Question(entry["question"], (entry["answer"],), gold, (), needed or gold))
    return QuestionSet(tuple(documents), tuple(questions))
