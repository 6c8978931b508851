"""A few invented rows per configuration in the official columns, for checks without the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = ("shortdep_qa", "shortdep_cloze", "longdep_qa", "longdep_summarization")

_LONG: tuple[tuple[str, Any], ...] = (
    ("comprehension_and_reasoning", "The ferry sank because it was old and heavy."),
    ("multiple_information_retrieval", "Red stone, white wood and some glass."),
    ("timeline_reorder", "II,I,III"),
    ("computation", "It took 5 hours and 33 minutes."),
)


def write(folder: Path) -> None:
    """Write one JSON Lines file per configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(config))
        (folder / f"{config}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(config: str) -> list[dict[str, Any]]:
    """Return two rows, whose ``qa_pairs`` are a Python literal in a text, as in the data set."""
    found = []
    for number in range(2):
        pairs = "none" if config == "longdep_summarization" else repr(_pairs(config, number))
        summary = f"The paper shows what number {number} is about."
        found.append(
            {
                "input": f"An invented text, number {number}. " * 8,
                "title": f"Title {number}",
                "qa_pairs": pairs,
                "output": summary if pairs == "none" else "none",
            }
        )
    return found


def _pairs(config: str, number: int) -> list[dict[str, Any]]:
    if config == "longdep_qa":
        return [
            {"Q": f"What of number {number}?", "A": answer, "type": kind, "S": ["A sentence."]}
            for kind, answer in _LONG
        ]
    if config == "shortdep_cloze":
        names = {"<mask-0>": "Bob O'Neil", "<mask-1>": "Paris"}
        answer: Any = names if number == 0 else {"<mask-0>": "Zoë"}
        return [{"Q": "<mask-0> went to <mask-1>.", "A": answer, "S": [""]}]
    return [
        {"Q": f"Who is {name} of {number}?", "A": f"{name} is a person.", "S": ["A sentence."]}
        for name in ("Ann", "Ben")
    ]
