"""The tasks of ZeroSCROLLS: metrics, sizes, token limits."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Task:
    """One task of ZeroSCROLLS."""

    name: str
    metric: str
    max_new_tokens: int
    test_examples: int = 500


_ROUGE, _F1 = "zeroscrolls_rouge", "zeroscrolls_f1"

_ALL = (
    Task("gov_report", _ROUGE, 1024),
    Task("summ_screen_fd", _ROUGE, 512, 337),
    Task("qmsum", _ROUGE, 512, 281),
    Task("squality", _ROUGE, 512, 260),
    Task("qasper", _F1, 128),
    Task("narrative_qa", _F1, 64),
    Task("quality", "zeroscrolls_accuracy", 10),
    Task("musique", _F1, 32),
    Task("space_digest", "zeroscrolls_exp_similarity", 36),
    Task("book_sum_sort", "zeroscrolls_concordance_index", 256),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name, in the official order."""

SUMMARIES = tuple(task.name for task in _ALL if task.metric == _ROUGE)
"""Tasks that are scored by ROUGE; all others may be asked to explain nothing."""
