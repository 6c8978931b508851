"""A few invented rows per task in the official columns, for checks without the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tasks import CLASSIFICATION, EXTENDED, TASKS, base_of

_ANSWERS: dict[str, tuple[str, str]] = {
    "en": ("a red lighthouse", "the old ferry"),
    "zh": ("浦东新区", "图书馆"),
    "code": ("    return total + 1", "    self.count = 0"),
}
_CLASSES = ("Date", "City", "Animal")


def write(folder: Path) -> None:
    """Write one JSON Lines file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in (*TASKS, *EXTENDED):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(task))
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(task: str) -> list[dict[str, Any]]:
    """Return three rows of a task, two of which share a context."""
    base = base_of(task)
    found = []
    for number, length in enumerate((1200, 5200, 9200)):
        found.append(
            {
                "input": f"Where is item {number}?" if base.name != "lcc" else "",
                "context": f"Invented text {number // 2} about {base.category}. " * 8,
                "answers": [_answer(base.name, base.language, number)],
                "length": length,
                "dataset": task,
                "language": "zh" if base.language == "zh" else "en",
                "all_classes": list(_CLASSES) if base.name in CLASSIFICATION else None,
                "_id": f"{task}-{number}",
            }
        )
    return found


def _answer(task: str, language: str, number: int) -> str:
    if task in CLASSIFICATION:
        return _CLASSES[number % len(_CLASSES)]
    if task == "passage_count":
        return str(number + 3)
    if task == "passage_retrieval_en":
        return f"Paragraph {number + 1}"
    if task == "passage_retrieval_zh":
        return f"段落{number + 1}"
    return _ANSWERS[language][number % 2]
