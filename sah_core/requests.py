"""What is asked of a model, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import attrs

from sah_core.errors import RequestError, short_repr

Truncation = Literal["none", "middle", "head"]
TRUNCATIONS: tuple[Truncation, ...] = ("none", "middle", "head")


def _questions(value: str | Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Iterable):
        raise RequestError(f"expected a text or a list of texts, not {short_repr(value)}")
    return tuple(value)


@attrs.frozen(kw_only=True)
class Request:
    """One context and the questions about it.

    The prompt of a question is ``context + separator + question``, in the chat template if there is
    one (the answer prefix then follows the assistant header), else followed by ``separator +
    answer_prefix``.

    Attributes:
        context: Read once for all questions.
        questions: One question, or several; the response has the same form.
        answer_prefix: Start of the answer, put into the model's mouth; one for all questions or one
            for each.
        separator: Between context and question, and before the answer prefix where there is no
            template. Benchmarks whose prompts are exact set it to "".
        chat: Use the tokenizer's chat template; None = if it has one.
        truncation: How a context longer than ``max_context_length`` is cut: ``middle`` keeps its
            two ends, ``head`` its start, ``none`` refuses. None = ``middle`` where a length is
            given.
        system: System message, for chat templates only.

    Raises:
        RequestError: For what is no text, an empty question, a prefix count that does not fit, or
            an unknown truncation.
    """

    context: str
    questions: str | tuple[str, ...] = attrs.field(converter=_questions)
    answer_prefix: str | tuple[str, ...] = attrs.field(default="", converter=_questions)
    separator: str = "\n"
    chat: bool | None = None
    truncation: Truncation | None = None
    system: str | None = None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.context, str):
            raise RequestError(f"the context is {short_repr(self.context)}; expected a text")
        if not self.question_list:
            raise RequestError("a request needs at least one question")
        for index, question in enumerate(self.question_list):
            if not isinstance(question, str) or not question.strip():
                raise RequestError(f"question {index} is empty; every question needs some text")
        if not isinstance(self.answer_prefix, str) and (
            len(self.answer_prefix) != len(self.question_list)
        ):
            raise RequestError(
                f"{len(self.answer_prefix)} answer prefixes for {len(self.question_list)} "
                "questions; give one for all or one for each"
            )
        if self.truncation is not None and self.truncation not in TRUNCATIONS:
            raise RequestError(
                f"truncation {self.truncation!r} is not known; use one of {', '.join(TRUNCATIONS)}"
            )

    @property
    def question_list(self) -> tuple[str, ...]:
        """The questions, always as a tuple."""
        return (self.questions,) if isinstance(self.questions, str) else self.questions

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The answer prefix of every question."""
        if isinstance(self.answer_prefix, str):
            return (self.answer_prefix,) * len(self.question_list)
        return self.answer_prefix


@attrs.frozen(kw_only=True)
class AnswerDetail:
    """How one answer came about.

    Attributes:
        text: The generated text, answer prefix not included, special tokens removed.
        token_ids: The generated tokens, the ending EOS included.
        prompt_tokens: Tokens of the whole prompt.
        context_tokens: Those of them that were prefilled as context.
        new_tokens: Generated tokens.
        seconds_prefill: Time of the context's prefill, which the questions of a request share.
        seconds_decode: Time of question and generation, observers not included.
        seconds_first_token: The part of ``seconds_decode`` until the first new token was known.
        seconds_index: Time in which the pipeline's maskers took note of the prefilled context,
            which the questions of a request share; 0 for maskers that keep nothing.
        finished: ``eos`` or ``length`` (or ``stop`` for a stop string).
        backends: Backends that executed the sparse calls.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    context_tokens: int
    new_tokens: int
    seconds_prefill: float
    seconds_decode: float
    finished: str
    backends: tuple[str, ...] = ()
    seconds_first_token: float = 0.0
    seconds_index: float = 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the whole prompt to the first new token: prefill, upkeep of the maskers,
        question.
        """
        return self.seconds_prefill + self.seconds_index + self.seconds_first_token

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second after the first; None for an answer of one token."""
        seconds = self.seconds_decode - self.seconds_first_token
        return (self.new_tokens - 1) / seconds if self.new_tokens > 1 and seconds > 0 else None


@attrs.frozen(kw_only=True)
class Response:
    """The answers to a request.

    Attributes:
        responses: A str for a str question, a list for several.
        details: One per question.
    """

    responses: str | list[str]
    details: tuple[AnswerDetail, ...]


@attrs.frozen(kw_only=True)
class Likelihood:
    """How well a model predicts a given text, token by token.

    Attributes:
        token_ids: The predicted tokens; the first token of the text is none of them, for the pass
            that predicts it belongs to the context.
        losses: Negative log-likelihood of each, in nats.
        correct: Whether each is the token that the model held most likely.
        context_tokens: Tokens that stood before the text.
        seconds: Time of the text's pass, observers not included.
        backends: Backends that executed the sparse calls.
    """

    token_ids: tuple[int, ...]
    losses: tuple[float, ...]
    correct: tuple[bool, ...]
    context_tokens: int
    seconds: float
    backends: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return sum(self.losses) / len(self.losses)
