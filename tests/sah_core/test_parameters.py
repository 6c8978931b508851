"""Parameters declared once: values, errors, plain forms, schema."""

import json
import pickle
from typing import ClassVar

import attrs
import pytest

from sah_core.errors import MissingParameterError, ParameterError, UnknownParameterError
from sah_core.parameters import Search, Size, from_plain, json_schema, param, specs, to_plain

pytestmark = pytest.mark.unit


@attrs.frozen(kw_only=True)
class Sample:
    name: ClassVar[str] = "sample"
    size: Size = param(128, type=Size, help="keys", unit="tokens", search=Search.choice([64, 0.1]))
    rate: float = param(0.5, help="rate", minimum=0, exclusive_minimum=True, maximum=1)
    bits: int = param(8, help="bits", minimum=1, maximum=64)
    mode: str = param("mean", help="pooling", choices=("mean", "max"))
    exact: bool = param(False, help="exact")
    channels: tuple[int, ...] | None = param(None, type=tuple[int, ...], help="channels", minimum=0)


@attrs.frozen(kw_only=True)
class Needy:
    path: str = param(type=str, help="a file")


class TestSize:
    @pytest.mark.parametrize(
        ("given", "plain"),
        [(0, 0), (128, 128), (1, 1), (1.0, 1.0), (0.05, 0.05), ("128", 128), ("5%", 0.05)]
        + [("0.05", 0.05), ("100%", 1.0), (" 7 % ", 0.07), ("0.55%", 0.0055), (Size(tokens=3), 3)],
    )
    def test_reads_tokens_from_ints_and_fractions_from_floats(self, given, plain):
        size = Size.parse(given)
        assert size.plain() == plain
        assert type(size.plain()) is type(plain)

    @pytest.mark.parametrize(
        "given", [True, -1, 0.0, -0.5, 1.5, "x", "", "-3", "200%", "nan", float("inf"), None, [1]]
    )
    def test_refuses_what_is_no_size(self, given):
        with pytest.raises(ParameterError, match="expected an integer >= 0"):
            Size.parse(given)

    @pytest.mark.parametrize(
        "facts", [{}, {"tokens": 1, "fraction": 0.5}, {"tokens": True}, {"fraction": 2.0}]
    )
    def test_is_either_tokens_or_a_fraction(self, facts):
        with pytest.raises(ParameterError):
            Size(**facts)

    @pytest.mark.parametrize("plain", [0, 1, 128, 1.0, 0.05, 0.1, 1e-6])
    def test_text_and_plain_form_round_trip(self, plain):
        size = Size.parse(plain)
        assert Size.parse(str(size)) == size
        assert Size.parse(size.plain()) == size

    @pytest.mark.parametrize(
        ("given", "keys", "tokens"), [(128, 10, 128), (0.05, 100, 5), (0.05, 99, 4), (1.0, 7, 7)]
    )
    def test_a_fraction_is_rounded_down(self, given, keys, tokens):
        assert Size.parse(given).resolve(keys) == tokens

    def test_one_token_is_not_all_keys(self):
        assert Size.parse(1) != Size.parse(1.0)


class TestValidation:
    @pytest.mark.parametrize(
        ("parameter", "value", "expected"),
        [
            ("size", -3, "an integer >= 0 (tokens) or a fraction in (0, 1]"),
            ("size", True, "an integer >= 0 (tokens) or a fraction in (0, 1]"),
            ("rate", 0, "a number > 0 and <= 1"),
            ("rate", float("nan"), "a number > 0 and <= 1"),
            ("rate", "0.5", "a number > 0 and <= 1"),
            ("rate", None, "a number > 0 and <= 1"),
            ("bits", 0, "an integer >= 1 and <= 64"),
            ("bits", 65, "an integer >= 1 and <= 64"),
            ("bits", True, "an integer >= 1 and <= 64"),
            ("bits", 2.0, "an integer >= 1 and <= 64"),
            ("mode", "median", "one of 'mean', 'max'"),
            ("mode", 3, "one of 'mean', 'max'"),
            ("exact", 1, "true or false"),
            ("channels", [1, -1], "a list, each an integer >= 0, or none"),
            ("channels", 3, "a list, each an integer >= 0, or none"),
            ("channels", "12", "a list, each an integer >= 0, or none"),
        ],
    )
    def test_names_owner_parameter_value_and_range(self, parameter, value, expected):
        with pytest.raises(ParameterError) as caught:
            Sample(**{parameter: value})
        error = caught.value
        assert (error.owner, error.parameter, error.expected) == ("sample", parameter, expected)
        assert str(error).startswith(f"sample: {parameter} = {value!r} is not allowed")

    def test_values_take_their_declared_type(self):
        sample = Sample(size="5%", rate=1, channels=[2, 0])
        assert sample.size == Size(fraction=0.05)
        assert type(sample.rate) is float
        assert sample.channels == (2, 0)

    def test_evolving_checks_too(self):
        assert attrs.evolve(Sample(), bits=4).bits == 4
        with pytest.raises(ParameterError):
            attrs.evolve(Sample(), bits=0)

    def test_a_bad_default_is_found_when_the_class_is_defined(self):
        with pytest.raises(ParameterError):
            param(-1, help="bad", minimum=0)

    def test_a_parameter_needs_a_known_type(self):
        with pytest.raises(TypeError, match="type"):
            param(None, help="what?")
        with pytest.raises(TypeError, match="type"):
            param(help="what?")

    def test_a_class_without_a_registered_name_goes_by_its_class_name(self):
        with pytest.raises(ParameterError, match=r"^Needy: path = 3 "):
            Needy(path=3)


class TestPlainForm:
    @pytest.mark.parametrize(
        "sample",
        [Sample(), Sample(size=1), Sample(size=1.0), Sample(channels=()), Sample(channels=[3, 1])],
    )
    def test_round_trips_exactly_through_json(self, sample):
        plain = json.loads(json.dumps(to_plain(sample)))
        assert from_plain(Sample, plain) == sample
        assert to_plain(from_plain(Sample, plain)) == plain

    def test_names_every_parameter(self):
        assert to_plain(Sample()) == {
            "size": 128,
            "rate": 0.5,
            "bits": 8,
            "mode": "mean",
            "exact": False,
            "channels": None,
        }

    def test_an_unknown_name_gets_a_suggestion(self):
        with pytest.raises(UnknownParameterError, match="did you mean 'bits'"):
            from_plain(Sample, {"bit": 3})

    def test_a_missing_value_is_named(self):
        with pytest.raises(MissingParameterError, match="Needy: path is missing: expected a str"):
            from_plain(Needy, {})

    def test_a_class_without_parameters_has_none(self):
        class Plain:
            pass

        assert specs(Plain) == ()
        assert to_plain(Plain()) == {}
        with pytest.raises(UnknownParameterError, match="no parameters at all"):
            from_plain(Plain, {"x": 1})

    def test_instances_survive_pickling(self):
        assert pickle.loads(pickle.dumps(Sample(size="5%"))) == Sample(size="5%")


class TestListing:
    def test_specs_follow_the_declaration(self):
        declared = specs(Sample)
        assert [spec.name for spec in declared] == list(to_plain(Sample()))
        assert [spec.type_name for spec in declared] == [
            "size",
            "float",
            "int",
            "str",
            "bool",
            "list of int",
        ]
        assert declared[0].unit == "tokens"
        assert declared[0].default == Size(tokens=128)
        assert declared[0].search.to_plain() == {"kind": "choice", "values": [64, 0.1]}

    def test_subclasses_inherit_parameters(self):
        @attrs.frozen(kw_only=True)
        class More(Sample):
            name: ClassVar[str] = "more"
            extra: int = param(1, help="extra")

        assert [spec.name for spec in specs(More)][-1] == "extra"
        with pytest.raises(ParameterError, match=r"^more: bits"):
            More(bits=0)

    def test_json_schema_says_types_ranges_and_defaults(self):
        schema = json_schema(Sample)
        assert schema["title"] == "sample"
        assert schema["additionalProperties"] is False
        assert schema["required"] == []
        assert json_schema(Needy)["required"] == ["path"]
        properties = schema["properties"]
        assert properties["bits"] == {
            "description": "bits",
            "type": "integer",
            "minimum": 1,
            "maximum": 64,
            "default": 8,
        }
        assert properties["rate"]["exclusiveMinimum"] == 0
        assert properties["mode"]["enum"] == ["mean", "max"]
        assert properties["channels"]["anyOf"][1] == {"type": "null"}
        json.dumps(schema)


class TestSearch:
    def test_is_plain_data(self):
        assert Search.uniform(0.1, 0.9).to_plain() == {"kind": "uniform", "low": 0.1, "high": 0.9}
        assert Search.log_uniform(1e-3, 1).kind == "log_uniform"
        assert Search.int_range(1, 8).high == 8

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Search.choice([]),
            lambda: Search.uniform(1, 1),
            lambda: Search.log_uniform(0, 1),
            lambda: Search.int_range(8, 1),
        ],
    )
    def test_an_empty_space_is_refused(self, make):
        with pytest.raises(ValueError, match="needs"):
            make()
