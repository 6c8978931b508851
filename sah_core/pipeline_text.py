"""The text form of pipelines: reading and writing, without knowledge of any masker.

    pipeline  = step { "|" step } [ "@" option { "," option } ]
    step      = name [ "(" [ argument { "," argument } ] ")" ]
    argument  = [ name "=" ] value            only the first may go without its name
    option    = name "=" value
    value     = scalar | "[" [ scalar { "," scalar } ] "]"
    scalar    = 16 | 0.05 | 5% | true | false | none | word | "quoted text"

White space, line ends included, separates and means nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import attrs

from .errors import PipelineSyntaxError
from .size import percent

__all__ = [
    "ParsedStep",
    "ParsedText",
    "format_call",
    "format_options",
    "format_value",
    "parse_call",
    "parse_text",
]

_WORD = re.compile(r"[\w./~:+%-]+")
_NAME = re.compile(r"[A-Za-z0-9_][\w.:-]*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@attrs.frozen
class ParsedStep:
    """One step as it was written.

    Attributes:
        name: the masker's name, perhaps ``distribution:name``.
        position: where the step begins in the text.
        positional: the value without a name; ``attrs.NOTHING`` if there is none.
        arguments: the values with a name.
    """

    name: str
    position: int
    positional: Any
    arguments: dict[str, Any]


@attrs.frozen
class ParsedText:
    """A pipeline text, taken apart.

    Attributes:
        steps: in order.
        options: what follows the ``@``.
    """

    steps: tuple[ParsedStep, ...]
    options: dict[str, Any]


def parse_text(text: str) -> ParsedText:
    """Takes a pipeline text apart.

    Raises:
        PipelineSyntaxError: saying what was found, at which column, and what was expected.
    """
    return _Reader(text).pipeline()


def parse_call(text: str, kind: str) -> ParsedStep:
    """Takes the text of one plugin with its arguments apart, such as ``output-error(every=8)``.

    Args:
        text: the text.
        kind: what it names, for errors.

    Raises:
        PipelineSyntaxError: saying what was found, at which column, and what was expected.
    """
    return _Reader(text, kind).call()


class _Reader:
    def __init__(self, text: str, kind: str = "masker") -> None:
        self.text = text
        self.kind = kind
        self.position = 0

    def call(self) -> ParsedStep:
        step = self.step()
        self.skip()
        if self.position < len(self.text):
            raise self.error("'(' or the end" if self.bare_step(step, {}) else "the end")
        return step

    def pipeline(self) -> ParsedText:
        steps = [self.step()]
        while self.take("|"):
            steps.append(self.step())
        options = self.options() if self.take("@") else {}
        self.skip()
        if self.position < len(self.text):
            after = "',' or the end" if options else "'|', '@' or the end"
            raise self.error(f"'(', {after}" if self.bare_step(steps[-1], options) else after)
        return ParsedText(tuple(steps), options)

    def bare_step(self, step: ParsedStep, options: dict[str, Any]) -> bool:
        # Whether the text could still go on with the arguments of the last step.
        written = self.text[step.position : self.position].rstrip()
        return not options and written == step.name

    def step(self) -> ParsedStep:
        name, position = self.name(f"a {self.kind}'s name")
        positional, arguments = attrs.NOTHING, dict[str, Any]()
        if self.take("(") and not self.take(")"):
            if not self.at_named():
                positional = self.value()
                more = self.take(",")
            else:
                more = True
            if more:
                arguments = self.named("a parameter's name")
            if not self.take(")"):
                raise self.error("',' or ')'")
        return ParsedStep(name, position, positional, arguments)

    def options(self) -> dict[str, Any]:
        return self.named("an option's name")

    def named(self, what: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while True:
            name, position = self.name(what)
            if name in values:
                raise self.error(f"a name that is not given yet, not {name!r} again", position)
            if not self.take("="):
                raise self.error(f"'=' and a value for {name!r}")
            values[name] = self.value()
            if not self.take(","):
                return values

    def at_named(self) -> bool:
        self.skip()
        match = _NAME.match(self.text, self.position)
        return match is not None and self.text[match.end() :].lstrip().startswith("=")

    def name(self, what: str) -> tuple[str, int]:
        self.skip()
        match = _NAME.match(self.text, self.position)
        if match is None:
            raise self.error(what)
        position, self.position = self.position, match.end()
        return match[0], position

    def value(self) -> Any:
        if not self.take("["):
            return self.scalar("a value")
        items: list[Any] = []
        if self.take("]"):
            return items
        items.append(self.scalar("a value or ']'"))
        while self.take(","):
            items.append(self.scalar("a value"))
        if not self.take("]"):
            raise self.error("',' or ']'")
        return items

    def scalar(self, what: str) -> Any:
        self.skip()
        quoted = _QUOTED.match(self.text, self.position)
        if quoted:
            self.position = quoted.end()
            return _ESCAPE.sub(_unescape, quoted[1] if quoted[1] is not None else quoted[2])
        word = _WORD.match(self.text, self.position)
        if word is None:
            if self.text[self.position : self.position + 1] in ("'", '"'):
                what = "a quoted text that is closed"
            raise self.error(what)
        self.position = word.end()
        return _read_word(word[0])

    def take(self, sign: str) -> bool:
        self.skip()
        found = self.text.startswith(sign, self.position)
        self.position += len(sign) * found
        return found

    def skip(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def error(self, expected: str, position: int | None = None) -> PipelineSyntaxError:
        return PipelineSyntaxError(
            self.text,
            self.position if position is None else position,
            expected,
            "pipeline" if self.kind == "masker" else self.kind,
        )


def _unescape(match: re.Match[str]) -> str:
    sign = match[1]
    return chr(int(sign[1:], 16)) if len(sign) > 1 else _CONTROLS.get(sign, sign)


def _read_word(word: str) -> Any:
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    if _INTEGER.fullmatch(word):
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    share = percent(word)
    return word if share is None else share


def format_value(value: Any) -> str:
    """A plain value as `parse_text` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        is_word = _WORD.fullmatch(value) and _read_word(value) == value
        return value if is_word else json.dumps(value, ensure_ascii=False)
    return f"[{', '.join(format_value(item) for item in value)}]"


def format_options(options: Mapping[str, Any]) -> str:
    """Names and plain values as ``name=value, name=value``."""
    return ", ".join(f"{name}={format_value(value)}" for name, value in options.items())


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A step as text; without arguments it is its name alone."""
    return f"{name}({format_options(arguments)})" if arguments else name
