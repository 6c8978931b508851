"""Greedy decoding with every length on the device, replayed as one CUDA graph per token.

A decode step of a small batch is hundreds of short kernels, and launching them from Python takes
longer than running them. Here the whole step of the model (attention with the pipeline, state
upkeep, cache writes, the choice of the next token, the advance of all lengths) is captured once and
replayed; windows, page counts and fractions follow the growing length, because they are computed
from it on the device. Where there is no CUDA device the same step runs uncaptured, which is how it
is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sah_core import UnsupportedError, compat
from sah_core.attention import Session
from sah_core.patching import use

WARM_UP = 3
"""Uncaptured steps before the capture, which compile kernels and fill allocator pools."""


class CapturedDecode:
    """A loop of greedy decode steps.

    Args:
        model: A transformers causal language model.
        session: A session whose states know everything in the cache. It belongs to the loop from
            now on.
        kv_cache: A cache made by `sah_core.compat.make_cache`.
        token: The token to feed first, int64 ``(batch, 1)``; it is not in the cache yet.
        room: Most tokens that the loop will be asked for.
        first: First real key per sequence, int32 ``(batch,)``; None without left padding.

    Raises:
        UnsupportedError: If the pipeline or the model cannot be captured: observers, a selection
            without a bound, a cache layer that is not preallocated.
    """

    def __init__(
        self,
        model: Any,
        session: Session,
        kv_cache: Any,
        token: Tensor,
        *,
        room: int = 256,
        first: Tensor | None = None,
    ) -> None:
        if session.hook is not None:
            raise UnsupportedError(
                what="observers in captured decoding", reason="they run on the host"
            )
        for step in session.pipeline.steps:
            if step.capabilities.unbounded and getattr(step, "max_size", None) is None:
                raise UnsupportedError(
                    what=f"masker {step.name!r} in captured decoding",
                    reason="its selection has no bound that the host knows; give it a max_size",
                )
            if "window_queries" in step.capabilities.needs:
                raise UnsupportedError(
                    what=f"masker {step.name!r} in captured decoding",
                    reason="it needs window_queries, whose number grows with the steps",
                )
        self.model, self.session, self.kv_cache = model, session, kv_cache
        self.capture = compat.Capture(kv_cache, token.shape[0], room + WARM_UP + 1, first)
        self.token = token.clone()
        self.room = room
        self.made = torch.zeros((token.shape[0], room), dtype=torch.int64, device=token.device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=token.device)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._cache_argument = compat.cache_argument(type(model).forward)
        session.length = self.capture.length
        session.phase = "decode"
        if token.device.type == "cuda":
            self._record()

    @torch.no_grad()
    def _record(self) -> None:
        side = torch.cuda.Stream(self.token.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                # without advancing, a step writes the same keys to the same place again
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._advance(self._forward())

    def _forward(self) -> Tensor:
        self.session.forget_pass()
        with use(self.model, self.session, always=True), self.capture.running():
            output = self.model(
                input_ids=self.token,
                position_ids=self.capture.position_ids(),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: self.kv_cache},
            )
        chosen: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return chosen

    def _advance(self, chosen: Tensor) -> None:
        self.token.copy_(chosen)
        self.made.index_copy_(1, self.slot, chosen)
        self.slot += 1
        self.capture.advance()

    @torch.no_grad()
    def step(self) -> None:
        """Make one more token per sequence; nothing waits for the device.

        Raises:
            UnsupportedError: If there is no more room.
        """
        if self.steps >= self.room:
            raise UnsupportedError(
                what=f"captured decoding of more than {self.room} tokens",
                reason="its buffers are full; make it with more room",
            )
        if self.graph is not None:
            self.graph.replay()
        else:
            self._advance(self._forward())
        self.steps += 1

    def generate(
        self, max_new_tokens: int, eos: Sequence[int] = (), look_every: int = 16
    ) -> list[tuple[int, ...]]:
        """Decode greedily.

        Args:
            max_new_tokens: Tokens to make, at most; those made before count.
            eos: Tokens that end a sequence.
            look_every: Steps between two looks at the device for sequences that ended.

        Returns:
            The new tokens of every sequence, an ending EOS included.
        """
        while self.steps < max_new_tokens:
            self.step()
            if eos and self.steps % look_every == 0 and all(ends(r, eos) for r in self.rows()):
                break
        return [row[: until(row, eos)] for row in self.rows()]

    def rows(self) -> list[tuple[int, ...]]:
        """The tokens made so far; waits for the device."""
        return [tuple(row) for row in self.made[:, : self.steps].tolist()]


def ends(row: Sequence[int], eos: Sequence[int]) -> bool:
    """Whether a sequence holds an ending token."""
    return any(token in eos for token in row)


def until(row: Sequence[int], eos: Sequence[int]) -> int:
    """Length of a sequence up to and including its first ending token."""
    for index, token in enumerate(row):
        if token in eos:
            return index + 1
    return len(row)
