"""A few invented rows per task in the official columns, for checks without the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tasks import SUMMARIES, TASKS

_SEPARATOR = "... [The rest of the text is omitted]\n\n"
_ANSWERS = {
    "quality": ("(B)", "(D)"),
    "space_digest": ("30%", "62.5%"),
    "book_sum_sort": ("3, 1, 2", "2, 3, 1"),
}
_SUMMARY = ("The old ferry sinks in a storm.", "A lighthouse is built of red stone.")
_SHORT = ("the old ferry", "Núñez of Quito")


def write(folder: Path) -> None:
    """Write both splits of every task as JSON Lines."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in ("validation", "test"):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows(task, split))
            path = folder / task / f"{split}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(task: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of two examples, the first with two answers, and so in two rows."""
    answers = _ANSWERS.get(task, _SUMMARY if task in SUMMARIES else _SHORT)
    found = []
    for number, answer in enumerate(answers):
        row = _row(task, number)
        first = {
            **row,
            "pid": f"{row['id']}_0",
            "output": answer if split == "validation" else None,
        }
        found.append(first)
        if split == "validation" and number == 0:
            found.append({**first, "pid": f"{row['id']}_1", "output": f"{answer} "})
    return found


def _row(task: str, number: int) -> dict[str, Any]:
    head = "You are given a text. Answer as asked.\n\nText:\n"
    document = f"An invented text, number {number}. " * 40
    query = "" if task == "gov_report" else f"Question:\nWhat is number {number}?\n\n"
    start, end = len(head), len(head) + len(document)
    return {
        "id": f"{task}-{number}",
        "input": f"{head}{document}\n\n{query}Answer:\n",
        "document_start_index": start,
        "document_end_index": end,
        "query_start_index": end + 2,
        "query_end_index": end + 2 + len(query),
        "truncation_seperator": _SEPARATOR,
    }
