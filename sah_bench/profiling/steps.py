"""Eager decode steps, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sah_core import Allowed, Inputs, compat
from sah_core.attention import Session, Snapshot
from sah_core.patching import use

from .made_up import MadeUpContext
from .timing import graph_of, graph_timer

if TYPE_CHECKING:
    from .decode import DecodePlan


class Steps:
    """Eager decode steps of one pipeline on a made-up context."""

    def __init__(
        self, adapter: Any, plan: DecodePlan, context: MadeUpContext, session: Session | None
    ) -> None:
        self.model = adapter.model
        self.plan = plan
        self.context = context
        self.session = session
        self.argument = compat.cache_argument(type(self.model).forward)
        self.before: Snapshot | None = None
        if session is not None:
            compat.restore_cache(context.cache, context.base)
            session.end_prefill(dict(self._layers()))
            self.before = session.snapshot()

    def _layers(self) -> Iterator[tuple[int, Inputs]]:
        types = compat.layer_types(self.model)
        heads = int(compat.text_config(self.model).num_attention_heads)
        for layer, key, value in compat.cached_tensors(self.context.cache):
            if types[layer] != "full_attention":
                continue
            yield (
                layer,
                Inputs(
                    query=key.new_empty((key.shape[0], heads, 0, key.shape[3])),
                    key=key,
                    value=value,
                    allowed=Allowed.causal(0, key.shape[2], device=key.device),
                    scaling=key.shape[3] ** -0.5,
                    key_len=key.shape[2],
                    layer=layer,
                    layer_count=len(types),
                    layer_type=types[layer],
                    phase="prefill",
                ),
            )

    def fixed_graph(self) -> Callable[[], float]:
        """A timer of a graph of one step whose length stays that of the context.

        Dense attention over a length that the device alone knows needs a mask, which torch's
        fastest kernels refuse; this is what the fastest of them take.

        Raises:
            UnsupportedError: If the step waits for the device.
        """
        token = torch.zeros((self.plan.batch, 1), dtype=torch.long, device=self.plan.device)

        def step() -> Any:
            compat.restore_cache(self.context.cache, self.context.base)
            return self._step(token)

        with self._patched(self.session):
            return graph_timer(graph_of(step, 1), 1)

    def _patched(self, session: Session | None) -> AbstractContextManager[Any]:
        return nullcontext() if session is None else use(self.model, session, always=True)

    def run(self, count: int, session: Session | None = None) -> float:
        """Decode so many tokens from the end of the context; returns seconds per step."""
        compat.restore_cache(self.context.cache, self.context.base)
        session = session or self.session
        if self.session is not None and self.before is not None:
            self.session.restore(self.before)
        if session is not None:
            session.phase = "decode"
        token = torch.zeros((self.plan.batch, 1), dtype=torch.long, device=self.plan.device)
        with self._patched(session):
            begin = now(self.plan.device)
            for _ in range(count):
                token = self._step(token)
            return (now(self.plan.device) - begin) / count

    def _step(self, token: Tensor) -> Any:
        output = self.model(
            input_ids=token,
            use_cache=True,
            logits_to_keep=1,
            **{self.argument: self.context.cache},
        )
        return output.logits[:, -1:].argmax(-1)


def now(device: torch.device) -> float:
    """The clock once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
