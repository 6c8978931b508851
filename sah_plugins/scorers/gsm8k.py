"""The metric of GSM8K as lm-evaluation-harness has it: equality of the number in the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer

_STRICT, _FLEXIBLE = "strict-match", "flexible-extract"
_PATTERNS = {
    _STRICT: re.compile(r"#### (\-?[0-9\.\,]+)"),
    _FLEXIBLE: re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"),
}
_IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))
_NOTHING = "[invalid]"


def extract_number(prediction: str, how: str) -> str:
    """Return the number behind the first ``####``, or the last one, as text.

    Args:
        prediction: The answer.
        how: ``strict-match`` or ``flexible-extract``.
    """
    found = list(_PATTERNS[how].finditer(prediction))
    if not found:
        return _NOTHING
    match = found[0] if how == _STRICT else found[-1]
    return next(group for group in match.groups() if group).strip()


def _bare(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def _exact_match(prediction: str, references: Sequence[str], filter: str = _STRICT) -> float:
    number = _bare(extract_number(prediction, filter))
    return float(any(number == _bare(reference) for reference in references))


SCORERS: Mapping[str, Scorer] = {
    "gsm8k_lm_eval": Scorer(
        function=_exact_match,
        description="1 if the number behind #### (or the last one) is right",
        source="EleutherAI/lm-evaluation-harness@4e7e0d4:lm_eval/tasks/gsm8k/gsm8k.yaml",
    )
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metric of GSM8K."""
    return SCORERS
