"""Where a model comes from: what an alias of the kind ``sah.models`` stands for."""

from typing import Literal

import attrs

SourceKind = Literal["gguf", "folder", "hub"]


@attrs.frozen(kw_only=True)
class ModelSource:
    """A model's place, before anything is loaded.

    A plugin of the kind ``sah.models`` provides a callable without arguments that returns one.
    """

    kind: SourceKind
    """A GGUF file, a local folder as written by ``save_pretrained``, or a hub repository."""
    location: str
    """The path of the file or folder, or the hub id."""
    label: str
    """The name that reports show."""
    revision: str | None = None
    """A hub revision; ``None`` is the default branch."""
