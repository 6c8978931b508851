"""Golden cases of maskers and backends: expected selections and outputs, computed from the papers.

A case is a safetensors file. Its tensors are ``query`` ``(batch, heads, query_len, head_dim)``,
``key`` and ``value`` ``(batch, kv_heads, key_len, ...)``, ``keep`` ``(batch, 1, query_len,
key_len)`` bool (True = may be attended), and what is expected: ``probability`` ``(batch, heads,
query_len, key_len)`` and ``output`` ``(batch, heads, query_len, value_dim)``. Its metadata names
the ``pipeline`` (JSON: maskers and their parameters), the ``scaling`` and the layer, ``layer_idx``.
The masker ``given`` stands for the tensor of that name: a literal mask, united with what was
selected before it. Where the metadata holds ``sorted_channels``, it is the channel file of
``double_sparsity`` as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import attrs
import torch
from torch import Tensor

from sah_core import registry
from sah_core.allowed import Allowed
from sah_core.attention import build_mask
from sah_core.backend import Backend, Problem
from sah_core.errors import (
    BrokenPluginError,
    PluginConflictError,
    PluginDisabledError,
    RequestError,
    SahError,
    UnknownPluginError,
    one_line,
)
from sah_core.inputs import Inputs, Phase
from sah_core.mask import Mask
from sah_core.masker import Masker
from sah_core.parameters import from_plain, specs

Status = Literal["passed", "failed", "skipped"]

GIVEN = "given"
PROBABILITY_TOLERANCE = 1e-6
OUTPUT_TOLERANCE = 1e-5

DEFAULTS: dict[str, Any] = {"group_reduction": "none", "label_bits": 16}
"""The values of parameters that a case leaves out, whatever the default of the masker."""

_UNUSABLE = (UnknownPluginError, PluginDisabledError, PluginConflictError, BrokenPluginError)
_TENSORS = ("query", "key", "value", "keep", "probability", "output")


@attrs.frozen(kw_only=True)
class CaseResult:
    """How one case went on one backend.

    Attributes:
        path: The file.
        case: The name of the case.
        backend: The registered name of the backend.
        status: ``passed``, ``failed`` or ``skipped``.
        reason: Why it was skipped, or what differs; empty if it passed.
    """

    path: Path
    case: str
    backend: str
    status: Status
    reason: str = ""


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """A golden case as it stands in its file.

    Attributes:
        path: The file.
        name: The name of the case.
        pipeline: Names and parameters of the maskers, in order, as the file has them.
        scaling: Factor on ``q . k``.
        layer: The layer that the case plays.
        channels: The channel file of double sparsity, JSON text; empty in other cases.
        tensors: By name.
    """

    path: Path
    name: str
    pipeline: tuple[tuple[str, dict[str, Any]], ...]
    scaling: float
    layer: int
    channels: str
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read a case from its file.

        Raises:
            RequestError: The file is no golden case.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _not_a_case(path, f"{type(error).__name__}: {error}") from error
        absent = [name for name in ("pipeline", "scaling") if name not in metadata]
        if absent:
            raise _not_a_case(path, f"its metadata lacks {' and '.join(absent)}")
        pipeline = _steps(path, metadata["pipeline"])
        numbers: dict[str, Any] = {}
        for name, kind, text in (
            ("scaling", float, metadata["scaling"]),
            ("layer_idx", int, metadata.get("layer_idx", "0")),
        ):
            try:
                numbers[name] = kind(text)
            except ValueError:
                numbers[name] = math.nan
            if not (math.isfinite(numbers[name]) and numbers[name] >= 0):
                raise _not_a_case(path, f"its {name} is {text!r}, no number >= 0")
        reason = _misfit(tensors, given=GIVEN in dict(pipeline))
        if reason:
            raise _not_a_case(path, reason)
        return cls(
            path=path,
            name=metadata.get("case", path.stem),
            pipeline=pipeline,
            scaling=numbers["scaling"],
            layer=numbers["layer_idx"],
            channels=metadata.get("sorted_channels", ""),
            tensors=tensors,
        )

    def on(self, device: str) -> Case:
        """The case with its tensors on another device."""
        return attrs.evolve(self, tensors={k: t.to(device) for k, t in self.tensors.items()})

    def inputs(self, backend: Backend) -> Inputs:
        """The attention call of the case, with the scoring primitives of a backend."""
        query, key = self.tensors["query"], self.tensors["key"]
        query_len, key_len = query.shape[2], key.shape[2]
        phase: Phase = "question"
        if query_len == 1:
            phase = "decode"
        elif query_len == key_len:
            phase = "prefill"
        return Inputs(
            query=query,
            key=key,
            value=self.tensors["value"],
            allowed=Allowed.from_dense(self.tensors["keep"]),
            scaling=self.scaling,
            key_len=key_len,
            layer=self.layer,
            layer_count=1 + max([self.layer, *self.channel_layers()]),
            phase=phase,
            ops=backend.ops,
        )

    def mask(self, inputs: Inputs) -> Mask:
        """The selection of the case's pipeline, made by the installed maskers.

        Raises:
            SahError: A masker is not installed, or refuses the case's parameters.
        """
        with TemporaryDirectory() as folder:
            files = {}
            if self.channels:
                file = Path(folder) / f"{self.name}.json"
                file.write_text(self.channels, encoding="utf-8")
                files["sorted_channel_file"] = str(file)
            steps = tuple(
                _Given(probability=self.tensors[GIVEN])
                if name == GIVEN
                else _masker(name, params, files)
                for name, params in self.pipeline
            )
            return build_mask(steps, inputs)

    def channel_layers(self) -> list[int]:
        """The layers that the channel file has, as its names say."""
        return [int(layer) for layer in re.findall(r'layers\.(\d+)\.[^"]*":', self.channels)]


@attrs.frozen(kw_only=True, eq=False)
class _Given(Masker):
    """A literal mask as a step of a pipeline."""

    name: ClassVar[str] = GIVEN

    probability: Tensor

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Add the literal mask."""
        return previous | Mask.from_dense(self.probability)


def run_maskers(
    paths: Iterable[str | Path], backends: Sequence[str] | None = None, device: str = "cpu"
) -> Iterator[CaseResult]:
    """Check golden cases on backends: the selection exactly, the output within 1e-5.

    Args:
        paths: Files, or folders that hold some.
        backends: Registered names; None is every backend that is registered.
        device: Where the cases run: ``cpu``, ``cuda``, ``cuda:1``, ...

    Yields:
        A result per file and backend, in order. What cannot run here is skipped, with the reason; a
        file that is no golden case has failed.

    Raises:
        RequestError: A path does not exist or holds no file, or there is no such device.
        UnknownPluginError: There is no such backend.
    """
    names = registry.backends.names() if backends is None else tuple(backends)
    for name in names:
        if name not in registry.backends:
            registry.backends.entry(name)  # raises what is wrong with the name
    check_device(device)
    for path in case_files(paths):
        try:
            case = Case.read(path).on(device)
        except RequestError as error:
            yield CaseResult(
                path=path, case=path.stem, backend="-", status="failed", reason=one_line(str(error))
            )
            continue
        for name in names:
            status, reason = _run(case, name)
            yield CaseResult(
                path=path, case=case.name, backend=name, status=status, reason=one_line(reason)
            )


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        RequestError: With what torch says of it.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(str(error)).split(". ")[0]
        raise RequestError(f"device {device!r} cannot be used: {reason}") from error


def case_files(paths: Iterable[str | Path]) -> list[Path]:
    """The safetensors files under the paths, sorted within each folder.

    Raises:
        RequestError: A path does not exist, or is a folder without a case.
    """
    found = []
    for given in paths:
        path = Path(given)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise _not_a_case(path, "the folder holds no .safetensors file")
        if not files[0].exists():
            raise _not_a_case(path, "there is no such file")
        found += files
    return found


def _run(case: Case, name: str) -> tuple[Status, str]:
    try:
        backend = registry.backends[name]()
    except Exception as error:  # a foreign class may raise anything where its device is missing
        return "skipped", f"backend {name} is not available: {error}"
    for masker, _ in case.pipeline:
        reason = None if masker == GIVEN else _unusable(_registered(masker))
        if reason:
            return "skipped", reason
    try:
        inputs = case.inputs(backend)
        with torch.inference_mode():
            mask = case.mask(inputs)
            refusal = backend.refuses(Problem.of(inputs, mask))
            difference = _mask_difference(case, mask, inputs)
            if difference is None and refusal is None:
                difference = _output_difference(case, backend.attend(inputs, mask)[0])
    except SahError as error:
        return "failed", str(error)
    except Exception as error:  # foreign code: one case must not end the run
        return "failed", f"{type(error).__name__}: {error}"
    if difference is not None:
        return "failed", difference
    if refusal is not None:
        return "skipped", f"backend {name} refuses: {refusal}"
    return "passed", ""


def _steps(path: Path, text: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Names and parameters of the maskers, from the JSON text of a case."""
    try:
        steps = json.loads(text)
    except ValueError as error:
        raise _not_a_case(path, f"its pipeline is no JSON: {error}") from error
    if not isinstance(steps, list) or not steps:
        raise _not_a_case(path, f"its pipeline is {text!r}, no list of maskers")
    found = []
    for step in steps:
        known = isinstance(step, dict) and isinstance(step.get("masker"), str)
        if not known or not isinstance(step.get("params", {}), dict):
            reason = (
                f"its pipeline has the step {json.dumps(step)}, without a masker and its params"
            )
            raise _not_a_case(path, reason)
        found.append((step["masker"], step.get("params", {})))
    return tuple(found)


def _misfit(tensors: dict[str, Tensor], *, given: bool) -> str:
    """Why the tensors of a case do not fit together; empty if they do."""
    names = (*_TENSORS, GIVEN) if given else _TENSORS
    missing = [name for name in names if name not in tensors]
    if missing:
        return f"it lacks {', '.join(missing)}"
    for name in names:
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        kind = dtype == torch.bool if name == "keep" else dtype.is_floating_point
        if not kind or len(shape) != 4 or 0 in shape:
            what = "bool" if name == "keep" else "float"
            return f"{name} is {dtype} {shape}, expected {what} of 4 dimensions, none of them 0"
    batch, heads, query_len, head_dim = tensors["query"].shape
    kv_heads, key_len = tensors["key"].shape[1:3]
    if heads % kv_heads or query_len > key_len:
        return (
            f"{heads} query heads on {kv_heads} KV heads, {query_len} queries on {key_len} keys: "
            "expected a multiple, and no more queries than keys"
        )
    value_dim = tensors["value"].shape[3]
    keep_heads = 1 if tensors["keep"].shape[1] == 1 else heads
    expected = {
        "key": (batch, kv_heads, key_len, head_dim),
        "value": (batch, kv_heads, key_len, value_dim),
        "keep": (batch, keep_heads, query_len, key_len),
        "probability": (batch, heads, query_len, key_len),
        "output": (batch, heads, query_len, value_dim),
        GIVEN: (batch, heads, query_len, key_len),
    }
    for name in names[1:]:
        if tuple(tensors[name].shape) != expected[name]:
            shape = tuple(tensors[name].shape)
            return f"{name} is of shape {shape}, which does not fit the others: {expected[name]}"
    return ""


def _masker(name: str, params: dict[str, Any], files: dict[str, str]) -> Masker:
    cls = registry.maskers[_registered(name)]
    declared = {spec.name for spec in specs(cls)}
    defaults = {key: value for key, value in {**DEFAULTS, **files}.items() if key in declared}
    # A default of the case's format need not be declared; a parameter that is no default must be.
    stated = {k: v for k, v in params.items() if k in declared or DEFAULTS.get(k) != v}
    return from_plain(cls, {**defaults, **stated})


def _registered(name: str) -> str:
    return name.replace("_", "-")


def _unusable(name: str) -> str | None:
    """Why a masker cannot be used here; None if it can."""
    try:
        registry.maskers[name]
    except UnknownPluginError:
        return f"masker {name} is not installed"
    except _UNUSABLE as error:
        return str(error)
    return None


def _mask_difference(case: Case, mask: Mask, inputs: Inputs) -> str | None:
    actual = (mask & inputs.allowed).to_dense()
    expected = case.tensors["probability"] * case.tensors["keep"]
    wrong = (actual > 0) != (expected > 0)
    if bool(wrong.any()):
        rows = int(wrong.any(-1).sum())
        extra, missing = int((wrong & (actual > 0)).sum()), int((wrong & (expected > 0)).sum())
        where = _place(wrong)
        return (
            f"selection: {extra} keys too many, {missing} missing in {rows} rows, first at {where}"
        )
    error = (actual - expected).abs()
    if float(error.max()) > PROBABILITY_TOLERANCE:
        where = _place(error > PROBABILITY_TOLERANCE)
        return f"probability: off by up to {float(error.max()):.2g}, first at {where}"
    return None


def _output_difference(case: Case, output: Tensor) -> str | None:
    error = (output.transpose(1, 2).float() - case.tensors["output"]).abs()
    # Comparing this way round also finds NaN.
    wrong = ~(error <= OUTPUT_TOLERANCE)
    if bool(wrong.any()):
        return f"output: off by up to {float(error.max()):.2g}, first at {_place(wrong)}"
    return None


def _place(wrong: Tensor) -> str:
    sequence, head, row, _ = wrong.nonzero()[0].tolist()
    return f"sequence {sequence}, head {head}, row {row}"


def _not_a_case(path: Path, reason: str) -> RequestError:
    return RequestError(f"{str(path)!r} is no golden case: {reason}")
