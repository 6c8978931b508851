"""What plugins are tested with: golden cases and conformance checks.

Names are loaded on first use, so that the golden runner does not import the checks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarks import BENCHMARK_CHECKS, run_benchmark_checks
    from .conformance import CHECKS, MODEL, CheckResult, CheckSkipped, run_checks
    from .golden import CaseResult, run_maskers
    from .golden_metrics import run_metrics

__all__ = [
    "BENCHMARK_CHECKS",
    "CHECKS",
    "MODEL",
    "CaseResult",
    "CheckResult",
    "CheckSkipped",
    "run_benchmark_checks",
    "run_checks",
    "run_maskers",
    "run_metrics",
]

_MODULES = {
    "BENCHMARK_CHECKS": "benchmarks",
    "CHECKS": "conformance",
    "CaseResult": "golden",
    "CheckResult": "conformance",
    "CheckSkipped": "conformance",
    "MODEL": "conformance",
    "run_benchmark_checks": "benchmarks",
    "run_checks": "conformance",
    "run_maskers": "golden",
    "run_metrics": "golden_metrics",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
