"""The tasks of InfiniteBench: sizes, token limits, kinds of answers."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Task:
    """One task of InfiniteBench."""

    name: str
    examples: int
    max_new_tokens: int


_ALL = (
    Task("passkey", 590, 6),
    Task("number_string", 590, 12),
    Task("kv_retrieval", 500, 50),
    Task("longdialogue_qa_eng", 200, 40),
    Task("longbook_sum_eng", 103, 1200),
    Task("longbook_choice_eng", 229, 40),
    Task("longbook_qa_eng", 351, 40),
    Task("longbook_qa_chn", 175, 40),
    Task("math_find", 350, 3),
    Task("math_calc", 50, 30000),
    Task("code_run", 400, 5),
    Task("code_debug", 394, 5),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name, in the official order."""

CHOICE = ("longbook_choice_eng", "code_debug")
"""Tasks of four options, whose label is the right option and its letter."""
INTEGERS = ("code_run", "math_calc")
NUMBERS = (*INTEGERS, "math_find")
"""Tasks whose labels are numbers."""
