"""A profile as plain data, and the folder that it is written to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from sah_core.errors import OutputFolderError

from .rows import Outcome
from .timing import Copy

if TYPE_CHECKING:
    pass

JSON_NAME = "profile.json"
LIBRARIES = ("sparse-attention-hub", "torch", "triton", "transformers")


@attrs.frozen(kw_only=True)
class Setting:
    """Where and how a profile was taken.

    Attributes:
        command: The command line.
        device: Where.
        copy: Its bandwidth.
        rounds: Rounds that count.
        warmup: Rounds before them.
    """

    command: str
    device: torch.device
    copy: Copy
    rounds: int
    warmup: int

    @property
    def card(self) -> str:
        """The name of the device."""
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"

    def to_plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        versions = {"python": platform.python_version()}
        versions |= {name: version_of(name) for name in LIBRARIES}
        if self.device.type == "cuda":
            versions["cuda"] = str(torch.version.cuda)
        return {
            "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": self.card,
            "device_type": self.device.type,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "versions": versions,
            "rounds": self.rounds,
            "warmup": self.warmup,
            "copy": self.copy.to_plain(),
        }


def version_of(distribution: str) -> str:
    """The version of a distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def document(setting: Setting, rows: Sequence[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """The profile as plain data, beginning with the facts about what was measured."""
    return {**facts, **setting.to_plain(), "rows": [row.to_plain() for row in rows]}


# Output folder


def prepare(folder: Path) -> None:
    """Make sure that a profile can be written, before anything is measured.

    Raises:
        OutputFolderError: If it cannot, or if the folder holds one already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / JSON_NAME).exists():
            raise OutputFolderError(str(folder), f"it holds a {JSON_NAME} already")
        probe = folder / f".{JSON_NAME}"
        probe.touch()
        probe.unlink()
    except OutputFolderError:
        raise
    except OSError as error:
        raise OutputFolderError(str(folder), error.strerror or str(error)) from error


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write the JSON."""
    path = folder / JSON_NAME
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


# Tables


# Plot
