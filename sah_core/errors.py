"""Everything that can go wrong on bad input, as one family of exceptions.

Every class derives from `SahError`; ``str(error)`` is one line that says what is wrong, what was
expected and what to do; the facts are attributes. The command line prints that line and exits with
code 2.
"""

from collections.abc import Iterable
from typing import Any

import attrs

__all__ = [
    "ArtifactError",
    "BrokenPluginError",
    "ContextTooLongError",
    "DataError",
    "ExperimentError",
    "IncompatiblePluginError",
    "MissingLibraryError",
    "MissingParameterError",
    "ModelNotFoundError",
    "OutputFolderError",
    "ParameterError",
    "PipelineError",
    "PipelineSyntaxError",
    "PluginConflictError",
    "PluginDisabledError",
    "PluginFileError",
    "RequestError",
    "SahError",
    "UnknownParameterError",
    "UnknownPluginError",
    "UnsupportedError",
    "UnusablePluginsError",
    "nearest_names",
    "one_line",
    "short_repr",
]

_LONGEST_VALUE = 80


def one_line(text: str) -> str:
    """Joins the lines of `text` with single spaces."""
    return " ".join(text.split())


def short_repr(value: object) -> str:
    """The repr of `value` on one line, cut in the middle past 80 characters."""
    text = one_line(repr(value))
    if len(text) <= _LONGEST_VALUE:
        return text
    half = (_LONGEST_VALUE - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


SHORTEST_ABBREVIATION = 3
"""Letters from which on the start of a name is taken for the name cut short."""


def nearest_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The at most three of `names` that a slip could have turned into `name`, nearest first; those
    that it begins, as an abbreviation does, stand behind.
    """
    from difflib import get_close_matches

    known = sorted(names)
    found = get_close_matches(name, known, n=3, cutoff=0.6)
    if len(name) >= SHORTEST_ABBREVIATION:
        found += [other for other in known if other.startswith(name) and other not in found]
    return tuple(found[:3])


def _did_you_mean(nearest: tuple[str, ...]) -> str:
    return f" did you mean {' or '.join(repr(name) for name in nearest)}?" if nearest else ""


def _see_plugin(owner: str) -> str:
    # No command shows a class without a registered name, which shows up under its class name, nor
    # the options of a call.
    is_plugin = owner == owner.lower() and owner not in ("request", "generation")
    return f". see 'sah-bench plugins show {owner}'." if is_plugin else "."


class SahError(Exception):
    """The base of every error that this project raises on purpose."""


@attrs.define
class UnknownPluginError(SahError, LookupError):
    """No plugin of this kind has this name.

    Attributes:
        kind: the kind in the singular, such as ``masker``.
        name: the name that was asked for.
        nearest: registered names that look like it, nearest first.
    """

    kind: str
    name: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"no {self.kind} named {short_repr(self.name)}.{_did_you_mean(self.nearest)}"
            " see 'sah-bench plugins list'."
        )


@attrs.define
class BrokenPluginError(SahError):
    """A plugin is installed but cannot be used.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distribution: the distribution that ships it.
        entry_point: the entry point's value, ``module`` or ``module:attribute``.
        cause: the exception that loading it raised, or a text that says what is wrong with it.
    """

    kind: str
    name: str
    distribution: str
    entry_point: str
    cause: BaseException | str

    @property
    def reason(self) -> str:
        """The cause on one line, without the plugin's name."""
        if isinstance(self.cause, str):
            return one_line(self.cause)
        return one_line(f"{type(self.cause).__name__}: {self.cause}")

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} of distribution {self.distribution!r} "
            f"(entry point {self.entry_point!r}) is broken: {self.reason}. "
            f"repair or uninstall it, or set SAH_DISABLE_PLUGINS={self.name}."
        )


@attrs.define
class PluginConflictError(SahError):
    """Several distributions register one name, and the name alone was asked for.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distributions: the distributions that register it, sorted.
        path: the file that was being loaded, if it was one.
    """

    kind: str
    name: str
    distributions: tuple[str, ...]
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return (
                f"{self.path}: {self.kind} {self.name!r} is registered by "
                f"{self.distributions[0]!r} already. rename the class, or set "
                f"SAH_DISABLE_PLUGINS={self.distributions[0]}:{self.name}."
            )
        owners = " and ".join(repr(owner) for owner in self.distributions)
        choices = " or ".join(repr(f"{owner}:{self.name}") for owner in self.distributions)
        return f"{self.kind} {self.name!r} is registered by {owners}. choose one: {choices}."


@attrs.define
class PluginDisabledError(SahError):
    """The environment keeps the plugin out: ``SAH_DISABLE_PLUGINS`` or ``SAH_LOAD_PLUGINS``.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        reason: which variable, and how.
    """

    kind: str
    name: str
    reason: str = "SAH_DISABLE_PLUGINS names it"

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} is disabled: the environment variable {self.reason}. "
            "change the variable to use it."
        )


@attrs.define
class IncompatiblePluginError(SahError):
    """The distribution of a plugin requires another version of this project.

    Attributes:
        kind: the kind in the singular.
        name: the registered name.
        distribution: the distribution that ships it.
        version: its version.
        reason: what it requires and what is installed.
    """

    kind: str
    name: str
    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.name!r} of distribution {self.distribution!r} {self.version} "
            f"cannot be used: {self.reason}. upgrade the one or the other."
        )


@attrs.define
class PluginFileError(SahError):
    """A file cannot be loaded as a plugin.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"cannot load the plugin file {self.path!r}: {self.reason.rstrip('.')}.")


@attrs.define
class UnusablePluginsError(SahError):
    """Plugins are installed that cannot be used, and that is not to be.

    Attributes:
        plugins: per plugin its kind, its qualified name, its state and the reason.
    """

    plugins: tuple[tuple[str, str, str, str], ...]

    def __str__(self) -> str:
        listed = "; ".join(
            f"{kind} {name} is {'in ' if state == 'conflict' else ''}{state} ({reason})"
            for kind, name, state, reason in self.plugins
        )
        return one_line(f"not all plugins can be used: {listed}. see 'sah-bench plugins list'.")


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
            f"expected {self.expected}{_see_plugin(self.owner)}"
        )


@attrs.define
class UnknownParameterError(ParameterError):
    """The owner declares no parameter of this name.

    Attributes:
        nearest: declared names that look like it, nearest first.
    """

    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        hint = _did_you_mean(self.nearest) or f" expected {self.expected}."
        see = _see_plugin(self.owner).removeprefix(".")
        return f"{self.owner}: no parameter named {short_repr(self.parameter)}.{hint}{see}"


@attrs.define
class MissingParameterError(ParameterError):
    """A parameter without a default was not given."""

    def __str__(self) -> str:
        return (
            f"{self.owner}: {self.parameter} is missing: "
            f"expected {self.expected}{_see_plugin(self.owner)}"
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


@attrs.define
class ArtifactError(SahError, ValueError):
    """A file that a masker needs is missing, damaged, or made for another model.

    Attributes:
        path: the file.
        reason: what is wrong with it, and what to do.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"artefact {self.path!r}: {self.reason}")


@attrs.define
class ModelNotFoundError(SahError, LookupError):
    """A model name leads to no weights on this machine.

    Attributes:
        name: the name that was asked for.
        reason: why it was not found.
        hint: what to do, such as a pip command; may be empty.
    """

    name: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return one_line(f"model {self.name!r} not found: {self.reason}. {self.hint}")


@attrs.define
class MissingLibraryError(SahError, ImportError):
    """An optional library is needed and not installed.

    Attributes:
        what: who needs it.
        library: the distribution that ships it.
        extra: the extra of this project that brings it; may be empty.
        command: how to get it, where pip does not have it.
    """

    what: str
    library: str
    extra: str = ""
    command: str = ""

    def __str__(self) -> str:
        if self.command:
            return f"{self.what} needs {self.library}: {self.command}"
        package = f"'sparse-attention-hub[{self.extra}]'" if self.extra else self.library
        return f"{self.what} needs the package {self.library}: pip install {package}"


@attrs.define
class DataError(SahError, ValueError):
    """The data of a benchmark cannot be used.

    Attributes:
        owner: the registered name of the benchmark, and its task if one is concerned.
        place: the file, folder or hub data set.
        problem: what is wrong, what was expected and what to do, on one line.
    """

    owner: str
    place: str
    problem: str

    def __str__(self) -> str:
        return one_line(f"{self.owner}: {self.place}: {self.problem}")


@attrs.define
class ContextTooLongError(SahError, ValueError):
    """A prompt has more tokens than are allowed.

    Attributes:
        tokens: the tokens that the prompt and the answer need.
        limit: the tokens that are allowed.
        what: who sets the limit, such as ``model 'smollm2-135m'`` or ``max_context_length``.
    """

    tokens: int
    limit: int
    what: str

    def __str__(self) -> str:
        if self.what == "max_context_length":
            return (
                f"the context is too long: {self.tokens} tokens, but max_context_length allows "
                f"{self.limit} and truncation is 'none'. raise max_context_length, or let "
                "truncation be 'middle' or 'head'."
            )
        return (
            f"the prompt is too long: {self.tokens} tokens, but {self.what} allows {self.limit}. "
            "shorten the question, or cut the context with a max_context_length and "
            "truncation='middle'."
        )


@attrs.define
class RequestError(SahError, ValueError):
    """A request cannot be served as it is.

    Attributes:
        message: what is wrong and what is allowed, on one line.
    """

    message: str

    def __str__(self) -> str:
        return one_line(self.message)


@attrs.define
class UnsupportedError(SahError):
    """A backend, model or machine cannot do what was asked.

    Attributes:
        what: the thing that was asked for.
        reason: why it cannot be had, and what to use in its place.
    """

    what: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.what} is not supported: {self.reason}")


@attrs.define
class OutputFolderError(SahError, OSError):
    """Results cannot be written to a folder.

    Attributes:
        path: the folder.
        reason: why not.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"cannot write to {self.path!r}: {self.reason}. choose another folder.")
