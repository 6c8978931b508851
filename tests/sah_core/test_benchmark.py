import json
import subprocess
import sys

import attrs
import pytest

from sah_core.benchmark import Benchmark, Example, Protocol, ScoredExample, mean, spread

pytestmark = pytest.mark.unit


class Echo(Benchmark):
    name = "echo"
    main_score = "accuracy"
    protocol = Protocol(chat=False)


def scored(task, **scores):
    return ScoredExample(id="1", task=task, scores=scores)


def test_aggregate_means_each_score_overall_and_per_task():
    samples = [scored("a", accuracy=100.0), scored("a", accuracy=0.0), scored("b", accuracy=100.0)]
    metrics = Echo().aggregate(samples)
    assert metrics["n"] == 3
    assert metrics["scores"]["accuracy"] == pytest.approx(200 / 3)
    assert metrics["tasks"] == {
        "a": {"n": 2, "scores": {"accuracy": 50.0}},
        "b": {"n": 1, "scores": {"accuracy": 100.0}},
    }


def test_a_score_that_some_examples_lack_is_averaged_over_those_that_have_it():
    metrics = Echo().aggregate([scored("a", f1=40.0), scored("a", rouge=10.0)])
    assert metrics["scores"] == {"f1": 40.0, "rouge": 10.0}


def test_aggregating_nothing_gives_valid_json_without_nan():
    assert (
        json.dumps(Echo().aggregate([]), allow_nan=False) == '{"n": 0, "scores": {}, "tasks": {}}'
    )
    assert mean([]) is None


def test_a_task_has_the_class_protocol_unless_the_benchmark_says_otherwise():
    assert Echo().protocol_for("any") is Echo.protocol
    assert Echo.protocol.to_plain() == {
        "chat": False,
        "truncation": "none",
        "prefix": "assistant",
        "version": "1",
    }


def test_examples_are_frozen_and_hold_references_as_a_tuple():
    example = Example(
        id="1",
        context_id="c",
        context="",
        question="?",
        references=["x"],
        max_new_tokens=1,
        task="t",
    )
    assert example.references == ("x",)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        example.id = "2"


def test_the_scored_form_keeps_what_breakdowns_need():
    example = Example(
        id="1",
        context_id="c",
        context="",
        question="?",
        references=("x",),
        max_new_tokens=1,
        task="t",
        facts={"depth": 50},
    )
    sample = ScoredExample.of(example, {"accuracy": 100.0})
    assert (sample.id, sample.task, sample.facts) == ("1", "t", {"depth": 50})


def test_importing_the_module_loads_neither_torch_nor_transformers():
    code = "import sys, sah_core.benchmark; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 500])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_a_spread_is_distinct_ascending_and_holds_the_smaller_ones(count, seed):
    smaller = set()
    for size in range(count + 2):
        chosen = spread(count, size, seed)
        assert len(chosen) == len(set(chosen)) == min(size, count)
        assert chosen == sorted(chosen)
        assert all(0 <= position < count for position in chosen)
        assert smaller <= set(chosen)
        smaller = set(chosen)


def test_a_spread_reaches_every_part_of_the_task():
    for seed in range(20):
        chosen = spread(1000, 8, seed)
        gaps = [after - before for before, after in zip(chosen, chosen[1:], strict=False)]
        assert max(gaps) <= 130
    assert len({tuple(spread(1000, 2, seed)) for seed in range(20)}) == 20


class Rows(Benchmark):
    name = "rows"
    main_score = "accuracy"
    protocol = Protocol(chat=False, version="3")

    def load(self, task):
        for index in range(5):
            yield Example(
                id=str(index),
                context_id="c",
                context="long",
                question="?",
                references=("yes",),
                max_new_tokens=1,
                task=task,
            )

    def score(self, example, prediction):
        return {"accuracy": 100.0 * (prediction in example.references)}


def test_load_and_score_make_a_benchmark():
    rows = Rows()
    assert rows.tasks() == ("rows",)
    assert rows.revision() == "rows-3"
    [example, *_] = rows.examples("rows", None, 0)
    assert rows.gold(example) == "yes"
    assert rows.score(example.without_context(), "yes") == {"accuracy": 100.0}
    assert (rows.count("rows"), rows.info("rows"), rows.follow_up(example, "x")) == (None,) * 3
    assert rows.generation_for("rows") == {}


def test_examples_at_positions_are_made_no_further_than_needed():
    made = []

    class Counting(Rows):
        def load(self, task):
            for example in super().load(task):
                made.append(example.id)
                yield example

    chosen = Counting().examples_at("rows", None, 0, [0, 2])
    assert [example.id for example in chosen] == ["0", "2"]
    assert made == ["0", "1", "2"]
    assert list(Counting().examples_at("rows", None, 0, [])) == []
