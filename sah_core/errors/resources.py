"""Errors of what is not there: models, data, artefacts, libraries, folders, abilities."""

import attrs

from sah_core.errors.base import SahError
from sah_core.errors.text import one_line


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
