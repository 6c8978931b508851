"""``sah-bench env``: what a bug report needs to know about this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import click

from ..options import debug_option

_LIBRARIES = ("torch", "transformers", "triton", "accelerate", "datasets", "ray", "pluggy", "gguf")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def env(as_json: bool) -> None:
    """Show versions, devices and where models come from."""
    from sah_core.models import cache_folder

    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "plugin_distributions": _plugin_distributions(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": _devices(),
        "cache_folder": str(cache_folder()),
        "models": _models(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            click.echo(f"{label}:")
            for key, item in value.items():
                click.echo(f"  {key}: {item or 'not installed'}")
        elif isinstance(value, list):
            click.echo(f"{label}: {', '.join(value)}")
        else:
            click.echo(f"{label}: {value}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugin_distributions() -> dict[str, str]:
    """Versions of everything that ships plugins, this project first."""
    from sah_core import registry

    found = {entry.distribution: entry.version for entry in registry.entries()}
    own = "sparse-attention-hub"
    return {own: _version(own) or "", **dict(sorted(found.items()))}


def _devices() -> list[str]:
    try:
        import torch
    except Exception as error:  # a broken torch is what such a report is for
        return [f"torch cannot be imported: {error}"]
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        devices.append(f"cuda:{index} ({facts.name}, {memory:.0f} GiB)")
    return devices


def _models() -> dict[str, Any]:
    """Where each alias leads, or why it leads nowhere."""
    from sah_core import registry
    from sah_core.errors import SahError

    found = {}
    for name in registry.models.names():
        try:
            found[name] = registry.models[name]().location
        except SahError as error:
            found[name] = str(error)
    return found
