"""Adapter `hf`: any causal language model of Hugging Face transformers."""

from typing import TYPE_CHECKING, Any

from sah_core import hookimpl

if TYPE_CHECKING:
    from .adapter import HuggingFaceAdapter

__all__ = ["HuggingFaceAdapter"]


def __getattr__(name: str) -> Any:
    if name == "HuggingFaceAdapter":
        from .adapter import HuggingFaceAdapter

        return HuggingFaceAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def sah_adapter() -> type[Any]:
    """Register the adapter."""
    from .adapter import HuggingFaceAdapter

    return HuggingFaceAdapter
