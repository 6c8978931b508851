"""What several samples per problem say: pass@k, its interval, the majority's answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_Z = 1.959963984540054
"""Of a 95 % interval."""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that at least one of ``k`` samples is right, estimated without bias.

    Chen et al., "Evaluating Large Language Models Trained on Code" (2021, arXiv:2107.03374).

    Args:
        samples: How many were drawn, at least ``k``.
        right: How many of them are right.
        k: How many would be drawn.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def interval(shares: Sequence[float], samples: int) -> tuple[float, float] | None:
    """Return a 95 % interval of the mean share of right answers, 0 to 1.

    Samples of one problem are no independent draws of problems, and so count as fewer: the spread
    between problems says as how many. Of these it is Wilson's interval, which is never a point.

    Args:
        shares: Of right answers, by problem.
        samples: Of all problems together.

    Returns:
        None for no problem.
    """
    problems = len(shares)
    if problems == 0:
        return None
    p = math.fsum(shares) / problems
    squares = math.fsum((share - p) ** 2 for share in shares)
    variance = squares / (problems * (problems - 1)) if problems > 1 else 0.0
    draws = min(p * (1 - p) / variance, samples) if variance > 0 else problems
    draws = max(draws, problems)
    centre = p + _Z**2 / (2 * draws)
    spread = _Z * math.sqrt(p * (1 - p) / draws + (_Z / (2 * draws)) ** 2)
    low, high = ((centre + side * spread) / (1 + _Z**2 / draws) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def majority_share(answers: Sequence[float | None], right: float) -> float:
    """Return 1 if most samples answer rightly; with a tie, 1 over the number of answers in it.

    Args:
        answers: One per sample; None, which has no vote, for no answer.
        right: The right answer.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leading = [answer for answer, count in votes.items() if count == most]
    return 1.0 / len(leading) if right in leading else 0.0
