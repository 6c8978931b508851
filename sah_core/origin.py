"""Whether an artefact was made from the weights of the model that it is used with.

A file of another model may have equally many layers, heads and channels, and would then select
wrong keys without a word. So what makes an artefact from a model writes a signature of the model's
weights into its metadata (`sah_core.artifacts.Material.metadata`), and it is compared before a
pipeline first runs on a model.

The signature is the signs of `SIGNS` projection weights, spread over all attention modules.
Another type or quantisation of the same weights turns few of them, continued training not many
more; weights that were learned apart agree in about half of them.
"""

from __future__ import annotations

import hashlib
from itertools import groupby
from pathlib import Path
from typing import Any

from sah_core import compat
from sah_core.artifacts import read_once
from sah_core.errors import ArtifactError
from sah_core.pipeline import Pipeline

__all__ = ["check_origin", "weight_signature"]

SIGNS = 192
"""Signs in a signature."""

AGREEMENT = 0.75
"""Share of equal signs from which on weights count as the same: unrelated ones agree in 0.5, with
a standard deviation of 0.04.
"""

_STRIDE = 2_654_435_761
"""A prime, whose multiples are spread over any matrix."""


def weight_signature(model: Any) -> str | None:
    """The signature of a model's weights.

    Args:
        model: A transformers causal language model.

    Returns:
        ``<layout>-<signs>`` in hexadecimal digits, the layout being a hash of the names and shapes
        of the weights; None if they cannot be read: packed by a quantisation, or not in memory.
    """
    weights = [
        (name, weight)
        for module in compat.attention_modules(model)
        for name, weight in module.named_parameters()
        if weight.dim() > 1
    ]
    if not weights or any(w.is_meta or not w.is_floating_point() for _, w in weights):
        return None
    layout = "\n".join(f"{name} {tuple(weight.shape)}" for name, weight in weights)
    signs = 0
    for place, indices in groupby(range(SIGNS), lambda index: index * len(weights) // SIGNS):
        weight = weights[place][1]
        entries = [(index + 1) * _STRIDE % weight.numel() for index in indices]
        for positive in (weight.detach().flatten()[entries] > 0).tolist():
            signs = 2 * signs + positive
    digest = hashlib.sha256(layout.encode()).hexdigest()
    return f"{digest[:8]}-{signs:0{SIGNS // 4}x}"


def check_origin(pipeline: Pipeline, model: Any) -> None:
    """Refuse a pipeline with an artefact that was made from other weights.

    Files that do not say what they were made from are taken, and so are those whose signature is
    of another layout: the same weights may lie otherwise in another version of the model's code.

    Args:
        pipeline: What is to run.
        model: A transformers causal language model.

    Raises:
        ArtifactError: If a file is not there, or is of other weights.
    """
    found: str | None = None
    for path in (path for step in pipeline.steps for path in step.artifacts().values()):
        recorded, name = read_once(path, _recorded)
        if recorded is None:
            continue
        found = found or weight_signature(model)
        agreement = _agreement(recorded, found)
        if agreement is not None and agreement < AGREEMENT:
            raise ArtifactError(
                str(path),
                f"it was made from other weights than this model's ({name or 'a model'}, whose "
                f"weights agree with these in {agreement:.0%} of {SIGNS} signs). make it for this "
                "model, see 'sah-bench artifacts --help'.",
            )


def _recorded(path: Path) -> tuple[str | None, str]:
    """The signature in a file's metadata, if it is a file that can have one, and the model's name.

    What is wrong with a file is for its reader to say.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return None, ""
    return metadata.get("origin"), metadata.get("model", "")


def _agreement(recorded: str, found: str | None) -> float | None:
    """The share of equal signs; None where signatures cannot be compared."""
    layout, _, signs = recorded.partition("-")
    here, _, others = (found or "").partition("-")
    if layout != here or len(signs) != len(others):
        return None
    try:
        different = int(signs, 16) ^ int(others, 16)
    except ValueError:
        return None
    return 1 - different.bit_count() / SIGNS
