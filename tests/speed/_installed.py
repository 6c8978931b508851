"""Entry points without an installation, for machines that have the source tree and nothing else.

`install` writes the metadata of this project, made from ``pyproject.toml``, into a folder that goes
onto ``sys.path`` (and ``PYTHONPATH``, for processes that this one starts).
"""

import importlib.metadata
import os
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install() -> None:
    """Make this project's plugins known, unless it is installed."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        importlib.metadata.distribution(project["name"])
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    site = Path(tempfile.mkdtemp(prefix="entry-points-"))
    name = project["name"].replace("-", "_")
    info = site / f"{name}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        encoding="utf-8",
    )
    (info / "entry_points.txt").write_text(entry_points(project), encoding="utf-8")
    sys.path.insert(0, str(site))
    paths = (str(site), str(ROOT), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def entry_points(project: dict) -> str:
    """The text of ``entry_points.txt``."""
    groups = {**project.get("entry-points", {}), "console_scripts": project.get("scripts", {})}
    return "\n".join(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    )
