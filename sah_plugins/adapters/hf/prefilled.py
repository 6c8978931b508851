"""A context that has been read, ready for questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from sah_core import Request
from sah_core.attention import Session, Snapshot

from .prompts import Prompt


@attrs.frozen
class ContextState:
    """What a pipeline's maskers keep of a context.

    Attributes:
        session: Holds the states.
        ended: Snapshot after the end of the context was announced to them.
        open: Snapshot before that, None unless the prefill was sparse.
        seconds: Time that taking note of the context took.
    """

    session: Session
    ended: Snapshot
    open: Snapshot | None = None
    seconds: float = 0.0


@attrs.define
class Prefilled:
    """A context whose keys and values are ready.

    Attributes:
        request: What is asked.
        prompts: One per question.
        shared: Leading tokens that all prompts share and that the cache holds.
        cache: The KV cache.
        base: Its snapshot after the context.
        seconds: Time of the prefill.
        session: The session that ran it if the prefill was sparse, else None; only that pipeline
            can then answer.
        states: States built on this context, per pipeline.
        batch: Sequences in the cache; more than one where a caller filled it with copies.
    """

    request: Request
    prompts: list[Prompt]
    shared: int
    cache: Any
    base: list[Any]
    seconds: float
    session: Session | None = None
    states: dict[str, ContextState] = attrs.field(factory=dict)
    batch: int = 1

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest context part among the prompts."""
        return max(p.context_tokens for p in self.prompts)

    @property
    def shareable(self) -> bool:
        """Whether any pipeline with a dense prefill can answer from here."""
        return self.session is None


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
