"""The tasks of LongBench: categories, languages, sizes, token limits."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Task:
    """One task of LongBench."""

    name: str
    category: str
    language: str
    """``en``, ``zh`` or ``code``."""
    max_new_tokens: int
    examples: int = 200
    extended_examples: int | None = None
    """Of the task in LongBench-E; None if it is not in it."""


_SINGLE, _MULTI, _SUMMARY = "single-doc QA", "multi-doc QA", "summarisation"
_FEW_SHOT, _SYNTHETIC, _CODE = "few-shot", "synthetic", "code"
CATEGORIES = (_SINGLE, _MULTI, _SUMMARY, _FEW_SHOT, _SYNTHETIC, _CODE)

_ALL = (
    Task("narrativeqa", _SINGLE, "en", 128),
    Task("qasper", _SINGLE, "en", 128, extended_examples=224),
    Task("multifieldqa_en", _SINGLE, "en", 64, 150, 150),
    Task("multifieldqa_zh", _SINGLE, "zh", 64),
    Task("hotpotqa", _MULTI, "en", 32, extended_examples=300),
    Task("2wikimqa", _MULTI, "en", 32, extended_examples=300),
    Task("musique", _MULTI, "en", 32),
    Task("dureader", _MULTI, "zh", 128),
    Task("gov_report", _SUMMARY, "en", 512, extended_examples=300),
    Task("qmsum", _SUMMARY, "en", 512),
    Task("multi_news", _SUMMARY, "en", 512, extended_examples=294),
    Task("vcsum", _SUMMARY, "zh", 512),
    Task("trec", _FEW_SHOT, "en", 64, extended_examples=300),
    Task("triviaqa", _FEW_SHOT, "en", 32, extended_examples=300),
    Task("samsum", _FEW_SHOT, "en", 128, extended_examples=300),
    Task("lsht", _FEW_SHOT, "zh", 64),
    Task("passage_count", _SYNTHETIC, "en", 32, extended_examples=300),
    Task("passage_retrieval_en", _SYNTHETIC, "en", 32, extended_examples=300),
    Task("passage_retrieval_zh", _SYNTHETIC, "zh", 32),
    Task("lcc", _CODE, "code", 64, 500, 300),
    Task("repobench-p", _CODE, "code", 64, 500, 300),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""By name, in the official order."""

SUFFIX = "_e"
EXTENDED = tuple(f"{task.name}{SUFFIX}" for task in _ALL if task.extended_examples)
"""The tasks of LongBench-E."""

CLASSIFICATION = ("trec", "lsht")
WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks whose prompts go to the model without a chat template."""


def base_of(task: str) -> Task:
    """Return the task, or that of which it is the extended form."""
    return TASKS[task.removesuffix(SUFFIX)]
