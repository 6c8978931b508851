"""An answer, and what led to it where one question follows from another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from sah_core.benchmark import Example
    from sah_core.requests import AnswerDetail


@attrs.frozen
class Answer:
    """The answer that counts.

    Attributes:
        detail: Its text; of a chain of questions, the tokens of the first prompt and the time of
            all.
        turns: The questions and answers before the last, of a chain.
        last: The example that was answered last.
    """

    detail: AnswerDetail
    turns: tuple[dict[str, Any], ...]
    last: Example

    @classmethod
    def of(cls, example: Example, detail: AnswerDetail) -> Answer:
        """An answer by itself."""
        return cls(detail, (), example)

    def followed_by(self, example: Example, detail: AnswerDetail) -> Answer:
        """The chain with one more question, whose answer now counts."""
        first = self.detail
        turn = {
            "question": self.last.question,
            "prediction": first.text,
            "new_tokens": first.new_tokens,
            "finished": first.finished,
        }
        seconds = detail.seconds_prefill + detail.seconds_index + detail.seconds_decode
        merged = attrs.evolve(
            first,
            text=detail.text,
            token_ids=detail.token_ids,
            new_tokens=detail.new_tokens,
            finished=detail.finished,
            backends=tuple(sorted({*first.backends, *detail.backends})),
            seconds_decode=first.seconds_decode + seconds,
        )
        return Answer(merged, (*self.turns, turn), example)
