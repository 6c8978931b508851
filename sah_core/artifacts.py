"""Files that a method learned offline: reading them once, naming their content, making them.

A masker names its files in parameters declared with ``param(artifact=True)`` and reads them through
`read_once`, so that a process holds one copy, whatever the number of requests and layers. The
command line makes them with the tools that the masker's class offers:

    class DoubleSparsity(Masker):
        artifact_tools = {"calibrate": ChannelCalibration}
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from sah_core.errors import ArtifactError
from sah_core.hashing import file_sha256
from sah_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from sah_core.inputs import Inputs

__all__ = [
    "ConvertTool",
    "Material",
    "ModelTool",
    "Progress",
    "content_hash",
    "read_once",
    "require_file",
    "watch_attention",
]

T = TypeVar("T")

Progress = Callable[[int, int, str], None]
"""Told how many of how many steps are done, and in a few words how it goes."""

_kept: dict[tuple[Callable[[Path], Any], Path], tuple[tuple[int, int], Any]] = {}
_reading = threading.RLock()


def require_file(path: Path) -> Path:
    """The path of a file that can be opened.

    Raises:
        ArtifactError: If there is no such file, or it cannot be read.
    """
    if not path.exists():
        raise ArtifactError(str(path), "there is no such file. see 'sah-bench artifacts --help'.")
    if not path.is_file():
        raise ArtifactError(str(path), "it is no file. give the file itself.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ArtifactError(str(path), f"it cannot be read ({error.strerror}).") from error
    return path


def read_once(path: str | Path, reader: Callable[[Path], T]) -> T:
    """What ``reader`` makes of a file, kept for as long as the file does not change.

    Kept by path, time of change and size; a file that changed replaces what was kept of it.

    Args:
        path: The file.
        reader: A function of a module, so that the same one is the same key.

    Raises:
        ArtifactError: If there is no such file, or whatever the reader raises.
    """
    place = require_file(Path(path).expanduser()).resolve()
    facts = place.stat()
    stamp = (facts.st_mtime_ns, facts.st_size)
    with _reading:
        known = _kept.get((reader, place))
        if known is None or known[0] != stamp:
            known = _kept[reader, place] = (stamp, reader(place))
    value: T = known[1]
    return value


def content_hash(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return file_sha256(require_file(Path(path).expanduser()))


@attrs.frozen(kw_only=True, eq=False)
class Material:
    """What an artefact is made from.

    Attributes:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: What the model is called, for the metadata.
        texts: What the model reads.
    """

    model: Any
    tokenizer: Any
    name: str
    texts: Sequence[str]

    @property
    def metadata(self) -> dict[str, str]:
        """What a file should say of the model: its name and, where it can be told, a signature of
        its weights, by which the file is refused with others (`sah_core.origin`).
        """
        from sah_core.origin import weight_signature

        origin = weight_signature(self.model)
        return {"model": self.name, **({} if origin is None else {"origin": origin})}


@attrs.frozen(kw_only=True)
class ModelTool:
    """Makes an artefact from a model and texts; calibration and training are of this kind.

    Subclasses are attrs-frozen classes whose fields are the options of the command
    (`sah_core.param`) and whose docstring says in its first line what is made.
    """

    def make(self, material: Material, output: Path, progress: Progress) -> Mapping[str, Any]:
        """Write the artefact, all of it or nothing.

        Args:
            material: Model and texts.
            output: The file to write; an existing one is replaced.
            progress: To be called after every step.

        Returns:
            What there is to say about it, for the user to read.
        """
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class ConvertTool:
    """Makes an artefact from a file in another form; its fields are the options of the command."""

    def make(self, source: Path, output: Path) -> Mapping[str, Any]:
        """Write the artefact, all of it or nothing.

        Args:
            source: The file to read, which need not be trusted.
            output: The file to write; an existing one is replaced.

        Returns:
            What there is to say about it, for the user to read.

        Raises:
            ArtifactError: If the file is not what it should be.
        """
        raise NotImplementedError


class _Watcher:
    """Hands every attention call to a function."""

    def __init__(self, watch: Callable[[Inputs], None]) -> None:
        self.watch = watch

    @hookimpl
    def sah_mask_built(self, inputs: Inputs) -> None:
        self.watch(inputs)


def watch_attention(model: Any, input_ids: Tensor, watch: Callable[[Inputs], None]) -> None:
    """Run a model densely over some tokens and show every layer's attention call.

    Queries and keys come as attention sees them, rotary embedding and norms applied.

    Args:
        model: A transformers causal language model.
        input_ids: int64 ``(batch, tokens)``.
        watch: Called once per layer, in order; it must copy what it keeps.

    Raises:
        UnsupportedError: If the model's attention does not go through the attention interface.
    """
    import torch

    from sah_core.patching import attach

    with torch.no_grad(), attach(model, "dense", observers=[_Watcher(watch)]) as session:
        # observers follow a dense pipeline in this phase
        session.phase = "question"
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
