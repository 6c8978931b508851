"""The core of Sparse Attention Hub: masks, maskers, pipelines, backends, plugins.

What programs and plugins start from can be imported from here; ``docs/python.md`` lists it. Names
are loaded on first use, so that ``from sah_core import registry`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Bound here, at once: importing the submodule `sah_core.registry` sets the attribute `registry` of
# this package to the module, and only a binding made afterwards, that is now, replaces it for good.
from .registry import Registry, registry

if TYPE_CHECKING:
    from .allowed import Allowed
    from .backend import Backend, Problem
    from .benchmark import Benchmark, DataSource, Example, Protocol, TaskInfo
    from .errors import (
        ArtifactError,
        BrokenPluginError,
        ContextTooLongError,
        DataError,
        ExperimentError,
        IncompatiblePluginError,
        MissingLibraryError,
        MissingParameterError,
        ModelNotFoundError,
        OutputFolderError,
        ParameterError,
        PipelineError,
        PipelineSyntaxError,
        PluginConflictError,
        PluginDisabledError,
        PluginFileError,
        RequestError,
        SahError,
        UnknownParameterError,
        UnknownPluginError,
        UnsupportedError,
        UnusablePluginsError,
    )
    from .hookspecs import hookimpl
    from .inputs import Inputs
    from .mask import KeyRange, Mask, Selected
    from .masker import Capabilities, Masker
    from .measure import AttentionMetric
    from .metric import Metric, MetricCall
    from .models import ModelSource
    from .ops import Ops
    from .parameters import Size, param
    from .patching import attach
    from .pipeline import Pipeline
    from .requests import Request, Response, Turn
    from .scorer import Scorer
    from .search import Search

__all__ = [
    "Allowed",
    "ArtifactError",
    "AttentionMetric",
    "Backend",
    "Benchmark",
    "BrokenPluginError",
    "Capabilities",
    "ContextTooLongError",
    "DataError",
    "DataSource",
    "Example",
    "ExperimentError",
    "IncompatiblePluginError",
    "Inputs",
    "KeyRange",
    "Mask",
    "Masker",
    "Metric",
    "MetricCall",
    "MissingLibraryError",
    "MissingParameterError",
    "ModelNotFoundError",
    "ModelSource",
    "Ops",
    "OutputFolderError",
    "ParameterError",
    "Pipeline",
    "PipelineError",
    "PipelineSyntaxError",
    "PluginConflictError",
    "PluginDisabledError",
    "PluginFileError",
    "Problem",
    "Protocol",
    "Registry",
    "Request",
    "RequestError",
    "Response",
    "SahError",
    "Scorer",
    "Search",
    "Selected",
    "Size",
    "TaskInfo",
    "Turn",
    "UnknownParameterError",
    "UnknownPluginError",
    "UnsupportedError",
    "UnusablePluginsError",
    "attach",
    "hookimpl",
    "param",
    "registry",
]

_MODULES = {
    "Allowed": "allowed",
    "AttentionMetric": "measure",
    "Backend": "backend",
    "Benchmark": "benchmark",
    "Capabilities": "masker",
    "DataSource": "benchmark",
    "Example": "benchmark",
    "Inputs": "inputs",
    "KeyRange": "mask",
    "Mask": "mask",
    "Masker": "masker",
    "Metric": "metric",
    "MetricCall": "metric",
    "ModelSource": "models",
    "Ops": "ops",
    "Pipeline": "pipeline",
    "Problem": "backend",
    "Protocol": "benchmark",
    "Request": "requests",
    "Response": "requests",
    "Scorer": "scorer",
    "Search": "search",
    "Selected": "mask",
    "Size": "parameters",
    "TaskInfo": "benchmark",
    "Turn": "requests",
    "attach": "patching",
    "hookimpl": "hookspecs",
    "param": "parameters",
} | dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors")


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
