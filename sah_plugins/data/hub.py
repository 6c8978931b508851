"""Loads a table from the hub of data sets: parquet, JSON Lines or CSV at one commit, never code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sah_core.benchmark import DataSource
from sah_core.errors import DataError, one_line

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HELP = (
    "put the rows into a folder and name it with --data-dir ('sah-bench data fetch' makes such a "
    "folder where the hub can be reached)"
)


def commit_of(source: DataSource, owner: str) -> str:
    """Return the pinned commit, or else the one that the hub, or the local cache, has now.

    Raises:
        DataError: None is pinned and neither knows the data set.
    """
    if source.revision is not None:
        return source.revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    problem = "offline mode is on (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            return str(HfApi().dataset_info(source.hub).sha)
        except (HfHubHTTPError, OSError) as error:
            problem = f"the hub cannot be reached ({type(error).__name__})"
    folder = f"datasets--{source.hub.replace('/', '--')}"
    known = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
    if known.is_file():
        return known.read_text(encoding="utf-8").strip()
    raise DataError(
        owner, f"hub data set {source.hub}", f"{problem} and the cache does not have it: {_HELP}"
    )


def load(source: DataSource, commit: str, owner: str) -> Any:
    """Return the ``datasets.Dataset`` of a source, which lies on the disk and not in memory.

    Raises:
        DataError: It cannot be loaded.
    """
    import datasets

    try:
        if source.files is None:
            return datasets.load_dataset(
                source.hub, source.config, split=source.split, revision=commit
            )
        path = file_url(source, commit)
        builder = _BUILDERS[os.path.splitext(source.files)[1]]
        return datasets.load_dataset(builder, data_files={source.split: path}, split=source.split)
    except Exception as error:  # of many libraries: whatever they raise means that there are none
        place = f"hub data set {source.hub} at {commit}"
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise DataError(owner, place, f"cannot be loaded ({reason}): {_HELP}") from error


def file_url(source: DataSource, commit: str) -> str:
    """Return where the file of a source lies, inside an archive if its path has a ``::``."""
    outer, inside, inner = (source.files or "").partition("::")
    url = f"hf://datasets/{source.hub}@{commit}/{outer}"
    return f"zip://{inner}::{url}" if inside else url
