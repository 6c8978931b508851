"""Everything that can go wrong on bad input, as one family of exceptions.

Every class derives from `SahError`; ``str(error)`` is one line that says what is wrong, what was
expected and what to do; the facts are attributes. The command line prints that line and exits with
code 2.
"""

from sah_core.errors.base import SahError
from sah_core.errors.parameters import (
    ExperimentError,
    MissingParameterError,
    ParameterError,
    PipelineError,
    PipelineSyntaxError,
    UnknownParameterError,
)
from sah_core.errors.plugins import (
    BrokenPluginError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginDisabledError,
    PluginFileError,
    UnknownPluginError,
    UnusablePluginsError,
)
from sah_core.errors.requests import ContextTooLongError, RequestError
from sah_core.errors.resources import (
    ArtifactError,
    DataError,
    MissingLibraryError,
    ModelNotFoundError,
    OutputFolderError,
    UnsupportedError,
)
from sah_core.errors.text import nearest_names, one_line, short_repr

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
