r"""Metrics of AIME, whose answers are integers from 0 to 999; none of them is official.

``aime_integer`` compares integers: that in the last complete ``\boxed{…}``, or else the last one of
the last line. ``aime_lm_eval`` is that of lm-evaluation-harness, for comparison with its numbers:
it compares normal forms of texts, so that 033 is not 33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.boxed import as_integer, last_boxed, last_integer, to_closing_brace
from sah_plugins.scoring.math_answer import is_equiv

GREATEST = 999
_BOX = "\\boxed"


def answer_of(prediction: str) -> tuple[int | None, bool]:
    """Return the integer that an answer gives, None if none in range, and whether it is boxed."""
    content = last_boxed(prediction)
    number = last_integer(prediction) if content is None else as_integer(content)
    in_range = number is not None and number <= GREATEST
    return number if in_range else None, in_range and content is not None


def _integer(prediction: str, references: Sequence[str | int]) -> float:
    number, _ = answer_of(prediction)
    return float(number is not None and any(number == int(r) for r in references))


def _lm_eval(prediction: str, references: Sequence[str | int]) -> float:
    answer = _extracted(prediction)
    return float(any(is_equiv(answer, str(r), harness=True) for r in references))


def _extracted(text: str) -> str:
    """The content of the last box, or what is between the first and the last ``$``, or all."""
    if f"{_BOX} " in text:
        return text.rsplit(f"{_BOX} ", 1)[1].split("$")[0]
    start = text.rfind(_BOX)
    if start >= 0 and text.startswith("{", start + len(_BOX)):
        content = to_closing_brace(text, start + len(_BOX) + 1)
        if content is not None:
            return content
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first < last else text


SCORERS: Mapping[str, Scorer] = {
    "aime_integer": Scorer(
        function=_integer,
        description="1 if the boxed integer, or else the last of the last line, is right",
        source="this project",
    ),
    "aime_lm_eval": Scorer(
        function=_lm_eval,
        description="1 if the boxed answer equals a reference in its normal form",
        source="EleutherAI/lm-evaluation-harness@4e7e0d4:lm_eval/tasks/aime/utils.py",
    ),
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of AIME."""
    return SCORERS
