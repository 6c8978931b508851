"""What a cell says in sum."""

import pytest

from sah_bench.benchmark_plans import BenchmarkPlan
from sah_bench.results import combine, result_of, saving
from sah_bench.store import Cell
from sah_core import Pipeline, registry

pytestmark = pytest.mark.unit


def test_density_of_a_run_is_the_ratio_of_the_sums():
    samples = [
        {"density": 0.5, "max_density": 0.7, "selected": 5, "allowed": 10},
        {"density": 0.1, "max_density": 0.2, "selected": 10, "allowed": 100},
    ]
    combined = combine(registry.metrics["density"], samples)
    sums = {"selected": 15, "allowed": 110}
    assert combined == {"density": 15 / 110, "max_density": 0.7, **sums}


def test_density_of_a_run_in_which_nothing_was_sparse_is_1():
    none = {"density": 1.0, "max_density": 1.0, "selected": 0, "allowed": 0}
    assert combine(registry.metrics["density"], [none, none])["density"] == 1.0


def test_numbers_of_a_metric_that_does_not_say_how_are_averaged():
    results = [{"a": 1, "b": "x", "c": True}, {"a": 2.0, "d": None}]
    assert combine(object(), results) == {"a": 1.5}


@pytest.mark.parametrize(
    ("pipeline", "backends", "expected"),
    [
        ("dense", ["sdpa"], "none"),
        ("sink(4)", [], "none"),
        ("sink(4)", ["gather"], "realised"),
        ("sink(4)", ["eager", "gather"], "simulated"),
        ("sink(4)", ["unheard-of"], "simulated"),
    ],
)
def test_saving_is_realised_only_if_every_backend_skips_keys(pipeline, backends, expected):
    assert saving(Pipeline.parse(pipeline), backends) == expected


def test_seconds_are_means_over_contexts_and_over_timed_samples(fakes, tmp_path):
    rows = [("a", 1.0, 2.0), ("a", 1.0, 4.0), ("b", 4.0, None), ("c", None, None)]
    cell = Cell(
        folder=tmp_path,
        id="",
        records=[{"context_id": context} for context, _, _ in rows],
        timings=[{"prefill": prefill, "decode": decode} for _, prefill, decode in rows],
    )
    plan = BenchmarkPlan(benchmark=fakes.Quiz(), tasks=("easy",))
    result = result_of(cell, "m", plan, "easy", Pipeline.dense(), None)
    assert result.prefill_seconds == pytest.approx((1.0 + 4.0) / 2)
    assert result.decode_seconds == pytest.approx((2.0 + 4.0) / 2)
    assert (result.samples, result.timed) == (4, 2)
