"""The ways to compute one attention call: every dense form of torch, and pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sah_core import Allowed, Inputs, Mask, Pipeline, hookimpl, registry
from sah_core.attention import Session, with_step
from sah_core.errors import UnsupportedError
from sah_core.inputs import Phase

from .shapes import Call, Shape
from .traffic import Traffic, traffic_of

Function = Callable[[], object]

SCORE_BYTES = 2**30
"""Dense forms that hold every score, or copies of the cache, are left out where these take more."""

LAYERS = 1024
"""Layers of the model that a call is one of: more than any has, so that every artefact fits it."""

KERNELS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@attrs.frozen(eq=False)
class DenseForm:
    """A dense form of torch.

    Attributes:
        name: What the table shows.
        eager: The call; attends every key, also those after a query row, which is never slower.
    """

    name: str
    eager: Function

    @property
    def captured(self) -> Function:
        """What a CUDA graph captures."""
        return self.eager


def dense_forms(call: Call, shape: Shape) -> Iterator[DenseForm]:
    """Every dense form, those included that will refuse the call."""
    scores = 4 * shape.batch * shape.heads * shape.query_len * shape.keys
    for name, kernel in KERNELS.items():
        for by_rows in (False, True):
            # the kernel `math` repeats the cache for the heads of a group
            copies = 1 if by_rows else shape.heads // shape.kv_heads
            held = max(scores, copies * shape.kv_bytes)
            if kernel is not SDPBackend.MATH or held <= SCORE_BYTES:
                form = "group as rows" if by_rows else "gqa"
                yield DenseForm(f"dense: sdpa {name}, {form}", sdpa(call, kernel, by_rows=by_rows))
    if scores <= SCORE_BYTES:

        def matmul() -> Tensor:
            logits = call.grouped @ call.key.transpose(2, 3) * call.scaling
            return logits.softmax(-1) @ call.value

        yield DenseForm("dense: matmul, group as rows", matmul)


def sdpa(call: Call, kernel: SDPBackend | None, *, by_rows: bool) -> Function:
    """A call of torch's fused attention on one of its kernels."""
    query = call.grouped if by_rows else call.query
    shared = not by_rows and call.query.shape[1] != call.key.shape[1]

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, call.key, call.value, enable_gqa=shared)

    if kernel is None:
        return attend

    def on_kernel() -> Tensor:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a kernel refuses comes as warnings
            return attend()

    return on_kernel


class PipelineForm:
    """Selection and attention of a pipeline.

    The states see the context once; every call then appends the last keys, chooses and attends,
    from the same point again and again. The call plays the first layer that the pipeline runs
    sparse.

    Args:
        text: The pipeline as it was asked for.
        pipeline: What it means.
        backend: Name of the backend to ask for.
        call: The tensors.

    Raises:
        UnsupportedError: If the pipeline runs no layer of such a call sparse.
    """

    def __init__(self, text: str, pipeline: Pipeline, backend: str, call: Call) -> None:
        self.name = text
        self.pipeline = pipeline
        self.backend = backend
        self.call = call
        self.query_len, self.keys = call.query.shape[2], call.key.shape[2]
        self.device = call.query.device
        self.phase: Phase = "decode" if self.query_len == 1 else "question"
        self.layer = self._sparse_layer()
        self.session = self._session()
        self.session.end_prefill({self.layer: self._context()})
        self.before = self.session.snapshot()
        self.length = torch.full((1,), self.keys, dtype=torch.int32, device=self.device)
        self.first = torch.zeros(1, dtype=torch.int32, device=self.device)

    def _sparse_layer(self) -> int:
        if self.pipeline.is_dense:
            return 0
        for layer in range(LAYERS):
            if self.pipeline.is_sparse(layer, "full_attention", self.phase):
                return layer
        raise UnsupportedError(
            what=f"profiling {self.name!r}",
            reason=f"it runs no layer of full attention sparse in a {self.phase} call",
        )

    def _session(self, *observers: object) -> Session:
        layers = ("full_attention",) * LAYERS
        session = Session(self.pipeline, layers, backend=self.backend, observers=observers)
        session.phase = self.phase
        return session

    def _context(self) -> Inputs:
        context = self.keys - self.query_len
        return Inputs(
            layer=self.layer,
            layer_count=LAYERS,
            query=self.call.query[:, :, :0],
            key=self.call.key[:, :, :context],
            value=self.call.value[:, :, :context],
            allowed=Allowed.causal(0, context, device=self.device),
            scaling=self.call.scaling,
            key_len=context,
        )

    def eager(self, session: Session | None = None) -> Tensor:
        """One call whose lengths the host knows."""
        self.session.restore(self.before)
        self.session.length = None
        allowed = Allowed.causal(self.query_len, self.keys, device=self.device)
        return self._attend(session or self.session, allowed)

    @property
    def captured(self) -> Function:
        """What a CUDA graph captures: lengths on the device, but for calls of several rows, whose
        states take new keys from the host only.
        """
        return self.eager if self.query_len > 1 else self._captured

    def _captured(self) -> Tensor:
        self.session.length = self.length
        allowed = Allowed(self.first.view(1, 1, 1), self.length.view(1, 1, 1), self.first)
        return self._attend(self.session, allowed)

    def _attend(self, session: Session, allowed: Allowed) -> Tensor:
        call = self.call
        return session.attend(self.layer, call.query, call.key, call.value, allowed, call.scaling)

    def probe(self) -> Probe:
        """Run once and look at the mask."""
        probe = Probe(self.session)
        watched = self._session(probe)
        watched.layers, watched.request_state = self.session.layers, self.session.request_state
        self.eager(watched)
        for fallback in watched.fallbacks:
            probe.fallback = f"{fallback.requested} refuses: {fallback.reason}"
        return probe


class Probe:
    """An observer that notes what an attention call selected and who ran it.

    Attributes:
        traffic: Bytes that had to move, over all calls seen.
        selected: Selected pairs of query row and key.
        allowed: Allowed ones.
        backends: Names of the backends that ran.
        fallback: Why the backend asked for did not run; empty if it did.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.traffic = Traffic()
        self.selected = self.allowed = 0
        self.backends: set[str] = set()
        self.fallback = ""

    @hookimpl
    def sah_attention_computed(self, inputs: Inputs, mask: Mask, backend: str) -> None:
        """Add up one call."""
        self.backends.add(backend)
        steps = self.pipeline_steps(inputs)
        self.traffic += traffic_of(inputs, mask, steps)
        chosen, total = mask.counts(inputs.allowed)
        rows = mask.shape[:3]
        self.selected += int(chosen.expand(rows).sum())
        self.allowed += int(total.expand(rows).sum())

    def pipeline_steps(self, inputs: Inputs) -> list[tuple[Any, Inputs]]:
        """The maskers that ran, each with the call as it saw it; none where the call was dense."""
        pipeline = self.session.pipeline
        if not pipeline.is_sparse(inputs.layer, inputs.layer_type, inputs.phase):
            return []
        kept = self.session.layers.get(inputs.layer)
        states = {} if kept is None else kept.states
        return [
            (masker, with_step(inputs, index, states.get(index), pipeline.seed))
            for index, masker in enumerate(pipeline.steps)
        ]

    @property
    def density(self) -> float:
        """Selected over allowed."""
        return self.selected / self.allowed if self.allowed else 0.0

    @property
    def saving(self) -> str:
        """``realised`` if no backend reads what is not selected, else ``simulated``; ``baseline``
        for the pipeline that selects nothing.
        """
        if self.session.pipeline.is_dense:
            return "baseline"
        real = all(registry.backends[name].realised for name in self.backends)
        return "realised" if real else "simulated"
