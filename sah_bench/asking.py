"""Questions about one context, answered by several pipelines beside dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import attrs

from sah_core import registry
from sah_core.errors import SahError, one_line
from sah_core.pipeline import Pipeline

from .results import combine, saving

if TYPE_CHECKING:
    from sah_core.requests import AnswerDetail, Request

AROUND = 40
"""Characters shown on either side of the place where two answers part."""
WARM_UP_TOKENS = 2


@attrs.frozen(kw_only=True)
class Plan:
    """What to ask, of whom, and how.

    Attributes:
        model: The name of the model.
        request: The context and all questions.
        pipelines: Beside `dense`, which always answers first.
        adapter: Registered name of the adapter.
        device: Where the model runs; None leaves it to the adapter.
        dtype: Of the weights; likewise.
        request_kwargs: For the adapter's prefill.
        generation: For the adapter's answers.
        seed: Of sampled generation: every pass begins with it.
    """

    model: str
    request: Request
    pipelines: tuple[Pipeline, ...] = ()
    adapter: str = "hf"
    device: str | None = None
    dtype: str | None = None
    request_kwargs: Mapping[str, Any] = attrs.field(factory=dict)
    generation: Mapping[str, Any] = attrs.field(factory=dict)
    seed: int = 0


@attrs.frozen(kw_only=True)
class Difference:
    """Where an answer first differs from the dense one.

    Attributes:
        token: Index of the first generated token that differs.
        before: The end of the text that both have in common.
        dense: How the dense answer goes on; empty where it ends.
        here: How this answer goes on; likewise.
    """

    token: int
    before: str
    dense: str
    here: str


@attrs.frozen(kw_only=True)
class Answer:
    """How one pipeline answered one question.

    Seconds are of a pass without observers; density and error of a second pass, which is observed.

    Attributes:
        pipeline: The pipeline's label.
        question: Index of the question.
        text: The answer.
        others: Further answers, where several sequences were asked for.
        context_tokens: Tokens of the context.
        new_tokens: Generated tokens.
        finished: ``eos``, ``length`` or ``stop``.
        density: Selected over allowed keys, over all layers and sparse rows; None if not observed.
        output_error: Mean relative error of the attention output over layers and rows of question
            and answer; None if not observed.
        seconds_prefill: Time to read the context, which answers with a dense prefill share.
        seconds_to_first_token: From the whole prompt to the first new token, that time included.
        tokens_per_second: New tokens per second after the first; None for a single token.
        saving: ``none``, ``simulated`` or ``realised``.
        backends: What executed its masks; empty where nothing was selected.
        difference: Where it first differs from the dense answer; None where it does not.
        observed_alike: Whether the observed pass gave the same tokens.
        error: Why there is no answer, on one line; empty if there is one.
        bad_input: The error is for what was asked, not a fault.
    """

    pipeline: str
    question: int
    text: str = ""
    others: tuple[str, ...] = ()
    context_tokens: int = 0
    new_tokens: int = 0
    finished: str = ""
    density: float | None = None
    output_error: float | None = None
    seconds_prefill: float | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    saving: str = "none"
    backends: tuple[str, ...] = ()
    difference: Difference | None = None
    observed_alike: bool = True
    error: str = ""
    bad_input: bool = False


class Asking:
    """A model at work on the questions.

    Args:
        plan: What to ask.
        tell: Is called with what is being done, in words.
    """

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.tell = tell
        self.dense: list[AnswerDetail] = []

    def run(self) -> list[list[Answer]]:
        """Load the model and answer.

        Returns:
            Per question one answer per pipeline, `dense` first.

        Raises:
            SahError: The model cannot be had, or dense attention cannot answer.
        """
        plan = self.plan
        adapter = registry.adapters[plan.adapter]
        check = getattr(adapter, "check_generation", None)
        if check is not None:
            check(plan.generation)
        self.tell(f"loading {plan.model}")
        self.adapter: Any = adapter(plan.model, device=plan.device, dtype=plan.dtype)
        self._warm_up()
        self.tell("reading the context")
        shared = self._prefill()
        columns = [self._dense(shared)]
        columns += [self._column(pipeline, shared) for pipeline in plan.pipelines]
        return [list(answers) for answers in zip(*columns, strict=True)]

    def _warm_up(self) -> None:
        """Read a short text, so that libraries that start on first use are not timed."""
        from sah_core.requests import Request

        self.adapter.prefill(Request(context="Warm up.", questions="Ready?", chat=False))

    def _prefill(self, pipeline: Pipeline | None = None, observers: Sequence[object] = ()) -> Any:
        return self.adapter.prefill(
            self.plan.request,
            dict(self.plan.request_kwargs),
            pipeline=pipeline,
            new_tokens=int(self.plan.generation.get("max_new_tokens", 0)),
            observers=list(observers),
            generation_kwargs=dict(self.plan.generation),
        )

    def _dense(self, prefilled: Any) -> list[Answer]:
        pipeline = Pipeline.dense()
        self.dense = self._timed(pipeline, prefilled)
        return [
            _answer(pipeline, index, detail, density=1.0, output_error=0.0)
            for index, detail in enumerate(self.dense)
        ]

    def _column(self, pipeline: Pipeline, shared: Any) -> list[Answer]:
        """The answers of a pipeline to all questions; an error takes the place of each."""
        try:
            return self._sparse(pipeline, shared)
        except Exception as error:  # maskers and backends may be anyone's code
            is_ours = isinstance(error, SahError)
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            return [
                Answer(pipeline=pipeline.label, question=i, error=one_line(text), bad_input=is_ours)
                for i in range(len(self.dense))
            ]

    def _sparse(self, pipeline: Pipeline, shared: Any) -> list[Answer]:
        reads_alone = pipeline.prefills
        prefilled = shared
        if reads_alone:
            self.tell(f"reading the context with {pipeline.label}")
            prefilled = self._prefill(pipeline)
        timed = self._timed(pipeline, prefilled)
        self.tell(f"observing {pipeline.label}")
        observers = _observers()
        read = []
        if reads_alone:
            prefilled = None  # one cache at a time
            density = [observers["density"]] if "density" in observers else []
            prefilled = self._prefill(pipeline, density)
            read = [observer.result() for observer in density]
        answers = []
        for index, detail in enumerate(timed):
            for observer in observers.values():
                observer.reset()
            watched = self._ask(pipeline, prefilled, index, observers=list(observers.values()))
            results = {name: observer.result() for name, observer in observers.items()}
            answers.append(
                _answer(
                    pipeline,
                    index,
                    detail,
                    density=_density([*read, results["density"]]) if "density" in results else None,
                    output_error=results.get("output-error", {}).get("mean"),
                    difference=first_difference(self.dense[index], detail),
                    observed_alike=watched.token_ids == detail.token_ids,
                )
            )
        return answers

    def _timed(self, pipeline: Pipeline, prefilled: Any) -> list[AnswerDetail]:
        """Answer all questions without observers, after a short answer that is not timed."""
        self.tell(f"answering with {pipeline.label}")
        self._ask(pipeline, prefilled, 0, tokens=WARM_UP_TOKENS)
        count = len(self.plan.request.question_list)
        return [self._ask(pipeline, prefilled, index) for index in range(count)]

    def _ask(
        self,
        pipeline: Pipeline,
        prefilled: Any,
        index: int,
        *,
        observers: Sequence[object] = (),
        tokens: int | None = None,
    ) -> AnswerDetail:
        import torch

        generation = dict(self.plan.generation)
        if tokens is not None:
            generation["max_new_tokens"] = tokens
        torch.manual_seed(self.plan.seed)
        response = self.adapter.answer(
            prefilled, pipeline, generation, observers=list(observers), indices=[index]
        )
        detail: AnswerDetail = response.details[0]
        return detail


def _observers() -> dict[str, Any]:
    """New instances of the metrics that are shown, of those that can be had."""
    return {
        name: registry.metrics[name]()
        for name in ("density", "output-error")
        if name in registry.metrics
    }


def _density(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The density of several passes together, such as a prefill and an answer."""
    value: float | None = combine(registry.metrics["density"], results).get("density")
    return value


def _answer(pipeline: Pipeline, index: int, detail: AnswerDetail, **measured: Any) -> Answer:
    return Answer(
        pipeline=pipeline.label,
        question=index,
        text=detail.text,
        others=detail.texts[1:],
        context_tokens=detail.context_tokens,
        new_tokens=detail.new_tokens,
        finished=detail.finished,
        seconds_prefill=detail.seconds_prefill,
        seconds_to_first_token=detail.time_to_first_token,
        tokens_per_second=detail.tokens_per_second,
        saving=saving(pipeline, detail.backends),
        backends=() if pipeline.is_dense else detail.backends,
        **measured,
    )


def first_difference(dense: AnswerDetail, here: AnswerDetail) -> Difference | None:
    """Where an answer leaves the dense one, at the latest where it heals the prompt's end
    otherwise; None if it does not.
    """
    healed_alike = dense.healed_token == here.healed_token
    if healed_alike and dense.token_ids == here.token_ids:
        return None
    pairs = zip(dense.token_ids, here.token_ids, strict=False)
    shorter = min(len(dense.token_ids), len(here.token_ids))
    token = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter) if healed_alike else 0
    common = commonprefix([dense.text, here.text])
    return Difference(
        token=token,
        before=_end(common),
        dense=_start(dense.text[len(common) :]),
        here=_start(here.text[len(common) :]),
    )


def _start(text: str) -> str:
    """The first words of a text."""
    if len(text) <= AROUND:
        return text
    cut = text[:AROUND]
    return (cut.rsplit(" ", 1)[0] if " " in cut.strip() else cut) + "…"


def _end(text: str) -> str:
    """The last words of a text."""
    if len(text) <= AROUND:
        return text
    cut = text[-AROUND:]
    return "…" + (cut.split(" ", 1)[1] if " " in cut.strip() else cut)
