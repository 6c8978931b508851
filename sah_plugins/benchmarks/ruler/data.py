"""SQuAD and HotpotQA as rows: from the hub, or from a local folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sah_core.benchmark import DataSource
from sah_core.errors import DataError
from sah_plugins.data.table import HubTable, Table, find

from .questions import Form, QuestionSet, parse_questions

SOURCES: dict[Form, DataSource] = {
    "squad": DataSource(
        hub="rajpurkar/squad_v2",
        config="squad_v2",
        split="validation",
        columns=("title", "context", "question", "answers"),
    ),
    "hotpot": DataSource(
        hub="hotpotqa/hotpot_qa",
        config="distractor",
        split="validation",
        columns=("question", "answer", "supporting_facts", "context"),
    ),
}


def table(form: Form, data_dir: str | None) -> Table:
    """Return the rows of a set.

    Raises:
        DataError: the folder, or the hub, does not have them.
    """
    owner = _owner(form)
    if data_dir is None:
        return HubTable(owner=owner, source=SOURCES[form])
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(owner, str(folder), "no such folder: expected the data_dir to be one")
    return find(SOURCES[form], owner, [folder / "ruler", folder])


def fetch(form: Form, folder: Path) -> Path:
    """Copy the rows of a set from the hub into ``folder``, as ``data_dir`` takes them.

    Raises:
        DataError: the hub does not give them.
    """
    return HubTable(owner=_owner(form), source=SOURCES[form]).save(folder / "ruler")


def questions(form: Form, data_dir: str | None) -> QuestionSet:
    """Return the documents and questions of a set, as its official file has them.

    Raises:
        DataError: the folder, or the hub, does not have them, or in another schema.
    """
    rows = table(form, data_dir)
    try:
        content = _squad(rows.checked()) if form == "squad" else _hotpot(rows.checked())
        return parse_questions(content, form)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        columns = ", ".join(rows.source.columns)
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            rows.owner, rows.place, f"expected the columns {columns} as on the hub ({reason})"
        ) from error


def _owner(form: Form) -> str:
    return "ruler qa_1" if form == "squad" else "ruler qa_2"


def _squad(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        answers = [{"text": text} for text in row["answers"]["text"]]
        asked = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(asked)
    return {
        "data": [
            {"title": title, "paragraphs": [{"context": c, "qas": q} for c, q in texts.items()]}
            for title, texts in articles.items()
        ]
    }


def _hotpot(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "supporting_facts": _paired(row["supporting_facts"], "title", "sent_id"),
            "context": _paired(row["context"], "title", "sentences"),
        }
        for row in rows
    ]


def _paired(columns: Mapping[str, list[Any]], first: str, second: str) -> list[tuple[Any, Any]]:
    return list(zip(columns[first], columns[second], strict=True))
