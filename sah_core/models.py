"""Where a model comes from: what an alias of the kind ``sah.models`` stands for, and the folder of
converted ones.
"""

import os
from pathlib import Path
from typing import Literal

import attrs

SourceKind = Literal["gguf", "folder", "hub"]


@attrs.frozen(kw_only=True)
class ModelSource:
    """A model's place, before anything is loaded.

    A plugin of the kind ``sah.models`` provides a callable without arguments that returns one.

    Attributes:
        kind: A GGUF file, a local folder as written by ``save_pretrained``, or a hub repository.
        location: The path of the file or folder, or the hub id.
        label: The name that reports show.
        revision: A hub revision; None is the default branch.
    """

    kind: SourceKind
    location: str
    label: str
    revision: str | None = None


def cache_folder() -> Path:
    """The folder of converted models: ``SAH_CACHE_DIR``, else the platform's for this user."""
    import platformdirs

    configured = os.environ.get("SAH_CACHE_DIR")
    if configured:
        return Path(configured).expanduser()
    return Path(platformdirs.user_cache_dir("sparse-attention-hub", appauthor=False))
