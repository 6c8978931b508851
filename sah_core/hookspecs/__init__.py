"""The hooks: what a plugin implements, kind by kind, and what an observer may listen to.

A plugin is a module (or an instance) that an entry point names. It implements the one hook of its
kind:

    from sah_core import hookimpl

    @hookimpl
    def sah_masker():
        return Quest

The hook of a kind is called once per registry, when the plugin's name is first used, and never to
list names. The registry calls the implementation of the one plugin that was asked for, so results
of different plugins never mix. The hook must not register, patch, print or read files, and should
be instant: the work belongs into the class that it returns.

Observer hooks are the opposite: every observer of a run is called, in the order in which they were
given, and results are ignored. Their arguments are public contract: an implementation may take any
subset of them, by name.
"""

from .kinds import (
    AdapterSpec,
    BackendSpec,
    BenchmarkSpec,
    MaskerSpec,
    MetricSpec,
    ModelSpec,
    ObjectiveSpec,
    ScorerSpec,
)
from .markers import PROJECT, hookimpl, hookspec
from .observers import ObserverSpec

__all__ = [
    "PROJECT",
    "AdapterSpec",
    "BackendSpec",
    "BenchmarkSpec",
    "MaskerSpec",
    "MetricSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "ObserverSpec",
    "ScorerSpec",
    "hookimpl",
    "hookspec",
]
