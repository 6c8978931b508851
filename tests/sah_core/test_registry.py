"""Discovery, lazy loading and isolation of plugins, with fake distributions on the path."""

import importlib.metadata
import inspect
import pickle
import re
import subprocess
import sys
import textwrap

import pytest

from sah_core.discovery import DISTRIBUTION
from sah_core.errors import (
    BrokenPluginError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginDisabledError,
    PluginFileError,
    UnknownPluginError,
)
from sah_core.hookspecs import hookimpl
from sah_core.masker import Masker
from sah_core.registry import Registry

pytestmark = pytest.mark.unit

GOOD = """
    from sah_core.hookspecs import hookimpl
    from sah_core.masker import Masker

    class Zigzag(Masker):
        name = "zigzag"

        def add_mask(self, inputs, previous):
            return previous

    @hookimpl
    def sah_masker():
        return Zigzag
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a fake distribution: its entry points, and modules as a wheel would place them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def add(distribution, points, sources=None, group="sah.maskers", version="1.2", requires=()):
        folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        (folder / "METADATA").write_text(metadata)
        lines = [f"{name} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        for module, source in (sources or {}).items():
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
            modules.append(module)
        return folder

    yield add
    for module in modules:
        sys.modules.pop(module, None)


class Quest(Masker):
    name = "quest-of-tests"

    def add_mask(self, inputs, previous):
        return previous


class TestDiscovery:
    def test_listing_imports_nothing(self, install):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        assert "zigzag" in registry.maskers.names()
        assert "zigzag" in registry.maskers
        [entry] = [entry for entry in registry.entries() if entry.name == "zigzag"]
        assert (entry.kind, entry.distribution, entry.version) == ("masker", "zig-pkg", "1.2")
        assert (entry.entry_point, entry.state, entry.id) == (
            "fake_zigzag",
            "ok",
            "zig-pkg:zigzag",
        )
        assert "fake_zigzag" not in sys.modules

    def test_a_name_is_loaded_on_first_use_and_once(self, install):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        found = registry.maskers["zigzag"]
        assert found.__name__ == "Zigzag"
        assert registry.maskers["zigzag"] is found
        assert registry.maskers["zig-pkg:zigzag"] is found
        assert registry.maskers["Zig_Pkg:zigzag"] is found

    def test_an_entry_point_may_name_an_instance(self, install):
        source = """
            from sah_core.hookspecs import hookimpl
            from sah_core.masker import Masker

            class ByObject(Masker):
                name = "by-object"
                add_mask = print

            class Plugin:
                @hookimpl
                def sah_masker(self):
                    return ByObject

            plugin = Plugin()
        """
        install("obj-pkg", {"by-object": "fake_object:plugin"}, {"fake_object": source})
        assert Registry().maskers["by-object"].__name__ == "ByObject"

    def test_kinds_are_separate(self, install):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        assert "zigzag" not in registry.backends
        assert [kind.singular for kind in registry.kinds()] == [
            "masker",
            "adapter",
            "backend",
            "benchmark",
            "scorer",
            "metric",
            "model",
            "objective",
        ]

    def test_names_are_sorted_and_iterate(self):
        kind = Registry().objectives
        kind.register("b", lambda: 2)
        kind.register("a", lambda: 1)
        assert kind.names() == tuple(kind) == ("a", "b")
        assert len(kind) == 2
        assert repr(kind) == "<objectives: a, b>"

    def test_an_unknown_name_gets_a_suggestion(self):
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        with pytest.raises(UnknownPluginError) as caught:
            registry.maskers["qest-of-tests"]
        assert str(caught.value) == (
            "no masker named 'qest-of-tests'. did you mean 'quest-of-tests'? "
            "see 'sah-bench plugins list'."
        )

    @pytest.mark.parametrize("name", [3, None, "", ":", "nowhere:quest-of-tests"])
    def test_nonsense_is_an_unknown_name(self, name):
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        assert name not in registry.maskers
        with pytest.raises(UnknownPluginError):
            registry.maskers[name]

    def test_a_malformed_entry_point_file_does_not_hide_the_others(self, install, caplog):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        folder = install("torn-pkg", {})
        (folder / "entry_points.txt").write_text("[sah.maskers]\nno equals sign here\n")
        registry = Registry()
        assert "zigzag" in registry.maskers
        assert "torn-pkg" in caplog.text


class TestBrokenPlugins:
    CASES = {
        "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
        "no-module": (None, "No module named"),
        "no-hook": ("x = 1", "it does not implement the hook sah_masker"),
        "misspelt": (
            "from sah_core.hookspecs import hookimpl\n@hookimpl\ndef sah_maskr(): return 1",
            "unknown hook 'sah_maskr'",
        ),
        "returns-none": (
            "from sah_core.hookspecs import hookimpl\n@hookimpl\ndef sah_masker(): return None",
            "returned None",
        ),
        "returns-instance": (
            GOOD.replace("return Zigzag", "return Zigzag()"),
            "its hook sah_masker returned an instance of Zigzag, no class",
        ),
        "returns-other-class": (
            GOOD.replace("(Masker)", ""),
            "its hook sah_masker returned Zigzag, no subclass of Masker",
        ),
        "no-name": (
            GOOD.replace('name = "zigzag"', "pass"),
            "returned Zigzag, a class without a name: set 'name' to the registered name",
        ),
        "no-add-mask": (
            GOOD.replace("def add_mask", "def add_maks"),
            "its hook sah_masker returned Zigzag, which does not define add_mask",
        ),
        "other-name": (GOOD, "its class is named 'zigzag'"),
        "wrong-arguments": (
            "from sah_core.hookspecs import hookimpl\n@hookimpl\ndef sah_masker(x): return 1",
            "PluginValidationError",
        ),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_the_error_names_distribution_entry_point_and_cause(self, install, case):
        source, reason = self.CASES[case]
        module = f"fake_{case.replace('-', '_')}"
        install("bad-pkg", {case: module}, {module: source} if source else None)
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        with pytest.raises(BrokenPluginError) as caught:
            registry.maskers[case]
        error = caught.value
        assert (error.kind, error.distribution, error.entry_point) == ("masker", "bad-pkg", module)
        assert reason in str(error)
        assert "\n" not in str(error)
        assert registry.maskers["zigzag"].name == "zigzag"

    MISFITS = {
        "adapter": {
            "a function": ("len", "len, no class"),
            "no name": ("type('Own', (), {})", "Own, a class without a name"),
            "no methods": (
                "type('Own', (), {'name': 'odd', 'answer': len, 'prefill': len})",
                "Own, which lacks what an adapter has: process_request, identity",
            ),
        },
        "backend": {
            "another class": ("dict", "dict, no subclass of Backend"),
            "no methods": (
                "type('Own', (__import__('sah_core').Backend,), {'name': 'odd'})",
                "Own, which does not define refuses and attend",
            ),
        },
        "benchmark": {"an instance": ("'text'", "an instance of str, no class")},
        "scorer": {
            "a function": ("len", "len, no mapping from the name of a metric to its Scorer"),
            "nothing in it": ("{}", "a mapping without a metric"),
            "a bare function": ("{'f1': len}", "a mapping whose 'f1' is len, no Scorer"),
            "no text": ("{1: len}", "a mapping with the key 1, which is no name of a metric"),
        },
        "metric": {
            "an instance": ("object()", "an instance of object, no class"),
            "no result": (
                "type('Own', (), {'name': 'odd', 'reset': dict})",
                "Own, which lacks what a metric has: result",
            ),
            "misspelt": (
                "type('Own', (), {'name': 'odd', 'reset': dict, 'result': dict,"
                " 'sah_mask_build': hookimpl(lambda self: 1)})",
                "Own, which implements the unknown observer hook 'sah_mask_build' "
                "(did you mean 'sah_mask_built'?)",
            ),
            "other name": (
                "type('Own', (), {'name': 'even', 'reset': dict, 'result': dict})",
                "its class is named 'even': name it as it is registered",
            ),
        },
        "model": {
            "a path": ("'model.gguf'", "an instance of str, which cannot be called"),
            "arguments": ("lambda path: path", "a function that needs the argument 'path'"),
        },
        "objective": {"a number": ("0.5", "an instance of float, which cannot be called")},
    }

    @pytest.mark.parametrize(
        ("kind", "case"), [(kind, case) for kind, cases in MISFITS.items() for case in cases]
    )
    def test_every_kind_refuses_what_does_not_fit(self, install, kind, case):
        expression, reason = self.MISFITS[kind][case]
        source = f"from sah_core import hookimpl\n@hookimpl\ndef sah_{kind}(): return {expression}"
        install("odd-pkg", {"odd": "fake_odd"}, {"fake_odd": source}, group=f"sah.{kind}s")
        registry = Registry()
        plugins = next(one for one in registry.kinds() if one.singular == kind)
        entry = plugins.check("odd")
        assert entry.state == "broken"
        assert reason in entry.reason
        with pytest.raises(BrokenPluginError, match=re.escape(reason)):
            plugins["odd"]

    def test_all_kinds_have_a_case(self):
        assert {*self.MISFITS, "masker"} == {kind.singular for kind in Registry().kinds()}

    def test_an_entry_point_that_names_a_class_is_broken(self, install):
        install("cls-pkg", {"zigzag": "fake_zigzag:Zigzag"}, {"fake_zigzag": GOOD})
        with pytest.raises(BrokenPluginError, match="names the class Zigzag, not its module"):
            Registry().maskers["zigzag"]

    def test_a_check_says_what_is_broken_and_raises_nothing(self, install):
        install("bad-pkg", {"bad": "fake_bad"}, {"fake_bad": "raise RuntimeError('why')"})
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        assert registry.maskers.entry("bad").state == "ok"
        entry = registry.maskers.check("bad")
        assert (entry.state, entry.reason) == ("broken", "RuntimeError: why")
        assert registry.maskers.check("zigzag").state == "ok"
        with pytest.raises(UnknownPluginError):
            registry.maskers.check("nothing-here")

    def test_a_repaired_plugin_loads_without_a_new_registry(self, install, tmp_path):
        install("bad-pkg", {"zigzag": "fake_bad"}, {"fake_bad": "raise RuntimeError('why')"})
        registry = Registry()
        assert registry.maskers.check("zigzag").state == "broken"
        (tmp_path / "fake_bad.py").write_text(textwrap.dedent(GOOD) + "# repaired\n")
        assert registry.maskers["zigzag"].name == "zigzag"


class TestConflicts:
    @pytest.fixture
    def registry(self, install):
        install("first-pkg", {"zigzag": "fake_one"}, {"fake_one": GOOD})
        install("second-pkg", {"zigzag": "fake_two"}, {"fake_two": GOOD})
        return Registry()

    def test_the_error_names_both_distributions(self, registry):
        with pytest.raises(PluginConflictError) as caught:
            registry.maskers["zigzag"]
        assert caught.value.distributions == ("first-pkg", "second-pkg")
        assert "choose one: 'first-pkg:zigzag' or 'second-pkg:zigzag'" in str(caught.value)

    def test_a_qualified_name_chooses(self, registry):
        assert registry.maskers["first-pkg:zigzag"].__module__ == "fake_one"
        assert registry.maskers["second-pkg:zigzag"].__module__ == "fake_two"

    def test_both_are_listed_as_conflict(self, registry):
        states = [entry.state for entry in registry.maskers.entries() if entry.name == "zigzag"]
        assert states == ["conflict", "conflict"]
        assert registry.maskers.check("zigzag").state == "conflict"
        assert registry.maskers.names().count("zigzag") == 1

    def test_a_class_is_called_by_its_qualified_name(self, registry):
        second = registry.maskers["second-pkg:zigzag"]
        assert registry.maskers.name_of(second) == "second-pkg:zigzag"

    def test_disabling_one_settles_it(self, registry, monkeypatch):
        monkeypatch.setenv("SAH_DISABLE_PLUGINS", "first-pkg:zigzag")
        registry = Registry()
        assert registry.maskers["zigzag"].__module__ == "fake_two"
        assert registry.maskers.name_of(registry.maskers["zigzag"]) == "zigzag"
        assert [entry.state for entry in registry.maskers.entries() if entry.name == "zigzag"] == [
            "disabled",
            "ok",
        ]


def states(registry):
    return {e.id: (e.state, e.reason) for e in registry.maskers.entries() if e.name == "zigzag"}


class TestVersions:
    INSTALLED = importlib.metadata.version(DISTRIBUTION)

    @pytest.mark.parametrize(
        "requires",
        [
            [f"sparse-attention-hub>={INSTALLED}"],
            ["Sparse_Attention.Hub>=0.0.1"],
            ["sparse-attention-hub"],
            ["torch>=99", "sparse-attention-hubs>=99"],
            ["sparse-attention-hub>=99; extra == 'next'"],
            ["sparse-attention-hub>=99; python_version < '3'"],
            ["sparse-attention-hub>=?"],
        ],
    )
    def test_a_requirement_that_is_met_or_does_not_apply_is_fine(self, install, requires):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD}, requires=requires)
        assert Registry().maskers["zigzag"].name == "zigzag"

    def test_a_requirement_that_is_missed_is_seen_without_an_import(self, install):
        install("zig-pkg", {"zigzag": "gone"}, requires=["torch", "sparse-attention-hub >=9, <10"])
        registry = Registry()
        reason = f"it requires sparse-attention-hub<10,>=9, but {self.INSTALLED} is installed"
        assert states(registry) == {"zig-pkg:zigzag": ("incompatible", reason)}
        assert registry.maskers.check("zigzag").state == "incompatible"
        assert "zigzag" not in registry.maskers
        assert "zigzag" not in registry.maskers.names()
        for name in ("zigzag", "zig-pkg:zigzag"):
            with pytest.raises(IncompatiblePluginError) as caught:
                registry.maskers[name]
            assert reason in str(caught.value)
            assert "'zig-pkg' 1.2" in str(caught.value)

    def test_an_incompatible_plugin_is_in_nobodys_way(self, install):
        install("old-pkg", {"zigzag": "gone"}, requires=["sparse-attention-hub<0.0.1"])
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        registry = Registry()
        assert registry.maskers["zigzag"].name == "zigzag"
        assert [state for state, _ in states(registry).values()] == ["incompatible", "ok"]


class TestAllowList:
    @pytest.fixture(autouse=True)
    def _two_packages(self, install):
        install("first-pkg", {"zigzag": "fake_one"}, {"fake_one": GOOD})
        install("second-pkg", {"zigzag": "fake_two"}, {"fake_two": GOOD})

    @pytest.mark.parametrize(
        ("value", "loaded"),
        [
            ("", []),
            ("first-pkg", ["first-pkg"]),
            ("Second_Pkg", ["second-pkg"]),
            ("zigzag", ["first-pkg", "second-pkg"]),
            ("second-pkg:zigzag, other", ["second-pkg"]),
            ("first-pkg:other", []),
        ],
    )
    def test_only_the_named_and_the_built_in_plugins_can_be_used(self, monkeypatch, value, loaded):
        monkeypatch.setenv("SAH_LOAD_PLUGINS", value)
        registry = Registry()
        usable = [e.distribution for e in registry.maskers.entries() if e.is_usable]
        assert [owner for owner in usable if owner != DISTRIBUTION] == loaded
        assert "sink" in registry.maskers
        for plugin_id, (state, reason) in states(registry).items():
            if plugin_id.partition(":")[0] not in loaded:
                assert (state, reason) == ("disabled", "SAH_LOAD_PLUGINS does not name it")

    def test_the_error_names_the_variable(self, monkeypatch):
        monkeypatch.setenv("SAH_LOAD_PLUGINS", "")
        with pytest.raises(PluginDisabledError, match="SAH_LOAD_PLUGINS does not name it"):
            Registry().maskers["zigzag"]

    def test_what_is_disabled_stays_disabled(self, monkeypatch):
        monkeypatch.setenv("SAH_LOAD_PLUGINS", "first-pkg,second-pkg")
        monkeypatch.setenv("SAH_DISABLE_PLUGINS", "first-pkg")
        assert Registry().maskers["zigzag"].__module__ == "fake_two"

    def test_plugins_of_the_process_are_not_concerned(self, monkeypatch):
        monkeypatch.setenv("SAH_LOAD_PLUGINS", "")
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        assert registry.maskers["quest-of-tests"] is Quest

    def test_names_that_fit_nothing_are_known(self, monkeypatch):
        monkeypatch.setenv("SAH_LOAD_PLUGINS", "first-pkg,frist-pkg")
        monkeypatch.setenv("SAH_DISABLE_PLUGINS", "second-pkg:zigzag,second-pkg:zagzig")
        assert Registry().unknown_settings() == (
            ("SAH_DISABLE_PLUGINS", "second-pkg:zagzig"),
            ("SAH_LOAD_PLUGINS", "frist-pkg"),
        )
        monkeypatch.delenv("SAH_LOAD_PLUGINS")
        monkeypatch.delenv("SAH_DISABLE_PLUGINS")
        assert Registry().unknown_settings() == ()


class TestProblems:
    def test_all_that_cannot_be_used_is_found(self, install):
        install("bad-pkg", {"bad": "fake_bad"}, {"fake_bad": "raise RuntimeError('why')"})
        install("old-pkg", {"old": "gone"}, requires=["sparse-attention-hub<0.0.1"])
        install("first-pkg", {"zigzag": "fake_one"}, {"fake_one": GOOD})
        install("second-pkg", {"zigzag": "fake_two"}, {"fake_two": GOOD})
        found = {(p.id, p.state) for p in Registry().problems()}
        assert found == {
            ("bad-pkg:bad", "broken"),
            ("old-pkg:old", "incompatible"),
            ("first-pkg:zigzag", "conflict"),
            ("second-pkg:zigzag", "conflict"),
        }


class TestTracing:
    def test_every_load_is_a_line_with_its_time(self, install, monkeypatch, capsys):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        install("bad-pkg", {"bad": "fake_bad"}, {"fake_bad": "raise RuntimeError('why')"})
        monkeypatch.setenv("SAH_TRACE_PLUGINS", "1")
        registry = Registry()
        registry.maskers["zigzag"]
        registry.maskers["zigzag"]
        registry.maskers.check("bad")
        first, second = capsys.readouterr().err.splitlines()
        assert re.fullmatch(
            r"sah plugins: loaded masker zig-pkg:zigzag \(fake_zigzag\) in \d+\.\d ms", first
        )
        assert second == ("sah plugins: masker bad-pkg:bad (fake_bad) is broken: RuntimeError: why")

    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_nothing_is_said_otherwise(self, install, monkeypatch, capsys, value):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        if value is not None:
            monkeypatch.setenv("SAH_TRACE_PLUGINS", value)
        Registry().maskers["zigzag"]
        assert capsys.readouterr().err == ""


class TestFiles:
    @pytest.fixture
    def write(self, tmp_path):
        def to(name, source):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))
            return path

        yield to
        for name in [name for name in sys.modules if name.startswith("sah_plugin_file_")]:
            del sys.modules[name]

    def test_a_file_registers_what_its_hooks_return(self, write):
        source = (
            GOOD
            + """
    class Seen:
        name = "seen"
        reset = result = dict

    @hookimpl
    def sah_metric():
        return Seen

    @hookimpl
    def sah_model():
        return lambda: "files"

    @hookimpl
    def sah_scorer():
        from sah_core.scorer import Scorer

        return {"length": Scorer(function=len, description="letters", source="this test")}
"""
        )
        path = write("my_plugins.py", source)
        registry = Registry()
        entries = registry.load_file(str(path))
        assert {(e.kind, e.name, e.distribution, e.version) for e in entries} == {
            ("masker", "zigzag", "my_plugins.py", ""),
            ("metric", "seen", "my_plugins.py", ""),
            ("model", "my-plugins", "my_plugins.py", ""),
            ("scorer", "my-plugins", "my_plugins.py", ""),
        }
        assert {e.entry_point for e in entries} == {str(path)}
        found = registry.maskers["zigzag"]
        assert found is registry.maskers["my_plugins.py:zigzag"]
        assert inspect.getsourcefile(found) == str(path)
        assert registry.metrics["seen"].name == "seen"
        assert registry.models["my-plugins"]() == "files"
        assert registry.scorers["my-plugins"]["length"].function is len
        assert pickle.loads(pickle.dumps(found)) is found

    def test_loading_a_file_again_does_nothing(self, write):
        path = write("mine.py", GOOD)
        registry = Registry()
        assert registry.load_file(path) == registry.load_file(path.parent / "." / "mine.py")
        assert registry.files == (path,)

    def test_a_file_can_be_taken_out_and_loaded_again(self, write):
        path = write("mine.py", GOOD)
        registry = Registry()
        registry.load_file(path)
        first = registry.maskers["zigzag"]
        registry.unload_file(path)
        assert "zigzag" not in registry.maskers
        assert registry.files == ()
        with pytest.raises(PluginFileError, match="it is not loaded"):
            registry.unload_file(path)
        registry.load_file(path)
        assert registry.maskers["zigzag"] is not first

    def test_a_file_can_be_disabled(self, write, monkeypatch):
        monkeypatch.setenv("SAH_DISABLE_PLUGINS", "mine.py")
        registry = Registry()
        [entry] = registry.load_file(write("mine.py", GOOD))
        assert entry.state == "disabled"
        assert "zigzag" not in registry.maskers

    CASES = {
        "import error": ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
        "exits": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        "no hook": ("x = 1", "it has no plugin: no function in it carries @hookimpl"),
        "no mark": ("def sah_masker(): return int", "sah_masker lacks @hookimpl"),
        "misspelt": (
            "from sah_core import hookimpl\n@hookimpl\ndef sah_maskr(): return int",
            "unknown hook 'sah_maskr' (did you mean 'sah_masker'?)",
        ),
        "fails": (
            "from sah_core import hookimpl\n@hookimpl\ndef sah_masker(): return 1 / 0",
            "its hook sah_masker fails: ZeroDivisionError: division by zero",
        ),
        "none": (
            "from sah_core import hookimpl\n@hookimpl\ndef sah_masker(): return None",
            "its hook sah_masker returned None",
        ),
        "no masker": (
            "from sah_core import hookimpl\n@hookimpl\ndef sah_masker(): return int",
            "its hook sah_masker returned int, no subclass of Masker",
        ),
        "bad name": (GOOD.replace('"zigzag"', '"Zig Zag"'), "'Zig Zag' is no plugin name"),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_what_is_wrong_with_a_file_is_one_line_and_leaves_nothing(self, write, case):
        source, reason = self.CASES[case]
        registry = Registry()
        before = registry.entries()
        with pytest.raises(PluginFileError) as caught:
            registry.load_file(write("mine.py", source))
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        assert registry.entries() == before
        assert not [name for name in sys.modules if name.startswith("sah_plugin_file_")]

    def test_a_path_that_is_no_file_is_said(self, tmp_path, write):
        registry = Registry()
        with pytest.raises(PluginFileError, match="there is no such file"):
            registry.load_file(tmp_path / "absent.py")
        with pytest.raises(PluginFileError, match="it is a folder"):
            registry.load_file(tmp_path)
        with pytest.raises(PluginFileError, match="it is no Python file"):
            registry.load_file(write("notes.txt", GOOD))

    def test_a_name_that_is_taken_is_refused_and_nothing_registered(self, write, install):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        source = """
            from sah_core.hookspecs import hookimpl
            from sah_core.masker import Masker

            class Seen:
                name = "seen"
                reset = result = dict

            class Zigzag(Masker):
                name = "zigzag"
                add_mask = print

            @hookimpl
            def sah_metric():
                return Seen

            @hookimpl
            def sah_masker():
                return Zigzag
        """
        registry = Registry()
        with pytest.raises(PluginConflictError, match="by 'zig-pkg' already. rename the class"):
            registry.load_file(write("mine.py", source))
        assert "seen" not in registry.metrics
        assert registry.files == ()


class TestDisabling:
    def test_a_disabled_plugin_is_listed_but_not_usable(self, install, monkeypatch):
        install("zig-pkg", {"zigzag": "fake_zigzag"}, {"fake_zigzag": GOOD})
        monkeypatch.setenv("SAH_DISABLE_PLUGINS", "other, zigzag")
        registry = Registry()
        assert registry.maskers.check("zigzag").state == "disabled"
        assert "zigzag" not in registry.maskers
        assert "zigzag" not in registry.maskers.names()
        with pytest.raises(PluginDisabledError, match="SAH_DISABLE_PLUGINS"):
            registry.maskers["zigzag"]
        assert "fake_zigzag" not in sys.modules


class TestLocalPlugins:
    def test_a_class_registers_by_itself(self):
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        assert registry.maskers["quest-of-tests"] is Quest
        assert registry.maskers["local:quest-of-tests"] is Quest
        assert registry.maskers.entry("quest-of-tests").entry_point == "Quest"
        assert registry.maskers.name_of(Quest) == "quest-of-tests"

    def test_a_factory_and_an_object_with_the_hook_register_too(self):
        class Plugin:
            @hookimpl
            def sah_model(self):
                return int

        registry = Registry()
        registry.models.register("by-hook", Plugin())
        registry.models.register("by-function", lambda: "source")
        assert registry.models["by-hook"] is int
        assert registry.models["by-function"]() == "source"

    def test_registries_are_independent(self):
        one, other = Registry(), Registry()
        one.maskers.register("quest-of-tests", Quest)
        assert "quest-of-tests" not in other.maskers

    def test_a_name_is_never_overwritten(self):
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        with pytest.raises(PluginConflictError):
            registry.maskers.register("quest-of-tests", Quest)
        registry.maskers.register("quest-of-tests", Quest, distribution="elsewhere")
        with pytest.raises(PluginConflictError):
            registry.maskers["quest-of-tests"]

    def test_unregistering_frees_the_name(self):
        registry = Registry()
        registry.maskers.register("quest-of-tests", Quest)
        assert registry.maskers["quest-of-tests"] is Quest
        registry.maskers.unregister("quest-of-tests")
        assert "quest-of-tests" not in registry.maskers
        registry.maskers.register("quest-of-tests", Quest)
        assert registry.maskers["quest-of-tests"] is Quest
        with pytest.raises(UnknownPluginError):
            registry.maskers.unregister("nobody")

    @pytest.mark.parametrize("name", ["Quest", "a b", "", "a:b", "-a", "a_b"])
    def test_a_name_is_lower_case_with_hyphens(self, name):
        with pytest.raises(ValueError, match="plugin name"):
            Registry().maskers.register(name, Quest)

    def test_a_class_of_another_name_is_broken(self):
        registry = Registry()
        registry.maskers.register("other", Quest)
        with pytest.raises(BrokenPluginError, match="its class is named 'quest-of-tests'"):
            registry.maskers["other"]


class TestPackageRoot:
    @pytest.mark.parametrize(
        "lines",
        [
            "from sah_core import registry",
            "import sah_core; registry = sah_core.registry",
            "import sah_core.registry; registry = sah_core.registry",
            "import sah_core.registry as registry",
            "from sah_core.registry import Registry; from sah_core import registry",
            "import importlib; importlib.import_module('sah_core.registry'); "
            "from sah_core import registry",
        ],
    )
    def test_registry_is_the_object_in_every_order_and_without_torch(self, lines):
        check = "import sys; registry.maskers.names; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", f"{lines}; {check}"], check=False)
        assert done.returncode == 0

    def test_errors_and_parameters_come_without_torch(self):
        code = (
            "from sah_core import SahError, Size, param, hookimpl, ParameterError, Registry\n"
            "import sys, sah_core; assert 'Mask' in dir(sah_core)\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_an_unknown_attribute_is_an_attribute_error(self):
        import sah_core

        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            sah_core.Nothing  # noqa: B018

    def test_every_lazy_name_belongs_to_a_module_of_the_package(self):
        import sah_core

        lazy = set(sah_core._MODULES)
        assert lazy | {"registry", "Registry"} == set(sah_core.__all__)
