"""The hook specifications: complete, documented, and cheap to import."""

import inspect
import subprocess
import sys

import pluggy
import pytest

from sah_core import hookspecs
from sah_core.hookspecs import hookimpl

pytestmark = pytest.mark.unit

KINDS = {
    "masker": hookspecs.MaskerSpec,
    "adapter": hookspecs.AdapterSpec,
    "backend": hookspecs.BackendSpec,
    "benchmark": hookspecs.BenchmarkSpec,
    "scorer": hookspecs.ScorerSpec,
    "metric": hookspecs.MetricSpec,
    "model": hookspecs.ModelSpec,
    "objective": hookspecs.ObjectiveSpec,
}
OBSERVER_HOOKS = {
    "sah_run_begin": ("config",),
    "sah_run_end": ("results",),
    "sah_request_begin": ("request", "pipeline"),
    "sah_request_end": ("request", "response"),
    "sah_prefill_end": ("layer_count", "context_tokens"),
    "sah_mask_built": ("inputs", "mask"),
    "sah_attention_computed": ("inputs", "mask", "output", "lse", "backend"),
}
ALL_HOOKS = [
    (spec, name)
    for spec in (*KINDS.values(), hookspecs.ObserverSpec)
    for name in vars(spec)
    if name.startswith("sah_")
]


def manager_for(spec):
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(spec)
    return manager


@pytest.mark.parametrize(("kind", "spec"), KINDS.items())
def test_a_kind_has_one_hook_whose_first_result_counts(kind, spec):
    hooks = vars(manager_for(spec).hook)
    assert [name for name in hooks if name.startswith("sah_")] == [f"sah_{kind}"]
    hook = hooks[f"sah_{kind}"]
    assert hook.spec.opts["firstresult"]
    assert hook.spec.argnames == ()


def test_observers_may_listen_to_seven_hooks_with_these_arguments():
    hooks = vars(manager_for(hookspecs.ObserverSpec).hook)
    found = {
        name: tuple(hook.spec.argnames) for name, hook in hooks.items() if name.startswith("sah_")
    }
    assert found == OBSERVER_HOOKS


def test_every_observer_is_called_with_the_arguments_that_it_takes():
    class First:
        calls = []

        @hookimpl
        def sah_prefill_end(self, context_tokens):
            self.calls.append(("first", context_tokens))

    class Second(First):
        @hookimpl
        def sah_prefill_end(self, layer_count, context_tokens):
            self.calls.append(("second", layer_count))

    manager = manager_for(hookspecs.ObserverSpec)
    manager.register(First())
    manager.register(Second())
    manager.check_pending()
    manager.hook.sah_prefill_end(layer_count=2, context_tokens=7)
    assert sorted(First.calls) == [("first", 7), ("second", 2)]


@pytest.mark.parametrize(("spec", "name"), ALL_HOOKS, ids=[name for _, name in ALL_HOOKS])
def test_a_hook_says_when_it_is_called_what_it_must_not_do_and_how_it_looks(spec, name):
    text = inspect.getdoc(vars(spec)[name])
    for phrase in ("Called once per" if name in OBSERVER_HOOKS else "Called once,", "Must not"):
        assert phrase in text
    for section in ("Returns:", "Raises:", "Example:", f"def {name}("):
        assert section in text
    for argument in OBSERVER_HOOKS.get(name, ()):
        assert f"\n    {argument}: " in text


def test_importing_the_hooks_leaves_torch_out():
    code = "import sys, sah_core.hookspecs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
