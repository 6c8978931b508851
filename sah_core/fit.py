"""What the hook of each kind must return, and why something else is no plugin.

Each function takes what a hook returned and says, in words that follow "its hook ... returned", why
it does not fit; an empty text if it does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial

from . import hookspecs
from .errors import nearest_names

__all__ = ["Fit", "adapter", "function", "metric", "model", "scorers", "subclass_of"]

Fit = Callable[[object], str]

_MARK = f"{hookspecs.PROJECT}_impl"


def subclass_of(path: str, defines: tuple[str, ...] = ()) -> Fit:
    """A class that derives from one of the core and is named; the core is imported when asked.

    Args:
        path: Module and name of the base.
        defines: Methods that it must have of its own.
    """
    return partial(_subclass, path, defines)


def adapter(value: object) -> str:
    """A named class that reads contexts and answers questions."""
    return _named_class(value) or _lacking(
        value, ("process_request", "prefill", "answer", "identity"), "an adapter"
    )


def metric(value: object) -> str:
    """A named class that adds up a result; a misspelt hook would never be called."""
    reason = _named_class(value) or _lacking(value, ("reset", "result"), "a metric")
    if reason:
        return reason
    known = [name for name in vars(hookspecs.ObserverSpec) if not name.startswith("_")]
    for name in dir(value):
        if name not in known and hasattr(getattr(value, name), _MARK):
            nearest = nearest_names(name, known)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            return f"{_called(value)}, which implements the unknown observer hook {name!r}{hint}"
    return ""


def scorers(value: object) -> str:
    """A mapping from names of metrics to scorers."""
    if not isinstance(value, Mapping):
        return f"{_called(value)}, no mapping from the name of a metric to its Scorer"
    if not value:
        return "a mapping without a metric"
    from .scorer import Scorer

    for name, scorer in value.items():
        if not isinstance(name, str):
            return f"a mapping with the key {name!r}, which is no name of a metric"
        if not isinstance(scorer, Scorer):
            return f"a mapping whose {name!r} is {_called(scorer)}, no Scorer"
    return ""


def model(value: object) -> str:
    """A function without arguments."""
    reason = function(value)
    if reason or not inspect.isroutine(value):
        return reason
    required = [
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        return f"a function that needs the argument {required[0]!r}; it is called without any"
    return ""


def function(value: object) -> str:
    """Anything that can be called."""
    return "" if callable(value) else f"{_called(value)}, which cannot be called"


def _subclass(path: str, defines: tuple[str, ...], value: object) -> str:
    module, _, name = path.rpartition(".")
    base = getattr(importlib.import_module(module), name)
    if isinstance(value, type) and not issubclass(value, base):
        return f"{_called(value)}, no subclass of {name}"
    reason = _named_class(value)
    missing = [name for name in defines if getattr(value, name, None) is getattr(base, name)]
    if reason or not missing:
        return reason
    return f"{_called(value)}, which does not define {' and '.join(missing)}"


def _named_class(value: object) -> str:
    if not isinstance(value, type):
        return f"{_called(value)}, no class"
    if not isinstance(getattr(value, "name", None), str):
        return f"{_called(value)}, a class without a name: set 'name' to the registered name"
    return ""


def _lacking(value: object, methods: tuple[str, ...], what: str) -> str:
    missing = [name for name in methods if not callable(getattr(value, name, None))]
    if not missing:
        return ""
    return f"{_called(value)}, which lacks what {what} has: {', '.join(missing)}"


def _called(value: object) -> str:
    if isinstance(value, type) or inspect.isroutine(value):
        return str(value.__name__)
    return f"an instance of {type(value).__name__}"
