"""The metrics of LongBench and LongBench-E: ``metrics.py`` and ``eval.py`` of THUDM/LongBench.

Every metric takes the best over the references, from 0. Where the official ROUGE fails for Python's
recursion limit and takes 0.0, the score here is the right one (see `sah_plugins.scoring.rouge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sah_core import hookimpl
from sah_core.scorer import Accept, Scorer
from sah_plugins.scoring import choice, text
from sah_plugins.scoring.rouge import rouge_l

SOURCE = "THUDM/LongBench@2e00731:LongBench"
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum", "lsht")
"""Tasks of which only the first line of an answer counts."""

METRIC_OF_TASK = {
    "narrativeqa": "longbench_qa_f1",
    "qasper": "longbench_qa_f1",
    "multifieldqa_en": "longbench_qa_f1",
    "multifieldqa_zh": "longbench_qa_f1_zh",
    "hotpotqa": "longbench_qa_f1",
    "2wikimqa": "longbench_qa_f1",
    "musique": "longbench_qa_f1",
    "dureader": "longbench_rouge_zh",
    "gov_report": "longbench_rouge",
    "qmsum": "longbench_rouge",
    "multi_news": "longbench_rouge",
    "vcsum": "longbench_rouge_zh",
    "trec": "longbench_classification",
    "triviaqa": "longbench_qa_f1",
    "samsum": "longbench_rouge",
    "lsht": "longbench_classification",
    "passage_count": "longbench_count",
    "passage_retrieval_en": "longbench_retrieval",
    "passage_retrieval_zh": "longbench_retrieval_zh",
    "lcc": "longbench_code_sim",
    "repobench-p": "longbench_code_sim",
}
BUCKETS = ("0-4k", "4-8k", "8k+")
"""The length buckets of LongBench-E."""

# Fewer steps than this have room under Python's recursion limit, whoever calls.
_SAFE_PATH = 900


def bucket_of(length: int) -> str:
    """Return the length bucket of a LongBench-E row; ``length`` counts words, or characters."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def _rouge(prediction: str, reference: str, path: int | None = None) -> float:
    try:
        return rouge_l(prediction, reference, longest_path=path).f
    except ValueError:
        return 0.0


def _rouge_zh(prediction: str, reference: str, path: int | None = None) -> float:
    return _rouge(_spaced(prediction), _spaced(reference), path)


def _spaced(chinese: str) -> str:
    return " ".join(text.cut_words(chinese))


def _best_of(pair: Callable[[str, str], float]) -> Callable[..., float]:
    def score(prediction: str, references: Sequence[str]) -> float:
        return text.best(pair(prediction, reference) for reference in references)

    return score


def _classification(
    prediction: str, references: Sequence[str], all_classes: Sequence[str]
) -> float:
    return text.best(choice.classification(prediction, r, all_classes) for r in references)


def example_score(
    task: str,
    prediction: str,
    references: Sequence[str],
    all_classes: Sequence[str] | None,
    *,
    path: int | None = None,
) -> float:
    """Return the score of one answer as ``eval.py`` computes it, from 0 to 1.

    Args:
        task: One of `METRIC_OF_TASK`.
        prediction: The answer, as generated.
        references: The accepted answers.
        all_classes: The class names, for classification.
        path: See `sah_plugins.scoring.rouge.rouge_l`.
    """
    if task in FIRST_LINE_TASKS:
        prediction = text.first_line(prediction)
    metric = METRIC_OF_TASK[task]
    if metric == "longbench_classification":
        return _classification(prediction, references, all_classes or ())
    if path is not None and metric in _STRICT:
        return _STRICT[metric](prediction, references)
    return SCORERS[metric](prediction, references)


def _scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    dataset: str,
    all_classes: Sequence[str] | None,
    path: int | None,
) -> list[float]:
    return [
        example_score(dataset, answer, accepted, all_classes, path=path)
        for answer, accepted in zip(predictions, references, strict=True)
    ]


def _scorer(
    prediction: Sequence[str],
    references: Sequence[Sequence[str]],
    dataset: str,
    all_classes: Sequence[str] | None = None,
    path: int | None = None,
) -> float:
    scores = _scores(prediction, references, dataset, all_classes, path)
    return text.rounded_mean_percent(scores)


def _e_scorer(
    prediction: Sequence[str],
    references: Sequence[Sequence[str]],
    dataset: str,
    lengths: Sequence[int],
    bucket: str,
    all_classes: Sequence[str] | None = None,
    path: int | None = None,
) -> float:
    scores = _scores(prediction, references, dataset, all_classes, path)
    chosen = [
        score for score, length in zip(scores, lengths, strict=True) if bucket_of(length) == bucket
    ]
    # The other one multiplies before it divides, which can round otherwise.
    return round(100 * (sum(chosen) / len(chosen)), 2)


def _recursion_fails(strict: Callable[..., float]) -> Accept:
    """Accept a better score than the official code's where that fails for the recursion limit.

    Args:
        strict: The metric with the failure.
    """

    def accept(case: Mapping[str, Any], score: float) -> str | None:
        expected = strict(case["prediction"], case["references"], **(case.get("kwargs") or {}))
        if score <= expected or abs(expected - case["expected"]) > 1e-6:
            return None
        return "the official ROUGE hits Python's recursion limit on long sentences and gives 0"

    return accept


_STRICT: Mapping[str, Callable[..., float]] = {
    "longbench_rouge": _best_of(partial(_rouge, path=_SAFE_PATH)),
    "longbench_rouge_zh": _best_of(partial(_rouge_zh, path=_SAFE_PATH)),
}
"""The metrics that fail on long sentences in the official code, with that failure."""

_make = partial(Scorer, source=f"{SOURCE}/metrics.py")

SCORERS: Mapping[str, Scorer] = {
    "longbench_qa_f1": _make(
        function=_best_of(text.qa_f1), description="token F1 of normalised English text"
    ),
    "longbench_qa_f1_zh": _make(
        function=_best_of(text.qa_f1_zh), description="token F1 of Chinese words (jieba)"
    ),
    "longbench_rouge": _make(
        function=_best_of(_rouge),
        description="ROUGE-L F of the package rouge 1.0.1",
        accepts=_recursion_fails(_STRICT["longbench_rouge"]),
    ),
    "longbench_rouge_zh": _make(
        function=_best_of(_rouge_zh),
        description="ROUGE-L F of the package rouge 1.0.1, over Chinese words (jieba)",
        accepts=_recursion_fails(_STRICT["longbench_rouge_zh"]),
    ),
    "longbench_classification": _make(
        function=_classification, description="1 over the classes named, if the right one is"
    ),
    "longbench_count": _make(
        function=_best_of(choice.number_share), description="share of right numbers in the answer"
    ),
    "longbench_retrieval": _make(
        function=_best_of(partial(choice.paragraph_share, pattern=r"Paragraph (\d+)")),
        description="share of right paragraph numbers in the answer",
    ),
    "longbench_retrieval_zh": _make(
        function=_best_of(partial(choice.paragraph_share, pattern=r"段落(\d+)")),
        description="share of right paragraph numbers in the answer",
    ),
    "longbench_code_sim": _make(
        function=_best_of(choice.code_similarity),
        description="edit similarity of the first line of code (fuzzywuzzy with difflib)",
    ),
    "longbench_scorer": Scorer(
        function=_scorer,
        scale=1.0,
        corpus=True,
        description="score of a task",
        source=f"{SOURCE}/eval.py",
        accepts=_recursion_fails(partial(_scorer, path=_SAFE_PATH)),
    ),
    "longbench_e_scorer": Scorer(
        function=_e_scorer,
        scale=1.0,
        corpus=True,
        description="score of a task of LongBench-E in one length bucket",
        source=f"{SOURCE}/eval.py",
        accepts=_recursion_fails(partial(_e_scorer, path=_SAFE_PATH)),
    ),
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of LongBench."""
    return SCORERS
