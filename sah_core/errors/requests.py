"""Errors of requests."""

import attrs

from sah_core.errors.base import SahError
from sah_core.errors.text import one_line


@attrs.define
class ContextTooLongError(SahError, ValueError):
    """A prompt has more tokens than are allowed.

    Attributes:
        tokens: the tokens that the prompt and the answer need.
        limit: the tokens that are allowed.
        what: who sets the limit, such as ``model 'smollm2-135m'`` or ``max_context_length``.
    """

    tokens: int
    limit: int
    what: str

    def __str__(self) -> str:
        if self.what == "max_context_length":
            return (
                f"the context is too long: {self.tokens} tokens, but max_context_length allows "
                f"{self.limit} and truncation is 'none'. raise max_context_length, or let "
                "truncation be 'middle' or 'head'."
            )
        return (
            f"the prompt is too long: {self.tokens} tokens, but {self.what} allows {self.limit}. "
            "shorten the question, ask for fewer new tokens, or cut the context with a "
            "max_context_length and truncation='middle'."
        )


@attrs.define
class RequestError(SahError, ValueError):
    """A request cannot be served as it is.

    Attributes:
        message: what is wrong and what is allowed, on one line.
    """

    message: str

    def __str__(self) -> str:
        return one_line(self.message)
