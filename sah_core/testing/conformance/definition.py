"""Checks of what a masker is: its class, its parameters, its module."""

from __future__ import annotations

import functools
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import attrs

from sah_core.masker import Masker
from sah_core.parameters import from_plain, specs, to_plain
from sah_core.pipeline_text import format_call, parse_text
from sah_core.plugin_files import FILE_PREFIX

from .verdict import fail, require, skip

_SOURCE = re.compile(r"arXiv:? *\d{4}\.\d{4,5}|\b10\.\d{4,}/\S|https?://\S|no paper", re.I)

HEAVY = ("transformers", "ray", "datasets", "sah_bench", "pandas", "matplotlib")
"""Packages that a masker must not need in order to be imported."""


def check_docstring(masker: Masker) -> None:
    """The class says what it selects, its module where the method comes from."""
    require(
        (type(masker).__doc__ or "").strip(),
        masker,
        f"class {type(masker).__name__} has no docstring",
        "say in one line what it selects",
    )
    module = sys.modules.get(type(masker).__module__)
    text = " ".join((getattr(module, "__doc__", None) or "").split())
    require(
        _SOURCE.search(text),
        masker,
        f"the docstring of {_place(type(masker).__module__)} names no source",
        "name the paper by its arXiv id, DOI or link, or write 'no paper' and what it is instead",
    )


def _place(module: str) -> str:
    """A module as its author knows it: by name, or by its file if it has no package."""
    if not module.startswith(FILE_PREFIX):
        return f"module {module}"
    return Path(getattr(sys.modules.get(module), "__file__", None) or module).name


def check_frozen(masker: Masker) -> None:
    """The masker is its parameters: nothing can be assigned to it."""
    change = "declare the class with @attrs.frozen(kw_only=True) and keep what changes in its state"
    # without the decorator, what looks like a field is none
    decorated = "__attrs_attrs__" in vars(type(masker))
    require(decorated, masker, f"{type(masker).__name__} is no attrs class of its own", change)
    try:
        masker.anything = 1  # type: ignore[attr-defined]
    except AttributeError:
        pass
    else:
        fail(masker, "attributes can be set on it", change)
    try:
        hash(masker)
    except TypeError as error:
        raise AssertionError(f"{masker.name}: cannot be hashed ({error}); {change}") from error


def check_parameters_round_trip(masker: Masker) -> None:
    """Plain data, JSON and pipeline text give an equal masker back."""
    change = "declare every field with sah_core.param"
    known = {spec.name for spec in specs(type(masker))}
    fields = attrs.fields(type(masker)) if attrs.has(type(masker)) else ()
    bare = [field.name for field in fields if field.init and field.name not in known]
    require(not bare, masker, f"its field {', '.join(bare)} is no parameter", change)
    plain = to_plain(masker)
    again = from_plain(type(masker), plain)
    require(again == masker, masker, f"its plain form {plain} gives {again}", change)
    from_json = from_plain(type(masker), json.loads(json.dumps(plain)))
    require(from_json == masker, masker, f"through JSON {plain} gives {from_json}", change)
    text = format_call(masker.name, plain)
    [step] = parse_text(text).steps
    from_text = from_plain(type(masker), step.arguments)
    require(from_text == masker, masker, f"the text '{text}' gives {from_text}", change)


def check_pickling(masker: Masker) -> None:
    """A worker process gets the same masker."""
    change = "define the class at the top of a module and keep its fields to plain values"
    try:
        again = pickle.loads(pickle.dumps(masker))
    except Exception as error:  # whatever the fields of a foreign class raise
        raise AssertionError(f"{masker.name}: cannot be pickled ({error}); {change}") from error
    require(again == masker, masker, "its pickled copy is not equal to it", change)


def check_import_weight(masker: Masker) -> None:
    """Importing its module in a fresh process brings in no heavy package and no other masker."""
    name = type(masker).__module__
    file = inspect.getsourcefile(type(masker))
    if name == "__main__" or file is None or not Path(file).is_file():
        skip(masker, f"its module {name} has no file that another process could import")
    others = _masker_modules()
    module = name if _origin(name) == file else file
    brought, error = _brought_by(others if module in others else (module,))[module]
    require(
        not error,
        masker,
        f"importing {name} in a fresh process fails: {error}",
        "let the module import whatever was imported before it",
    )
    heavy = [package for package in HEAVY if package in brought]
    require(
        not heavy,
        masker,
        f"importing {name} imports {', '.join(heavy)}",
        "import it inside the function that needs it, or do without",
    )
    relatives = [other for other in others if other in brought and other != name]
    require(
        not relatives,
        masker,
        f"importing {name} imports another masker, {', '.join(relatives)}",
        "move what both need into a module without a plugin",
    )


def _masker_modules() -> tuple[str, ...]:
    """The modules that the installed maskers name as their entry points."""
    from sah_core import registry

    points = {entry.entry_point.partition(":")[0] for entry in registry.maskers.entries()}
    return tuple(sorted(point for point in points if _origin(point) is not None))


@functools.cache
def _origin(name: str) -> str | None:
    """The file that a fresh process would import a module from; None if it would find none."""
    parts = name.split(".")
    spec, path = None, None
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        found = (finder.find_spec(full, path) for finder in sys.meta_path)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return None if spec is None else spec.origin


_PROBE = """
import importlib, importlib.util, json, sys
import attrs, torch
from sah_core import Mask, Masker, registry
base = set(sys.modules)
found = {}
for name in json.loads(sys.stdin.read()):
    for extra in set(sys.modules) - base:
        del sys.modules[extra]
    error = ""
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location("masker_under_test", name)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            importlib.import_module(name)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    found[name] = [sorted(set(sys.modules) - base), " ".join(error.split())]
sys.stdout.write("\\n" + json.dumps(found))
"""


@functools.cache
def _brought_by(modules: tuple[str, ...]) -> dict[str, tuple[frozenset[str], str]]:
    """What each module brings in beyond the core and the error it ends with, in a fresh process.

    One process looks at all of them, since most of its time goes into torch.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (frozenset(brought), error) for name, (brought, error) in found.items()}
