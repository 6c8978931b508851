"""Conformance checks of benchmarks: what every one must do, whatever it asks.

Each check is a function of a benchmark that raises `AssertionError`, saying what is wrong and what
to change, or `CheckSkipped`, saying why it cannot apply. A plugin's test suite runs them all on a
small instance:

    @pytest.mark.parametrize("check", BENCHMARK_CHECKS)
    def test_conformance(check, tmp_path):
        check(MyBenchmark.example(tmp_path))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sah_core.benchmark import Benchmark
from sah_core.testing.conformance import CheckResult
from sah_core.testing.conformance.verdict import run_each

from .declaration import (
    check_declaration,
    check_parameters_round_trip,
    check_revision,
    check_task_info,
    check_unknown_task,
)
from .examples import (
    check_follow_up,
    check_positions,
    check_prompts,
    check_references,
    check_reproducible,
    check_streaming,
    check_token_limits,
    check_unique_ids,
)
from .scores import (
    check_aggregate,
    check_empty,
    check_gold,
    check_score_range,
    check_score_without_context,
)

BenchmarkCheck = Callable[[Benchmark], None]


def run_benchmark_checks(
    benchmark: Benchmark, checks: Iterable[BenchmarkCheck] | None = None
) -> list[CheckResult]:
    """Run the checks over a benchmark, all of them by default.

    Whatever a benchmark raises fails the check during which it did.
    """
    return run_each(benchmark, BENCHMARK_CHECKS if checks is None else checks)


BENCHMARK_CHECKS: tuple[BenchmarkCheck, ...] = (
    check_declaration,
    check_task_info,
    check_parameters_round_trip,
    check_unique_ids,
    check_reproducible,
    check_streaming,
    check_positions,
    check_prompts,
    check_references,
    check_token_limits,
    check_gold,
    check_empty,
    check_score_range,
    check_score_without_context,
    check_aggregate,
    check_follow_up,
    check_revision,
    check_unknown_task,
)
"""All checks, in the order in which they are run."""
