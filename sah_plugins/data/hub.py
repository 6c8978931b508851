"""Loads a table from the hub of data sets: parquet, JSON Lines or CSV at one commit, never code."""

from __future__ import annotations

import os
import shutil
import zipfile
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
        path = _downloaded(source, commit, Path(datasets.config.HF_DATASETS_CACHE))
        files = {source.split: str(path)}
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=files, split=source.split)
    except Exception as error:  # of many libraries: whatever they raise means that there are none
        place = f"hub data set {source.hub} at {commit}"
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise DataError(owner, place, f"cannot be loaded ({reason}): {_HELP}") from error


def _downloaded(source: DataSource, commit: str, cache: Path) -> Path:
    """The local copy of the file of a source, taken out of its archive if it lies in one."""
    from huggingface_hub import hf_hub_download

    outer, inside, inner = (source.files or "").partition("::")
    path = Path(hf_hub_download(source.hub, outer, repo_type="dataset", revision=commit))
    if not inside:
        return path
    folder = cache / "sparse-attention-hub" / source.hub.replace("/", "--") / commit
    target = folder / inner
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}-{os.getpid()}")
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(inner) as packed,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        os.replace(part, target)
    return target
