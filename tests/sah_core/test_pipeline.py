"""Pipelines: three forms that are equal, where they apply, and what is refused."""

import copy
import json
import pickle
import subprocess
import sys
from typing import ClassVar

import attrs
import pytest

from sah_core import registry as global_registry
from sah_core.errors import (
    ParameterError,
    PipelineError,
    PipelineSyntaxError,
    UnknownParameterError,
    UnknownPluginError,
)
from sah_core.masker import Capabilities, Masker
from sah_core.parameters import Size, param
from sah_core.pipeline import Pipeline
from sah_core.registry import Registry

pytestmark = pytest.mark.unit


class Toy(Masker):
    def add_mask(self, inputs, previous):
        return previous


@attrs.frozen(kw_only=True)
class First(Toy):
    name: ClassVar[str] = "t-first"
    first_size: Size = param(128, type=Size, help="keys")


@attrs.frozen(kw_only=True)
class Rich(Toy):
    name: ClassVar[str] = "t-rich"
    top_p: float = param(0.9, help="mass", minimum=0, maximum=1)
    mode: str = param("mean", help="pooling")
    exact: bool = param(False, help="exact")
    channels: tuple[int, ...] | None = param(None, type=tuple[int, ...], help="channels")
    bits: int = param(8, help="bits")


@attrs.frozen(kw_only=True)
class Plain(Toy):
    name: ClassVar[str] = "t-plain"


@attrs.frozen(kw_only=True)
class Sampler(Toy):
    name: ClassVar[str] = "t-sampler"
    capabilities: ClassVar[Capabilities] = Capabilities(stochastic=True)


class Backend:
    name = "t-gather"


@pytest.fixture
def registry():
    fresh = Registry()
    for cls in (First, Rich, Plain, Sampler):
        fresh.maskers.register(cls.name, cls)
    fresh.backends.register("t-gather", Backend)
    return fresh


@pytest.fixture
def parse(registry):
    return lambda source: Pipeline.parse(source, registry)


class TestText:
    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("t-first", "t-first(first_size=128)"),
            ("t-first()", "t-first(first_size=128)"),
            ("t-first(64)", "t-first(first_size=64)"),
            ("t-first( first_size = 5% )", "t-first(first_size=0.05)"),
            ("t-first(100%)", "t-first(first_size=1.0)"),
            ("t-first(1)", "t-first(first_size=1)"),
            ("t-plain", "t-plain"),
            ("local:t-plain", "t-plain"),
            ("t-plain|t-plain", "t-plain | t-plain"),
            ("t-plain\n  | t-plain\n", "t-plain | t-plain"),
            (
                "t-rich(1, mode='two words', exact=true, channels=[3, 1], bits=-2)",
                't-rich(top_p=1.0, mode="two words", exact=true, channels=[3, 1], bits=-2)',
            ),
            (
                "t-rich(1e-3, channels=none)",
                "t-rich(top_p=0.001, mode=mean, exact=false, channels=none, bits=8)",
            ),
            (
                't-rich(.5, mode="none", channels=[])',
                't-rich(top_p=0.5, mode="none", exact=false, channels=[], bits=8)',
            ),
            (
                "t-rich(mode=/data/a-b_c.json)",
                "t-rich(top_p=0.9, mode=/data/a-b_c.json, exact=false, channels=none, bits=8)",
            ),
            ("t-plain @ dense_layers=[1,0,1]", "t-plain @ dense_layers=[0, 1]"),
            ("t-plain @ prefill=sparse, question=dense", None),
            ("t-plain @ question=dense, prefill=sparse", None),
            ("t-plain @ prefill=dense, decode=sparse, seed=0, backend=auto", "t-plain"),
            ("t-plain @ layers=[2], layer_types=[full_attention, sliding_attention]", None),
            ("t-plain @ seed=3, backend=t-gather", "t-plain @ seed=3, backend=t-gather"),
            ("dense", "dense"),
            ("  dense ", "dense"),
        ],
    )
    def test_canonical_text_names_everything_and_round_trips(self, parse, text, canonical):
        pipeline = parse(text)
        if canonical is not None:
            assert pipeline.text == canonical
        assert parse(pipeline.text) == pipeline
        assert parse(pipeline.text).text == pipeline.text == str(pipeline)

    @pytest.mark.parametrize(
        "mode",
        ["", " ", "5%", "3", "1e5", "true", "NULL", 'a"b', "a\\b'c", "line\nend", "ü|@", "x"],
    )
    def test_any_string_survives(self, parse, mode):
        pipeline = Pipeline.of(Rich(mode=mode))
        assert parse(pipeline.text) == pipeline

    @pytest.mark.parametrize("size", [0, 1, 1.0, 0.1, 1e-7, 1 / 3, 10**12])
    def test_any_size_survives(self, parse, size):
        pipeline = Pipeline.of(First(first_size=size))
        assert parse(pipeline.text) == pipeline
        assert parse(json.loads(json.dumps(pipeline.to_plain()))) == pipeline

    @pytest.mark.parametrize(
        ("text", "position", "expected"),
        [
            ("t-first(", 8, "a value"),
            ("t-first(1", 9, "',' or ')'"),
            ("t-first(1 | t-plain", 10, "',' or ')'"),
            ("t-first(1,)", 10, "a parameter's name"),
            ("t-first(1, 2)", 12, "'=' and a value for '2'"),
            ("t-first(first_size=)", 19, "a value"),
            ("t-rich(bits=1, bits=2)", 15, "a name that is not given yet, not 'bits' again"),
            ("t-rich(channels=[1, 2)", 21, "',' or ']'"),
            ("t-rich(channels=[[1]])", 17, "a value or ']'"),
            ("t-rich(mode='open)", 12, "a quoted text that is closed"),
            ("t-plain |", 9, "a masker's name"),
            ("| t-plain", 0, "a masker's name"),
            ("t-plain t-plain", 8, "'(', '|', '@' or the end"),
            ("t-first(1) t-plain", 11, "'|', '@' or the end"),
            ("t-plain @", 9, "an option's name"),
            ("t-plain @ seed", 14, "'=' and a value for 'seed'"),
            ("t-plain @ seed=1 seed=2", 17, "',' or the end"),
            ("t-plain)", 7, "'(', '|', '@' or the end"),
            ("t-plain; rm", 7, "'(', '|', '@' or the end"),
        ],
    )
    def test_a_syntax_error_says_where_and_what_is_expected(self, parse, text, position, expected):
        with pytest.raises(PipelineSyntaxError) as caught:
            parse(text)
        assert (caught.value.position, caught.value.expected) == (position, expected)
        assert f"at column {position + 1}, expected {expected}." in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_unknown_masker_gets_a_suggestion(self, parse):
        with pytest.raises(UnknownPluginError, match=r"did you mean 't-first'"):
            parse("t-frist(3)")

    def test_an_unknown_parameter_gets_a_suggestion(self, parse):
        with pytest.raises(UnknownParameterError, match=r"t-first: .* did you mean 'first_size'"):
            parse("t-first(frist_size=3)")

    def test_a_bad_value_names_masker_parameter_value_and_range(self, parse):
        with pytest.raises(ParameterError, match=r"t-first: first_size = -3 is not allowed"):
            parse("t-first(-3)")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "needs at least one masker; write 'dense'"),
            (" \n", "needs at least one masker; write 'dense'"),
            ("t-plain(3)", "t-plain takes no parameters, but 3 was given"),
            ("t-first(3, first_size=3)", "first_size is given twice"),
            ("dense | t-plain", "'dense' is a whole pipeline"),
            ("t-plain | dense", "'dense' is a whole pipeline"),
            ("dense(3)", "'dense' takes no parameters"),
            ("dense(size=3)", "'dense' takes no parameters"),
            ("dense @ seed=3", "'dense' takes no options, but seed=3 was given"),
            ("dense @ backend=t-gather", "'dense' takes no options"),
            ("t-sampler | t-sampler", "at most one sampler"),
            ("t-plain @ layers=[]", "no layers is never sparse"),
            ("t-plain @ question=dense, decode=dense", "no phases is never sparse"),
        ],
    )
    def test_nonsense_is_refused(self, parse, text, message):
        with pytest.raises(PipelineError, match=message):
            parse(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("t-plain @ dens_layers=[1]", "no parameter named 'dens_layers'. did you mean"),
            ("t-plain @ prefill=maybe", "Pipeline: prefill = 'maybe' is not allowed: .* sparse or"),
            ("t-plain @ dense_layers=[-1]", "dense_layers = .* each an integer >= 0"),
            ("t-plain @ dense_layers=1", "dense_layers = 1 is not allowed"),
            ("t-plain @ seed=1.5", "seed = 1.5 is not allowed: expected an integer >= 0"),
        ],
    )
    def test_bad_options_are_refused(self, parse, text, message):
        with pytest.raises(ParameterError, match=message):
            parse(text)

    def test_an_unknown_backend_is_refused(self, parse):
        with pytest.raises(UnknownPluginError, match="no backend named 'gahter'"):
            parse("t-plain @ backend=gahter")


class TestPlainForm:
    def test_steps_name_their_masker_and_every_parameter(self, parse):
        pipeline = parse("t-first(5%) | t-plain @ prefill=sparse, decode=dense, layers=[2, 1]")
        assert pipeline.to_plain() == {
            "steps": [{"masker": "t-first", "first_size": 0.05}, {"masker": "t-plain"}],
            "layers": [1, 2],
            "prefill": "sparse",
            "decode": "dense",
        }
        assert parse(pipeline.to_plain()) == pipeline

    def test_dense_is_a_word(self, parse):
        assert Pipeline.dense().to_plain() == "dense"
        assert parse("dense") == Pipeline.dense()
        assert Pipeline.dense().is_dense

    @pytest.mark.parametrize(
        "source",
        [
            ["t-first(64)", "t-plain"],
            [{"masker": "t-first", "first_size": 64}, "t-plain"],
            [First(first_size=64), {"masker": "t-plain"}],
            {"steps": ["t-first(64)", "t-plain"]},
            {"steps": "t-first(64) | t-plain", "name": "mine"},
            First(first_size=64) | Plain(),
            Pipeline.of(First(first_size=64), Plain()),
        ],
    )
    def test_every_form_gives_the_same_pipeline(self, parse, source):
        assert parse(source) == parse("t-first(64) | t-plain")

    def test_a_label_is_no_part_of_what_a_pipeline_is(self, parse):
        named = parse({"steps": "dense", "name": "baseline"})
        assert named.name == named.label == "baseline"
        assert named == Pipeline.dense()
        assert Pipeline.dense().label == "dense"
        assert parse({"steps": ["t-plain"], "name": "mine"}).to_plain() == {
            "steps": [{"masker": "t-plain"}]
        }

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (None, "a pipeline is a text, a list or a mapping, not None"),
            (3, "not 3"),
            ([], "needs at least one masker"),
            ({}, "needs at least one masker"),
            ({"steps": []}, "needs at least one masker"),
            ({"steps": 3}, "needs at least one masker"),
            ([3], "a step is a text such as"),
            ([{"first_size": 3}], "a step is a text such as"),
            (["t-plain | t-plain"], "a step is one masker"),
            (["dense"], "'dense' is a whole pipeline"),
            ({"steps": "t-plain @ seed=1"}, "options go beside 'steps'"),
        ],
    )
    def test_other_data_is_refused(self, parse, source, message):
        with pytest.raises(PipelineError, match=message):
            parse(source)

    def test_unknown_keys_are_refused(self, parse):
        with pytest.raises(UnknownParameterError, match="did you mean 'seed'"):
            parse({"steps": ["t-plain"], "sed": 3})
        with pytest.raises(ParameterError, match="name = 3 is not allowed"):
            parse({"steps": ["t-plain"], "name": 3})


class TestPython:
    def test_maskers_join_with_a_bar(self):
        assert (First() | Plain() | First()).steps == (First(), Plain(), First())

    def test_joining_keeps_the_options(self):
        late = Pipeline.of(Plain(), seed=3, name="x")
        assert (Pipeline.of(First()) | late).seed == 3
        assert (late | First()).seed == 3
        assert (late | First()).name is None
        with pytest.raises(PipelineError, match="different options"):
            late | Pipeline.of(First(), seed=4)
        with pytest.raises(PipelineError, match="whole pipeline"):
            late | Pipeline.dense()

    def test_options_take_the_words_of_the_text_or_a_set_of_phases(self, parse):
        by_words = Pipeline.of(Plain(), prefill="sparse", dense_layers=[0])
        by_set = Pipeline.of(Plain(), phases={"prefill", "question", "decode"}, dense_layers=(0,))
        assert by_words == by_set == parse("t-plain @ prefill=sparse, dense_layers=[0]")
        with pytest.raises(ParameterError, match="phases"):
            Pipeline.of(Plain(), phases=["prefil"])

    def test_a_step_must_be_a_masker(self):
        with pytest.raises(PipelineError, match=r"write Plain\(\)"):
            Pipeline.of(Plain)
        with pytest.raises(PipelineError, match="must be a masker"):
            Pipeline.of("sink")
        with pytest.raises(PipelineError, match="at least one masker"):
            Pipeline.of()

    def test_pipelines_are_values(self):
        pipeline = Pipeline.of(First(), seed=1)
        assert hash(pipeline) == hash(Pipeline.of(First(), seed=1))
        assert pickle.loads(pickle.dumps(pipeline)) == copy.deepcopy(pipeline) == pipeline
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            pipeline.seed = 2

    def test_repr_is_how_to_make_it_again(self):
        assert repr(Pipeline.of(Plain())) == "Pipeline.parse('t-plain')"


class TestWhereItApplies:
    def test_question_and_decode_are_sparse_by_default(self):
        pipeline = Pipeline.of(Plain())
        phases = {
            phase: pipeline.is_sparse(0, None, phase) for phase in ("prefill", "question", "decode")
        }
        assert phases == {"prefill": False, "question": True, "decode": True}

    def test_sliding_layers_are_left_alone_by_default(self):
        pipeline = Pipeline.of(Plain())
        assert pipeline.is_sparse(0, "full_attention", "decode")
        assert not pipeline.is_sparse(0, "sliding_attention", "decode")
        both = Pipeline.of(Plain(), layer_types=["sliding_attention", "full_attention"])
        assert both.is_sparse(0, "sliding_attention", "decode")

    def test_layers_and_dense_layers_choose_layers(self):
        pipeline = Pipeline.of(Plain(), layers=[1, 2, 3], dense_layers=[2])
        assert [pipeline.is_sparse(i, None, "decode") for i in range(5)] == [
            False,
            True,
            False,
            True,
            False,
        ]

    def test_dense_is_sparse_nowhere(self):
        assert not Pipeline.dense().is_sparse(0, None, "decode")


def test_the_global_registry_is_the_default():
    with pytest.raises(UnknownPluginError):
        Pipeline.parse("t-plain")
    global_registry.maskers.register("t-plain", Plain)
    try:
        assert Pipeline.parse("t-plain").steps == (Plain(),)
    finally:
        global_registry.maskers.unregister("t-plain")


def test_pipelines_come_without_torch():
    code = "import sys; from sah_core import Pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", ["none", "'none'", "null"])
def test_none_is_a_choice_where_it_is_one(text):
    [step] = Pipeline.parse(f"quest(group_reduction={text})").steps
    assert step.group_reduction == "none"
    assert Pipeline.parse(Pipeline.of(step).text).steps == (step,)
