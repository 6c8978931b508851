"""Parameters of plugins, each declared once.

A masker, benchmark or backend is an attrs class whose fields are made by `param`. From that one
declaration come validation with a clear error, the listing of ``sah-bench plugins show``, plain
data and back, a JSON Schema and the search space of a tuning run.

    @attrs.frozen(kw_only=True)
    class Sink(Masker):
        name: ClassVar[str] = "sink"
        sink_size: Size = param(128, type=Size, help="first keys that every query attends")
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import attrs

from .errors import MissingParameterError, ParameterError, UnknownParameterError, nearest_names
from .search import Search
from .size import Size, is_integer, is_number

__all__ = [
    "ParameterSpec",
    "Search",
    "Size",
    "from_plain",
    "json_schema",
    "owner_name",
    "param",
    "specs",
    "to_plain",
]

T = TypeVar("T")

_SPEC = "sah_parameter"


@attrs.frozen(kw_only=True)
class ParameterSpec:
    """What the declaration of one parameter says.

    Attributes:
        name: the field's name; empty until the class exists.
        type: ``Size``, ``int``, ``float``, ``bool``, ``str`` or ``tuple[one of them, ...]``.
        default: as declared; ``attrs.NOTHING`` if the parameter must be given.
        help: one line.
        minimum: the least number allowed (of tokens, for a size; of each element, for a tuple).
        maximum: the greatest number allowed.
        exclusive_minimum: whether `minimum` itself is refused.
        choices: the only values allowed, if there are such.
        unit: what the number counts, such as ``tokens``.
        search: where a tuning run looks; None keeps the parameter out of searches.
        location: whether it only says where something lies, such as a folder of data, so that it
            is no part of what a result is.
        selects: whether it only chooses among tasks, so that results of one task compare however
            many others there are.
        artifact: the value is the path of a file that the results depend on.
    """

    name: str = ""
    type: Any
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    choices: tuple[Any, ...] | None = None
    unit: str | None = None
    search: Search | None = None
    location: bool = False
    selects: bool = False
    artifact: bool = False

    @property
    def required(self) -> bool:
        """Whether the parameter has no default."""
        return self.default is attrs.NOTHING

    @property
    def optional(self) -> bool:
        """Whether None is a value: it is if it is the default."""
        return self.default is None

    @property
    def element(self) -> Any:
        """The type of one element for a tuple, else the type itself."""
        return get_args(self.type)[0] if get_origin(self.type) is tuple else self.type

    @property
    def type_name(self) -> str:
        """The type in a word or two, such as ``size`` or ``list of int``."""
        word = "size" if self.element is Size else str(self.element.__name__)
        return word if self.element is self.type else f"list of {word}"

    @property
    def allowed(self) -> str:
        """The values that the declaration allows, in words."""
        text = self._allowed_element()
        if self.element is not self.type:
            text = f"a list, each {text}"
        return f"{text}, or none" if self.optional else text

    def _allowed_element(self) -> str:
        if self.choices is not None:
            return f"one of {', '.join(repr(choice) for choice in self.choices)}"
        if self.element is bool:
            return "true or false"
        if self.element is str:
            return "a string"
        if self.element is Size:
            tokens = _bounded("an integer", self.minimum or 0, self.maximum, False)
            return f"{tokens} (tokens) or a fraction in (0, 1]"
        noun = "an integer" if self.element is int else "a number"
        return _bounded(noun, self.minimum, self.maximum, self.exclusive_minimum)

    def convert(self, owner: str, value: object) -> Any:
        """Checks `value` and gives it its declared type.

        Raises:
            ParameterError: naming `owner`, the parameter, the value and what is allowed.
        """
        if value is None and self.optional:
            return None
        try:
            if self.element is self.type:
                return self._convert_element(value)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(value)
            return tuple(self._convert_element(item) for item in value)
        except ValueError:
            raise ParameterError(owner, self.name, value, self.allowed) from None

    def _convert_element(self, value: object) -> Any:
        converted = _CONVERT[self.element](value)
        number = converted.tokens if isinstance(converted, Size) else converted
        in_range = not isinstance(number, int | float) or self._in_range(number)
        if not in_range or (self.choices is not None and converted not in self.choices):
            raise ValueError(value)
        return converted

    def _in_range(self, number: float) -> bool:
        if self.minimum is not None:
            below = number <= self.minimum if self.exclusive_minimum else number < self.minimum
            if below:
                return False
        return self.maximum is None or number <= self.maximum

    def to_plain(self, value: object) -> Any:
        """A converted value as plain data: numbers, strings, booleans, None or a list of them."""
        if isinstance(value, Size):
            return value.plain()
        if isinstance(value, tuple):
            return [self.to_plain(item) for item in value]
        return value

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the parameter's plain form."""
        schema = self._element_schema()
        if self.element is not self.type:
            schema = {"type": "array", "items": schema}
        if self.optional:
            schema = {"anyOf": [schema, {"type": "null"}]}
        schema = {"description": self.help, **schema}
        if not self.required:
            schema["default"] = self.to_plain(self.default)
        return schema

    def _element_schema(self) -> dict[str, Any]:
        if self.choices is not None:
            return {"enum": [self.to_plain(choice) for choice in self.choices]}
        if self.element is Size:
            tokens = _schema_range("integer", self.minimum or 0, self.maximum, False)
            fraction = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
            return {"anyOf": [tokens, fraction, {"type": "string", "pattern": "^[0-9.]+ *%?$"}]}
        word = {int: "integer", float: "number", bool: "boolean", str: "string"}[self.element]
        return _schema_range(word, self.minimum, self.maximum, self.exclusive_minimum)


def _bounded(noun: str, low: float | None, high: float | None, exclusive: bool) -> str:
    lower = f"{'>' if exclusive else '>='} {low}" if low is not None else ""
    upper = f"<= {high}" if high is not None else ""
    return " ".join([noun, " and ".join(filter(None, [lower, upper]))]).strip()


def _schema_range(
    word: str, low: float | None, high: float | None, exclusive: bool
) -> dict[str, Any]:
    ends = {"exclusiveMinimum" if exclusive else "minimum": low, "maximum": high}
    return {"type": word, **{key: end for key, end in ends.items() if end is not None}}


def _to_size(value: Any) -> Size:
    return Size.parse(value)


def _to_int(value: Any) -> int:
    if not is_integer(value):
        raise ValueError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if not is_number(value):
        raise ValueError(value)
    return float(value)


def _to_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _to_str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


_CONVERT: dict[Any, Callable[[object], Any]] = {
    Size: _to_size,
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
}


def param(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    type: Any = None,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    choices: Sequence[Any] | None = None,
    unit: str | None = None,
    search: Search | None = None,
    location: bool = False,
    selects: bool = False,
    artifact: bool = False,
) -> Any:
    """Declares one parameter of an attrs class.

    Args:
        default: the value if none is given; without it the parameter is required, and None makes
            None a value.
        help: one line for ``sah-bench plugins show``.
        type: ``Size``, ``int``, ``float``, ``bool``, ``str`` or ``tuple[one of them, ...]``; that
            of `default` if left out.
        minimum: the least number allowed (of tokens, for a size; of each element, for a tuple).
        maximum: the greatest number allowed.
        exclusive_minimum: refuse `minimum` itself.
        choices: the only values allowed.
        unit: what the number counts.
        search: where a tuning run looks.
        location: the parameter only says where something lies; what lies there is identified by
            its content.
        selects: the parameter only chooses among the tasks of a benchmark.
        artifact: the value is the path of a file: one that must exist before a run starts, and
            whose content is part of what a result is.

    Returns:
        An attrs field that converts and checks its value, on construction and in ``attrs.evolve``.
    """
    if type is None:
        type = default.__class__
    spec = ParameterSpec(
        type=type,
        default=default,
        help=help,
        minimum=minimum,
        maximum=maximum,
        exclusive_minimum=exclusive_minimum,
        choices=None if choices is None else tuple(choices),
        unit=unit,
        search=search,
        location=location,
        selects=selects,
        artifact=artifact,
    )
    if spec.element not in _CONVERT or type is types.NoneType:
        raise TypeError(
            f"a parameter cannot be of type {type!r}; give param(type=...) one of its types"
        )
    if not spec.required:
        # A default that its own declaration refuses is found when the class is defined.
        default = spec.convert("param", default)
        spec = attrs.evolve(spec, default=default)
    converter = attrs.Converter(_convert_field, takes_self=True, takes_field=True)
    return attrs.field(default=default, metadata={_SPEC: spec}, converter=converter)


def _convert_field(value: object, instance: object, field: attrs.Attribute[Any]) -> Any:
    return _spec(field).convert(owner_name(instance.__class__), value)


def _spec(field: attrs.Attribute[Any]) -> ParameterSpec:
    spec: ParameterSpec = field.metadata[_SPEC]
    return attrs.evolve(spec, name=field.name)


def owner_name(cls: type) -> str:
    """The name under which errors speak of a class: its registered name, else its class name."""
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else cls.__name__


def specs(cls: type) -> tuple[ParameterSpec, ...]:
    """The parameters of a class in the order of their declaration; empty if it declares none."""
    if not attrs.has(cls):
        return ()
    return tuple(_spec(field) for field in attrs.fields(cls) if _SPEC in field.metadata)


def to_plain(obj: object) -> dict[str, Any]:
    """All parameters of `obj` as plain data, which `from_plain` reads back exactly."""
    return {spec.name: spec.to_plain(getattr(obj, spec.name)) for spec in specs(obj.__class__)}


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes a `cls` from plain data.

    Raises:
        UnknownParameterError: for a name that `cls` does not declare.
        MissingParameterError: for a parameter without a default that is not given.
        ParameterError: for a value that is not allowed.
    """
    declared = {spec.name: spec for spec in specs(cls)}
    owner = owner_name(cls)
    _check_names(owner, values, declared)
    for name, spec in declared.items():
        if spec.required and name not in values:
            raise MissingParameterError(owner, name, None, spec.allowed)
    # where "none" is a choice, the word that texts read as no value means that choice
    words = {
        name: "none"
        for name, value in values.items()
        if value is None and "none" in (declared[name].choices or ())
    }
    return cls(**{**values, **words})


def check_names(cls: type, values: Mapping[str, Any]) -> None:
    """Refuses keyword arguments that no field of an attrs class takes.

    Raises:
        UnknownParameterError: naming the nearest fields.
    """
    if attrs.has(cls):
        taken = [field.alias for field in attrs.fields(cls) if field.init]
        _check_names(owner_name(cls), values, [alias for alias in taken if alias])


def _check_names(owner: str, values: Mapping[str, Any], declared: Collection[str]) -> None:
    for name in values:
        if name not in declared:
            expected = f"one of {', '.join(declared)}" if declared else "no parameters at all"
            raise UnknownParameterError(
                owner, name, values[name], expected, nearest_names(str(name), declared)
            )


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of the plain form of `cls`."""
    declared = specs(cls)
    return {
        "title": owner_name(cls),
        "type": "object",
        "properties": {spec.name: spec.schema() for spec in declared},
        "required": [spec.name for spec in declared if spec.required],
        "additionalProperties": False,
    }
