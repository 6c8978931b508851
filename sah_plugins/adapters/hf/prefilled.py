"""Contexts that have been read, ready for questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from sah_core import Request, compat
from sah_core.attention import Session, Snapshot
from sah_core.errors import RequestError, short_repr

from .kv_cache import Keeping
from .prompts import Prompt


@attrs.frozen
class ContextState:
    """What a pipeline's maskers keep of a context.

    Attributes:
        session: Holds the states.
        ended: Snapshot after the end of the context was announced to them.
        seconds: Time that taking note of the context took.
    """

    session: Session
    ended: Snapshot
    seconds: float = 0.0


@attrs.frozen
class Row:
    """One sequence of a cache.

    Attributes:
        request: What is asked.
        prompts: One per question.
        shared: Leading tokens that all prompts share and that the cache holds.
        padding: Positions of the cache before the first of them.
    """

    request: Request
    prompts: list[Prompt]
    shared: int
    padding: int = 0

    @property
    def cached(self) -> list[int]:
        """What the cache holds of it, 0 for padding."""
        return [0] * self.padding + list(self.prompts[0].ids[: self.shared])


@attrs.define
class Prefilled:
    """Contexts whose keys and values are ready; usually one, several after `prefill_batch`.

    Attributes:
        rows: The sequences of the cache, left-padded to one length.
        cache: The KV cache.
        base: Its snapshot after the contexts.
        seconds: Time of the prefill.
        session: The session that ran it if the prefill was sparse, else None; only that pipeline
            can then answer.
        empty: Snapshot of the cache before the contexts.
        chunk: Tokens per pass of the prefill; all at once when None.
        keeping: How the cache keeps the contexts.
        states: States built on the contexts, per pipeline.
        hidden: Hidden states of the contexts, where proposals have asked for them.
    """

    rows: tuple[Row, ...]
    cache: Any
    base: list[Any]
    seconds: float
    session: Session | None = None
    empty: list[Any] = attrs.field(factory=list)
    chunk: int | None = None
    keeping: Keeping = Keeping()
    states: dict[str, ContextState] = attrs.field(factory=dict)
    hidden: compat.HiddenStates | None = None

    @property
    def request(self) -> Request:
        """What is asked of the first context."""
        return self.rows[0].request

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of the first context, one per question."""
        return self.rows[0].prompts

    @property
    def shared(self) -> int:
        """Leading tokens that all prompts of the first context share and that the cache holds."""
        return self.rows[0].shared

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Positions in the cache, padding included."""
        return self.rows[0].padding + self.rows[0].shared

    @property
    def padding(self) -> tuple[int, ...]:
        """Padding of every row; nothing if no row has any."""
        paddings = tuple(row.padding for row in self.rows)
        return paddings if any(paddings) else ()

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest context part among the prompts."""
        return max(p.context_tokens for row in self.rows for p in row.prompts)


def check_alone(prefilled: Prefilled, method: str, instead: str = "prefill them alone") -> None:
    """Refuse contexts that were read together where one is expected.

    Raises:
        RequestError: If there are several.
    """
    if prefilled.batch > 1:
        raise RequestError(
            f"{method} takes one context, and {prefilled.batch} were prefilled together; {instead}"
        )


def check_questions(row: Row, indices: Iterable[int]) -> None:
    """Refuse to ask what a request does not ask.

    Raises:
        RequestError: If a request has no question of an index.
    """
    count = len(row.prompts)
    for index in indices:
        if not isinstance(index, int) or not 0 <= index < count:
            raise RequestError(
                f"there is no question {short_repr(index)}: the request has {count}, counted from 0"
            )


def same_lengths(rows: Sequence[Row], index: int) -> list[Prompt]:
    """The prompts of one question of each row, whose parts must be as long as each other's.

    Raises:
        RequestError: If they are not, or a row has no such question.
    """
    for row in rows:
        check_questions(row, [index])
    prompts = [row.prompts[index] for row in rows]
    lengths = {
        (row.padding, row.shared, prompt.context_tokens, len(prompt.ids))
        for row, prompt in zip(rows, prompts, strict=True)
    }
    if len(lengths) > 1:
        raise RequestError(
            "captured decoding takes contexts and questions of equal length; prefill these alone"
        )
    return prompts


def with_prompts(rows: Sequence[Row], made: Mapping[tuple[int, int], Prompt]) -> tuple[Row, ...]:
    """The same rows with other prompts in the place of some, by row and question."""
    return tuple(
        attrs.evolve(
            row, prompts=[made.get((number, i), prompt) for i, prompt in enumerate(row.prompts)]
        )
        for number, row in enumerate(rows)
    )


def shared_context(prompts: Sequence[Prompt]) -> int:
    """Leading context tokens that all prompts have in common."""
    first = prompts[0].ids
    length = min(p.context_tokens for p in prompts)
    for prompt in prompts[1:]:
        for index in range(length):
            if prompt.ids[index] != first[index]:
                length = index
                break
    return length


def padded_rows(requests: Sequence[Request], prompts: Sequence[list[Prompt]]) -> tuple[Row, ...]:
    """The rows of a cache, left-padded so that all contexts end together."""
    shared = [shared_context(p) for p in prompts]
    width = max(shared)
    return tuple(
        Row(request, list(made), length, width - length)
        for request, made, length in zip(requests, prompts, shared, strict=True)
    )
