"""Metrics by name: text, mapping and instance, with parameters."""

import pickle

import attrs
import pytest

from sah_core import MetricCall, Registry, param
from sah_core.errors import (
    ParameterError,
    PipelineSyntaxError,
    UnknownParameterError,
    UnknownPluginError,
)

pytestmark = pytest.mark.unit


@attrs.frozen(kw_only=True, eq=False)
class Lag:
    """A metric with parameters."""

    name = "lag"
    every: int = param(4, minimum=1, help="each n-th")
    word: str = param("a", help="a word")

    def reset(self):
        pass

    def result(self):
        return {}


class Plain:
    """A metric that subclasses nothing and takes nothing."""

    name = "plain"

    def reset(self):
        pass

    def result(self):
        return {}


@pytest.fixture
def registry():
    registry = Registry()
    registry.metrics.register("lag", Lag)
    registry.metrics.register("plain", Plain)
    return registry


@pytest.mark.parametrize(
    "source",
    [
        "lag(every=2, word=b)",
        "lag(2, word=b)",
        ' lag ( every = 2 , word = "b" ) ',
        {"metric": "lag", "every": 2, "word": "b"},
        {"lag": {"every": 2, "word": "b"}},
        MetricCall("lag", {"every": 2, "word": "b"}),
    ],
)
def test_all_forms_of_a_metric_mean_the_same(source, registry):
    call = MetricCall.parse(source, registry)
    assert call == MetricCall("lag", {"every": 2, "word": "b"})
    assert call.text == str(call) == "lag(every=2, word=b)"
    assert MetricCall.parse(call.text, registry) == call
    assert pickle.loads(pickle.dumps(call)) == call


def test_an_instance_is_a_form_too(registry):
    assert MetricCall.parse(Lag(every=2), registry) == MetricCall("lag", {"every": 2, "word": "a"})


@pytest.mark.parametrize("source", ["plain", "plain()", {"metric": "plain"}, {"plain": None}])
def test_a_metric_without_parameters_is_its_name(source, registry):
    call = MetricCall.parse(source, registry)
    assert (call.text, call.parameters) == ("plain", {})


def test_defaults_are_part_of_the_text_and_every_instance_is_new(registry):
    call = MetricCall.parse("lag", registry)
    assert call.text == "lag(every=4, word=a)"
    first, second = call.make(registry), call.make(registry)
    assert first is not second
    assert (type(first), first.every) == (Lag, 4)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("lagg", UnknownPluginError, "no metric named 'lagg'. did you mean 'lag'?"),
        ("lag(evry=2)", UnknownParameterError, "lag: no parameter named 'evry'. did you mean"),
        ("lag(0)", ParameterError, "lag: every = 0 is not allowed: expected an integer >= 1."),
        ("lag(1, every=2)", ParameterError, "expected every only once"),
        ("plain(1)", ParameterError, "plain: argument 1 = 1 is not allowed: expected no param"),
        ("lag(1", PipelineSyntaxError, "metric 'lag(1': found the end of the text at column 6"),
        ("lag | plain", PipelineSyntaxError, "found '|' at column 5, expected '(' or the end."),
        ("lag(1) x", PipelineSyntaxError, "found 'x' at column 8, expected the end."),
        ("", PipelineSyntaxError, "expected a metric's name"),
        (3, ParameterError, "Metric: metric = 3 is not allowed: expected a name, a text such as"),
        ({"lag": 3}, ParameterError, "or a mapping such as {output-error: {every: 8}}"),
        ({"lag": {}, "plain": {}}, ParameterError, "or a mapping such as"),
    ],
)
def test_what_is_no_metric_is_said_on_one_line(source, kind, message, registry):
    with pytest.raises(kind) as caught:
        MetricCall.parse(source, registry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
