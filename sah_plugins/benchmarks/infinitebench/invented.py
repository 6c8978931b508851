"""A few invented rows per task in the official columns, for checks without the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tasks import TASKS

_OPTIONS = ("a red lighthouse", "an old ferry", "a stone bridge", "a windmill")
_INPUTS = {
    "passkey": "What is the pass key?",
    "number_string": "What is the sequence of digits?",
    "kv_retrieval": '\nKey: "k-{n}"\nThe value associated with the specified key is: ',
    "math_find": "You should answer with only one number, no other words. "
    "The largest number of the list is: ",
    "code_run": "Please give me the exact number of the return value of func_{n}(-{n}). "
    "Be concise. Your response must end with the final returned value.",
    "longdialogue_qa_eng": "Which character is $$MASK$$ ?",
    "longbook_sum_eng": "",
    "math_calc": "",
}
_ANSWERS: dict[str, tuple[list[Any], ...]] = {
    "passkey": (["71432"], ["00381"], ["90210"]),
    "number_string": (["2200012222"], ["0001122233"], ["9988776655"]),
    "kv_retrieval": (["0a-42"], ["c14c-ba"], ["7f"]),
    "longdialogue_qa_eng": (["ACE", "ACE ROTHSTEIN"], ["GINGER"], ["WINK"]),
    "longbook_sum_eng": (["A ferry sinks.\nA lighthouse is built."], ["Nothing."], ["A storm."]),
    "longbook_choice_eng": ([_OPTIONS[1]], [_OPTIONS[0]], [_OPTIONS[3]]),
    "longbook_qa_eng": (["the old ferry", "a ferry"], ["Quito"], ["seven"]),
    "longbook_qa_chn": (["北京"], ["图书馆", "书店"], ["七"]),
    "math_find": ([88], [12], [7]),
    "math_calc": ([1, 4, 8], [8, 5, 7, 3], [2]),
    "code_run": ([4], [-7], [12]),
    "code_debug": ([_OPTIONS[2]], [_OPTIONS[1]], [_OPTIONS[0]]),
}


def write(folder: Path) -> None:
    """Write one JSON Lines file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(task))
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(task: str) -> list[dict[str, Any]]:
    """Return three rows of a task, two of which share a context."""
    return [
        {
            "id": number,
            "context": f"An invented text, number {number // 2}. " * 8,
            "input": _INPUTS.get(task, "What is seen from number {n}?").replace("{n}", str(number)),
            "answer": answer,
            "options": list(_OPTIONS) if task in ("longbook_choice_eng", "code_debug") else [],
        }
        for number, answer in enumerate(_ANSWERS[task])
    ]
