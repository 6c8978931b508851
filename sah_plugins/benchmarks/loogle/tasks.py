"""The seven tasks of LooGLE: where their rows are, how they are asked and scored."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Task:
    """One task of LooGLE."""

    name: str
    config: str
    """The configuration of the data set that holds its rows."""
    prompt: str
    metric: str
    max_new_tokens: int
    examples: int
    kinds: tuple[str, ...] = ()
    """What ``type`` a question of this task has, in the configuration with several."""


_ROUGE = "loogle_rouge_recall"
_LONG = "longdep_qa"

_ALL = (
    Task("shortdep_qa", "shortdep_qa", "qa", _ROUGE, 300, 1951),
    Task("shortdep_cloze", "shortdep_cloze", "cloze", "loogle_cloze_exact", 50, 2880),
    Task(
        *("longdep_qa_comprehension", _LONG, "qa", _ROUGE, 500, 406),
        kinds=("comprehension_and_reasoning",),
    ),
    Task(
        *("longdep_qa_retrieval", _LONG, "qa", _ROUGE, 500, 380),
        kinds=("multiple_information_retrieval",),
    ),
    Task(
        *("longdep_qa_reorder", _LONG, "qa", "loogle_reorder_similarity", 500, 215),
        kinds=("timeline_reorder", "timeline", "时间线"),
    ),
    Task(*("longdep_qa_computation", _LONG, "qa", _ROUGE, 500, 100), kinds=("computation",)),
    Task("longdep_summarization", "longdep_summarization", "summary", _ROUGE, 500, 516),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name."""

CLOZE, REORDER = "shortdep_cloze", "longdep_qa_reorder"
LONG_QA = tuple(task.name for task in _ALL if task.config == _LONG)
KINDS = {kind: task.name for task in _ALL for kind in task.kinds}
"""The task of a question, by its ``type``."""
