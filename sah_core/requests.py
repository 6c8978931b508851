"""What is asked of a model, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

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


Role = Literal["user", "assistant"]
ROLES: tuple[Role, ...] = ("user", "assistant")


@attrs.frozen
class Turn:
    """A message of the conversation before the context.

    Attributes:
        role: ``user`` or ``assistant``.
        content: What was said.

    Raises:
        RequestError: For another role, or a content that is no text.
    """

    role: Role
    content: str

    def __attrs_post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(
                f"role {short_repr(self.role)} is not known; use one of {', '.join(ROLES)} (a "
                "system message stands in 'system')"
            )
        if not isinstance(self.content, str) or not self.content:
            raise RequestError(
                f"a turn of the {self.role} says {short_repr(self.content)}; expected some text"
            )


def _turns(value: Iterable[Any]) -> tuple[Turn, ...]:
    """Turns from themselves, from pairs, or from mappings as chat templates take them."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"expected a list of turns, not {short_repr(value)}")
    made = []
    for turn in value:
        if isinstance(turn, Mapping) and set(turn) == {"role", "content"}:
            turn = (turn["role"], turn["content"])
        if isinstance(turn, Turn):
            made.append(turn)
        elif isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2:
            made.append(Turn(*turn))
        else:
            raise RequestError(f"{short_repr(turn)} is no turn; expected a role and a content")
    return tuple(made)


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
        turns: Conversation before the context, for chat templates only: user and assistant by
            turns, the assistant last, for context and question are the user's next message.

    Raises:
        RequestError: For what is no text, an empty question, a prefix count that does not fit, an
            unknown truncation, or turns in another order.
    """

    context: str
    questions: str | tuple[str, ...] = attrs.field(converter=_questions)
    answer_prefix: str | tuple[str, ...] = attrs.field(default="", converter=_questions)
    separator: str = "\n"
    chat: bool | None = None
    truncation: Truncation | None = None
    system: str | None = None
    turns: tuple[Turn, ...] = attrs.field(default=(), converter=_turns)

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
        if not isinstance(self.separator, str):
            raise RequestError(f"the separator is {short_repr(self.separator)}; expected a text")
        if self.chat is not None and not isinstance(self.chat, bool):
            raise RequestError(f"chat is {short_repr(self.chat)}; expected True, False or None")
        if self.truncation is not None and self.truncation not in TRUNCATIONS:
            raise RequestError(
                f"truncation {self.truncation!r} is not known; use one of {', '.join(TRUNCATIONS)}"
            )
        if self.system is not None and not isinstance(self.system, str):
            raise RequestError(f"the system message is {short_repr(self.system)}; expected a text")
        for index, turn in enumerate(self.turns):
            expected = ROLES[index % 2]
            if turn.role != expected:
                raise RequestError(
                    f"turn {index} is the {turn.role}'s; expected the {expected}'s: they alternate "
                    "and the user begins"
                )
        if len(self.turns) % 2:
            raise RequestError(
                "the last turn is the user's; expected the assistant's, for context and question "
                "are the user's next message"
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
class Generated:
    """One generated sequence.

    Attributes:
        text: The text, answer prefix not included, special tokens removed.
        token_ids: The tokens, the ending EOS included.
        finished: ``eos``, ``stop`` or ``length``.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: str


@attrs.frozen(kw_only=True)
class AnswerDetail:
    """How one answer came about.

    Attributes:
        text: The generated text, answer prefix not included, special tokens removed. What a healed
            token adds to the prompt is its beginning.
        token_ids: The generated tokens, the ending EOS included; a healed token is the prompt's.
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
        others: Further sequences, where several were asked for (``num_return_sequences``); the
            times are those of all of them together.
        batch: Contexts that were read and answered together; the times are those of all of them.
        overflow_rows: Query rows, of all heads and layers, that wanted more keys than a masker's
            ``max_size`` gave them; like the times, of all contexts and sequences together.
        outputs: What ``generate`` itself returned about this question, per draw, where
            ``return_dict_in_generate`` asked for it: scores, logits, hidden states; not the cache.
        healed_token: The token that was chosen in the place of the prompt's last one (the option
            ``token_healing``); None where that has stayed.
        likelihood: Not None where a given text was predicted in place of an answer: the text is
            then empty and ``token_ids`` are those predicted.
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
    others: tuple[Generated, ...] = ()
    batch: int = 1
    overflow_rows: int = 0
    outputs: tuple[Any, ...] = attrs.field(default=(), repr=False, eq=False)
    healed_token: int | None = None
    likelihood: Likelihood | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of all sequences, that of the answer first."""
        return (self.text, *(other.text for other in self.others))

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the whole prompt to the first new token: prefill, upkeep of the maskers,
        question.
        """
        return self.seconds_prefill + self.seconds_index + self.seconds_first_token

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens of the answer per second after the first; None for an answer of one token,
        and where several sequences were drawn one after the other.
        """
        seconds = self.seconds_decode - self.seconds_first_token
        if self.new_tokens < 2 or self.others or seconds <= 0:
            return None
        return (self.new_tokens - 1) / seconds


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
