"""The metrics of RULER: how many of the answers occur in the predictions."""

from collections.abc import Callable, Mapping, Sequence

from sah_core import hookimpl
from sah_core.scorer import Scorer
from sah_plugins.scoring.string_match import match_all, match_part

SOURCE = "NVIDIA/RULER@c3f5e3b:scripts/eval/synthetic/constants.py"


def _mean_of(match: Callable[[str, Sequence[str]], float]) -> Callable[..., float]:
    def score(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        points = [match(p, r) for p, r in zip(prediction, references, strict=True)]
        return round(sum(points) / len(points) * 100, 2)  # in the official order, for rounding

    return score


SCORERS: Mapping[str, Scorer] = {
    "ruler_string_match_all": Scorer(
        function=_mean_of(match_all),
        scale=1.0,
        corpus=True,
        description="mean share of the answers that occur in a prediction, in percent",
        source=f"{SOURCE}:string_match_all",
    ),
    "ruler_string_match_part": Scorer(
        function=_mean_of(match_part),
        scale=1.0,
        corpus=True,
        description="predictions in which any of the answers occurs, in percent",
        source=f"{SOURCE}:string_match_part",
    ),
}


@hookimpl
def sah_scorer() -> Mapping[str, Scorer]:
    """Provide the metrics of RULER."""
    return SCORERS
