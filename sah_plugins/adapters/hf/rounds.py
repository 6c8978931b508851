"""Which questions of a batch of contexts can be answered together.

Questions of one forward pass must have the same length: padding between a context and its question
would be counted by windows and pages, and the answers would no longer be those of each request
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import attrs

from .prefilled import Row


@attrs.frozen
class Round:
    """Questions that run together.

    Attributes:
        asked: Per row the index of its question, None for a row that has none of this length.
        extra: Tokens of the context after what the questions of a row share; below 0 where it ends
            before that.
        question: Tokens after the context.
    """

    asked: tuple[int | None, ...]
    extra: int
    question: int

    @property
    def idle(self) -> tuple[int, ...]:
        """Rows without a question, which run along for nothing."""
        return tuple(row for row, index in enumerate(self.asked) if index is None)

    def prompt_tokens(self, rows: Sequence[Row]) -> int:
        """Tokens of the longest prompt, padding not included."""
        pairs = zip(rows, self.asked, strict=True)
        return max(len(row.prompts[index].ids) for row, index in pairs if index is not None)

    def tokens(self, rows: Sequence[Row], filler: int) -> list[list[int]]:
        """The whole prompt of every row, left-padded, as long as each other."""
        length = rows[0].padding + rows[0].shared + self.extra + self.question
        made = []
        for row, index in zip(rows, self.asked, strict=True):
            if index is None:
                ids = list(row.prompts[0].ids[: max(0, row.shared + min(0, self.extra))])
                ids += [filler] * (length - row.padding - len(ids))
            else:
                ids = list(row.prompts[index].ids)
            # an idle row may have no token where the others end before what they share
            made.append(([filler] * row.padding + ids)[:length])
        return made


def rounds(
    rows: Sequence[Row], indices: Sequence[Sequence[int]], *, whole: bool = False
) -> Iterator[Round]:
    """Group questions by length, as many rows at once as possible.

    Args:
        rows: The contexts.
        indices: The questions to be asked of each; of a single context in this order.
        whole: The whole prompts must have one length too, for options that count it.
    """

    def lengths_of(row: Row, index: int) -> tuple[int, int, int]:
        prompt = row.prompts[index]
        inside = prompt.context_tokens - row.shared
        behind = len(prompt.ids) - prompt.context_tokens
        return inside, behind, len(prompt.ids) if whole else 0

    waiting = [list(row) for row in indices]
    while any(waiting):
        lengths = Counter(
            length
            for row, left in zip(rows, waiting, strict=True)
            for length in dict.fromkeys(lengths_of(row, i) for i in left)
        )
        chosen = max(lengths, key=lambda length: lengths[length])
        asked: list[int | None] = []
        for row, left in zip(rows, waiting, strict=True):
            fitting = [i for i in left if lengths_of(row, i) == chosen]
            asked.append(fitting[0] if fitting else None)
            if fitting:
                left.remove(fitting[0])
        yield Round(tuple(asked), *chosen[:2])
