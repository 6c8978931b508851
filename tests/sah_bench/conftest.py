"""Fake plugins, in this process and in others."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sah_core import registry

SOURCE = Path(__file__).with_name("fake_plugins.py")
PROGRAM = """
import signal
# a shell that runs tests in the background has its children ignore interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
from sah_bench.cli import main
main()
"""


@pytest.fixture(scope="session")
def _fake_module():
    spec = importlib.util.spec_from_file_location("fake_plugins", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_plugins"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fake_plugins"]


@pytest.fixture
def fakes(_fake_module):
    """The module of fake plugins, registered in this process."""
    module = _fake_module
    kinds = {registry.adapters: "fake", registry.benchmarks: "quiz", registry.metrics: "asked"}
    plugins = (module.FakeAdapter, module.Quiz, module.Asked)
    for (kind, name), plugin in zip(kinds.items(), plugins, strict=True):
        kind.register(name, plugin)
    module.FakeAdapter.calls.clear()
    yield module
    for kind, name in kinds.items():
        kind.unregister(name)


@pytest.fixture
def command(tmp_path):
    """Starts sah-bench in a fresh process in which the fake plugins are installed."""
    site = tmp_path / "site"
    info = site / "fake_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "fake_plugins.py").write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sah.adapters]\nfake = fake_plugins:adapter\n"
        "[sah.benchmarks]\nquiz = fake_plugins:benchmark\n"
        "[sah.metrics]\nasked = fake_plugins:metric\n"
    )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
