"""From examples to a request, and from an answer to what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sah_core.benchmark import Benchmark, Example

from .benchmark_plans import BenchmarkPlan
from .store import Sample

if TYPE_CHECKING:
    from sah_core.requests import AnswerDetail, Likelihood, Request


def request_of(plan: BenchmarkPlan, task: str, group: Sequence[Example]) -> Request:
    """The request for the questions about one context, under the benchmark's protocol."""
    from sah_core.requests import Request

    protocol = plan.benchmark.protocol_for(task)
    in_question = protocol.prefix == "user"
    return Request(
        context=group[0].context,
        questions=[e.question + (e.answer_prefix if in_question else "") for e in group],
        answer_prefix=["" if in_question else e.answer_prefix for e in group],
        separator="",
        chat=None if protocol.chat else False,
        truncation=protocol.truncation,
    )


def detail_of(likelihood: Likelihood, seconds_prefill: float) -> AnswerDetail:
    """A text that was given and predicted, in the form of an answer."""
    from sah_core.requests import AnswerDetail

    return AnswerDetail(
        text="",
        token_ids=likelihood.token_ids,
        prompt_tokens=likelihood.context_tokens + 1 + len(likelihood.token_ids),
        context_tokens=likelihood.context_tokens,
        new_tokens=0,
        seconds_prefill=seconds_prefill,
        seconds_decode=likelihood.seconds,
        finished="predicted",
        backends=likelihood.backends,
        likelihood=likelihood,
    )


def scores_of(benchmark: Benchmark, example: Example, detail: AnswerDetail) -> dict[str, float]:
    """What the benchmark says of an answer, or of a text that was predicted."""
    if detail.likelihood is not None:
        return benchmark.score_text(example, detail.likelihood)
    return benchmark.score(example, detail.text)


def sample_of(
    example: Example,
    detail: AnswerDetail,
    scores: dict[str, float],
    observers: Mapping[str, Any],
    timing: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]] = (),
) -> Sample:
    """What is kept of an answer; the context is not, for it can be made again."""
    metrics = {name: observer.result() for name, observer in observers.items()}
    return Sample(
        id=example.id,
        record={
            "context_id": example.context_id,
            "question": example.question,
            "prediction": detail.text,
            "references": list(example.references),
            "scores": scores,
            "facts": dict(example.facts),
            "prompt_tokens": detail.prompt_tokens,
            "context_tokens": detail.context_tokens,
            "new_tokens": detail.new_tokens,
            "finished": detail.finished,
            **({"turns": list(turns)} if turns else {}),
            **({} if detail.likelihood is None else {"losses": list(detail.likelihood.losses)}),
        },
        micro={
            "metrics": metrics,
            "backends": sorted(detail.backends),
            "overflow_rows": detail.overflow_rows,
        },
        timing=timing,
        observed={
            name: observer.records()
            for name, observer in observers.items()
            if hasattr(observer, "records")
        },
    )


def timing_of(
    detail: AnswerDetail, timed: AnswerDetail | None, *, prefill_is_timed: bool = True
) -> dict[str, Any]:
    """The seconds of an answer, all of them from passes without observers.

    Args:
        detail: The answer that is kept.
        timed: The answer of a pass without observers, which may be the same one; None if there was
            no such pass: there are no seconds then.
        prefill_is_timed: The kept answer's prefill ran without observers.
    """
    prefill = timed or (detail if prefill_is_timed else None)
    timing: dict[str, Any] = {
        "prefill": None if prefill is None else prefill.seconds_prefill,
        "index": None if timed is None else timed.seconds_index,
        "first_token": None if timed is None else timed.seconds_first_token,
        "decode": None if timed is None else timed.seconds_decode,
    }
    if timed is not None and timed is not detail:
        # A greedy answer is the same with and without observers; anything else is worth a look.
        timing["same_tokens"] = timed.token_ids == detail.token_ids
    return timing
