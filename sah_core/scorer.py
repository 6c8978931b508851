"""What a scorer plugin provides: the metrics of one family, as official code computes them.

The hook ``sah_scorer`` returns a mapping from the name of a metric, such as ``longbench_qa_f1``, to
a `Scorer`. A scorer is called as ``scorer(prediction, references, **kwargs)`` and returns a number
on the scale of the official code; `Scorer.percent` brings it to 0 to 100.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from .errors import BrokenPluginError, MissingLibraryError, UnknownPluginError, nearest_names
from .registry import Registry, registry

__all__ = ["Accept", "Scorer", "find_scorer", "metric_names", "needed_library"]

Accept = Callable[[Mapping[str, Any], float], str | None]
"""Given a golden case and our score that differs from it: why the difference is right, or None."""


@attrs.frozen(kw_only=True)
class Scorer:
    """One metric.

    Attributes:
        function: Called with a prediction, its references and keywords. What the three are is the
            metric's: a text and a list of texts, as a rule; lists of both for a corpus metric.
        scale: Factor from the metric's own scale to percent: 100 if it goes from 0 to 1.
        higher_is_better: Whether a greater number is a better answer.
        corpus: The prediction is a list, the references a list of lists: a score of many answers.
        description: What it measures, in a line.
        source: The code whose numbers it gives.
        accepts: Judges a golden case whose expected number cannot or should not be met, because
            the official code is wrong; the reason that it returns is reported with the case.
    """

    function: Callable[..., float]
    scale: float = 100.0
    higher_is_better: bool = True
    corpus: bool = False
    description: str
    source: str
    accepts: Accept | None = None

    def __call__(self, prediction: Any, references: Sequence[Any], **kwargs: Any) -> float:
        """Return the score on the metric's own scale.

        Raises:
            MissingLibraryError: An optional library that it needs is not installed.
        """
        return float(self.function(prediction, references, **kwargs))

    def percent(self, prediction: Any, references: Sequence[Any], **kwargs: Any) -> float:
        """Return the score as a percentage."""
        return self.scale * self(prediction, references, **kwargs)

    @property
    def keywords(self) -> tuple[str, ...]:
        """The keywords that the function takes beside prediction and references."""
        return tuple(inspect.signature(self.function).parameters)[2:]


def find_scorer(metric: str, plugins: Registry = registry) -> Scorer:
    """Return the scorer of a metric, whichever plugin has it.

    Raises:
        UnknownPluginError: No plugin that can be loaded has such a metric.
    """
    known = []
    for family in _families(metric, plugins):
        try:
            scorers = plugins.scorers[family]
        except BrokenPluginError:
            if _claims(family, metric):
                raise
            continue
        if metric in scorers:
            return scorers[metric]
        known += list(scorers)
    raise UnknownPluginError("metric", metric, nearest_names(metric, known))


def metric_names(plugins: Registry = registry) -> tuple[str, ...]:
    """Return the names of all metrics; this imports every scorer plugin."""
    return tuple(sorted({name for family in plugins.scorers for name in plugins.scorers[family]}))


def needed_library(name: str, distribution: str, what: str, extra: str = "benchmarks") -> Any:
    """Import an optional library.

    Args:
        name: Of the module.
        distribution: Of the package that ships it.
        what: Who needs it, for the error.
        extra: Of this project, which brings it; empty if none does.

    Raises:
        MissingLibraryError: It is not installed.
    """
    import warnings
    from importlib import import_module

    try:
        with warnings.catch_warnings():
            # What such a library does wrong when it is compiled or imported is not ours to fix.
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        raise MissingLibraryError(what, distribution, extra) from error


def _families(metric: str, plugins: Registry) -> list[str]:
    """All families, those first whose name the metric's begins with, the longest of them first."""
    names = plugins.scorers.names()
    return sorted(names, key=lambda name: (not _claims(name, metric), -len(name), name))


def _claims(family: str, metric: str) -> bool:
    return metric.startswith(f"{family.replace('-', '_')}_")
