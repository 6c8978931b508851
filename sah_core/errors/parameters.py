"""Errors of parameters, and of the pipelines and experiments that give them."""

from typing import Any

import attrs

from sah_core.errors.base import SahError
from sah_core.errors.text import did_you_mean, one_line, see_plugin, short_repr


@attrs.define
class ParameterError(SahError, ValueError):
    """A parameter has a value that its declaration does not allow.

    Attributes:
        owner: the registered name of the plugin, or its class name.
        parameter: the parameter's name.
        value: the value that was given.
        expected: what the declaration allows, in words.
    """

    owner: str
    parameter: str
    value: Any
    expected: str

    def __str__(self) -> str:
        return (
            f"{self.owner}: {self.parameter} = {short_repr(self.value)} is not allowed: "
            f"expected {self.expected}{see_plugin(self.owner)}"
        )


@attrs.define
class UnknownParameterError(ParameterError):
    """The owner declares no parameter of this name.

    Attributes:
        nearest: declared names that look like it, nearest first.
    """

    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        hint = did_you_mean(self.nearest) or f" expected {self.expected}."
        see = see_plugin(self.owner).removeprefix(".")
        return f"{self.owner}: no parameter named {short_repr(self.parameter)}.{hint}{see}"


@attrs.define
class MissingParameterError(ParameterError):
    """A parameter without a default was not given."""

    def __str__(self) -> str:
        return (
            f"{self.owner}: {self.parameter} is missing: "
            f"expected {self.expected}{see_plugin(self.owner)}"
        )


@attrs.define
class PipelineSyntaxError(SahError, ValueError):
    """The text of a pipeline, or of a metric with its parameters, does not parse.

    Attributes:
        text: the whole text.
        position: the index in `text` at which parsing stopped.
        expected: what could have stood there, in words.
        what: what the text stands for: ``pipeline`` or ``metric``.
    """

    text: str
    position: int
    expected: str
    what: str = "pipeline"

    @property
    def found(self) -> str:
        """The word or the sign at `position`, quoted, or a phrase for the end of the text."""
        rest = self.text[self.position :]
        if not rest.strip():
            return "the end of the text"
        if not (rest[0].isalnum() or rest[0] in "_-"):
            return repr(rest[0])
        length = next(
            (i for i, sign in enumerate(rest) if not (sign.isalnum() or sign in "_-.%")), len(rest)
        )
        return short_repr(rest[:length])

    def __str__(self) -> str:
        return (
            f"{self.what} {short_repr(self.text)}: found {self.found} at column "
            f"{self.position + 1}, expected {self.expected}."
        )


@attrs.define
class PipelineError(SahError, ValueError):
    """A pipeline is well written but makes no sense.

    Attributes:
        message: what is wrong and what to do, on one line.
    """

    message: str

    def __str__(self) -> str:
        return one_line(self.message)


@attrs.define
class ExperimentError(SahError, ValueError):
    """An experiment file is wrong.

    Attributes:
        path: the file.
        where: the place in it, such as ``pipelines[1].layers``; empty for the whole file.
        message: what is wrong and what is allowed.
    """

    path: str
    where: str
    message: str

    def __str__(self) -> str:
        place = f"{self.path}: {self.where}" if self.where else f"{self.path}"
        return one_line(f"{place}: {self.message}")
