"""Plugins without a model, for tests of the runner: an adapter, a benchmark and a metric.

Registered in this process by the fixture `fakes`, or through entry points in another one by the
fixture `site`.
"""

import os
import time
from types import SimpleNamespace
from typing import ClassVar

import attrs

from sah_core import Benchmark, Example, Protocol, hookimpl, param
from sah_core.errors import ContextTooLongError, ModelNotFoundError
from sah_core.requests import AnswerDetail, Likelihood, Response


class FakeAdapter:
    """Dense pipelines answer right, sparse ones say no; every call is counted."""

    name: ClassVar[str] = "fake"
    calls: ClassVar[list[tuple]] = []

    def __init__(self, model_name, *, device=None, dtype=None):
        if model_name == "missing":
            raise ModelNotFoundError(model_name, "it is only a test", "take another")
        self.model_name, self.dtype, self.device = model_name, dtype or "float32", device or "cpu"
        self.calls.append(("load", model_name))

    def tokenizer(self, text, *, add_special_tokens):
        return {"input_ids": list(range(len(text.split())))}

    def identity(self):
        return {"model": self.model_name, "weights": "w" * 8, "dtype": self.dtype}

    def process_request(self, request, generation_kwargs=None, request_kwargs=None):
        raise NotImplementedError("runners prefill once and answer for every pipeline")

    def prefill(
        self,
        request,
        request_kwargs=None,
        pipeline=None,
        *,
        new_tokens=0,
        observers=(),
        generation_kwargs=None,
    ):
        label = None if pipeline is None else pipeline.text
        for observer in observers:
            if isinstance(observer, Asked):
                observer.see("prefill", request.context)
        kind = "watched prefill" if observers else "prefill"
        self.calls.append((kind, request.context, label, dict(request_kwargs or {})))
        if "too long" in request.context:
            raise ContextTooLongError(9000, 8192, "model 'fake'")
        return SimpleNamespace(request=request, seconds=time.perf_counter())

    def answer(self, prefilled, pipeline, generation_kwargs=None, *, observers=(), indices=None):
        kind = "watched answer" if observers else "answer"
        self.calls.append((kind, pipeline.text, tuple(indices), dict(generation_kwargs)))
        generation_kwargs["max_new_tokens"] = 1  # a runner must hand out its dicts as copies
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        if "sink_size=13" in pipeline.text:
            raise RuntimeError("boom")
        if "sink_size=14" in pipeline.text and "context 1" in prefilled.request.context:
            raise KeyboardInterrupt
        for observer in observers:
            if isinstance(observer, Asked):
                observer.questions += 1
                observer.see("answer", prefilled.request.questions[indices[0]])
        details = tuple(
            AnswerDetail(
                text=prefilled.request.questions[i][::-1] if pipeline.is_dense else "no",
                token_ids=tokens_of(pipeline, observers),
                prompt_tokens=12,
                context_tokens=10,
                new_tokens=2,
                seconds_prefill=1.5,
                seconds_decode=99.0 if observers else 2.0,
                seconds_first_token=0.5,
                finished="eos",
                backends=() if pipeline.is_dense else ("gather",),
            )
            for i in indices
        )
        return Response(responses=[d.text for d in details], details=details)

    def loglikelihood(self, prefilled, pipeline, *, observers=(), indices=None, step=None):
        self.calls.append(("loglikelihood", pipeline.text, tuple(indices), step))
        return tuple(
            Likelihood(
                token_ids=(5, 6),
                losses=(1.0, 3.0) if pipeline.is_dense else (2.0, 6.0),
                correct=(True, False),
                context_tokens=10,
                seconds=99.0 if observers else 2.0,
            )
            for _ in indices
        )


def tokens_of(pipeline, observers):
    """Two tokens, the second of which says what happened."""
    fickle = "sink_size=15" in pipeline.text and not observers
    return (1, 2 if pipeline.is_dense else 4 if fickle else 3)


@attrs.frozen(kw_only=True)
class Quiz(Benchmark):
    """Spell the question backwards."""

    name: ClassVar[str] = "quiz"
    main_score: ClassVar[str] = "accuracy"
    protocol: ClassVar[Protocol] = Protocol(chat=False)

    contexts: int = param(3, minimum=1, help="contexts per task")
    questions: int = param(2, minimum=1, help="questions per context")
    answer_tokens: int = param(8, minimum=1, help="room for an answer")
    folder: str | None = param(None, type=str, help="where nothing lies", location=True)

    def tasks(self):
        return ("easy", "long", "broken", "prose")

    def examples(self, task, tokenizer, seed):
        if task == "broken":
            raise RuntimeError("no data")
        for context in range(self.contexts):
            for question in range(self.questions):
                text = f"question {question} of {context} seed {seed}"
                yield Example(
                    id=f"{context}-{question}",
                    context_id=str(context),
                    context=f"context {context}" + (" is too long" if task == "long" else ""),
                    question=text,
                    references=(text[::-1],),
                    max_new_tokens=self.answer_tokens + question,
                    task=task,
                    facts={"seed": seed},
                    predicted=("question", "decode")[question] if task == "prose" else None,
                )

    def count(self, task):
        return self.contexts * self.questions

    def score(self, example, prediction):
        return {"accuracy": 100.0 if prediction in example.references else 0.0}

    def score_text(self, example, likelihood):
        return {"accuracy": 50.0, "loss": likelihood.loss}

    def revision(self):
        return "1"


@attrs.define(kw_only=True, eq=False)
class Asked:
    """Counts questions and keeps what it was shown."""

    name: ClassVar[str] = "asked"

    most: int = param(2, minimum=0, help="records kept per sample")
    begun: int = attrs.field(default=0, init=False)
    questions: int = attrs.field(default=0, init=False)
    seen: list = attrs.field(factory=list, init=False)

    def see(self, what, text):
        if len(self.seen) < self.most:
            self.seen.append({"what": what, "text": text})

    def records(self):
        return self.seen

    @hookimpl
    def sah_run_begin(self, config):
        self.begun += 1
        assert config["benchmark"] == "quiz"

    def reset(self):
        self.questions = 0
        self.seen = []

    def result(self):
        return {"questions": self.questions}


class AdapterPlugin:
    @hookimpl
    def sah_adapter(self):
        return FakeAdapter


class BenchmarkPlugin:
    @hookimpl
    def sah_benchmark(self):
        return Quiz


class MetricPlugin:
    @hookimpl
    def sah_metric(self):
        return Asked


adapter, benchmark, metric = AdapterPlugin(), BenchmarkPlugin(), MetricPlugin()
