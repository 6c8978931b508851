"""What a masker and a backend see of one attention call."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.ops import REFERENCE, Ops
from sah_core.parameters import Size
from sah_core.randomness import Random

Phase = Literal["prefill", "question", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "question", "decode")

WINDOW_QUERIES = 128
"""Query rows that `Inputs.window_queries` holds at most."""


@attrs.frozen
class Budget:
    """How many keys (or pages) a size means here.

    Attributes:
        capacity: Host bound, at most the keys of the buffer.
        count: Exact number per sequence, int32 ``(batch, 1, 1)``; None when it is ``capacity``
            everywhere.
    """

    capacity: int
    count: Tensor | None = None


@attrs.frozen(eq=False, slots=False, kw_only=True)
class Inputs:
    """One attention call, frozen. Nothing in here may be written to: key and value are the cache
    itself.

    Attributes:
        query: ``(batch, heads, query_len, head_dim)``, rotary embedding applied.
        key: ``(batch, kv_heads, key_len, head_dim)``; cached keys first, those of the queries last.
        value: ``(batch, kv_heads, key_len, value_dim)``.
        allowed: Who may be attended.
        scaling: Factor on ``q . k``.
        key_len: Valid keys, a host int; None under graph capture, where the key buffer is longer
            than that.
        length: Valid keys on the device, int32 ``(1,)``; made from ``key_len`` when not given.
        query_position: Key index of every query row, int32 ``(1, query_len)``; the queries are the
            last keys when not given.
        softcap: Gemma 2's logit cap, or None.
        sinks: Learned logit per query head that joins the softmax denominator (gpt-oss),
            ``(heads,)``, or None.
        layer: Layer index.
        layer_count: Layers in the model.
        layer_type: ``full_attention``, ``sliding_attention``, ...
        phase: ``prefill``, ``question`` or ``decode``.
        state: This masker's state of this layer, or None if it keeps none.
        request_state: Shared by the layers and steps of a request.
        ops: Scoring primitives.
        random: Counter-based random numbers of this step and layer.
        window_queries: The last query rows up to those of this call, or at the end of the prefill
            those of the context, at most `WINDOW_QUERIES`, ``(batch, heads, rows, head_dim)``; of
            a sequence with fewer tokens the first are padding. None unless the masker declares the
            need.
        hidden_states: Input of the layer; likewise. No session gives it yet, nor the next two.
        query_pre_rope: The queries before the rotary embedding.
        key_pre_rope: The keys before it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Allowed
    scaling: float
    key_len: int | None = None
    given_length: Tensor | None = attrs.field(default=None, alias="length")
    given_position: Tensor | None = attrs.field(default=None, alias="query_position")
    softcap: float | None = None
    sinks: Tensor | None = None
    layer: int = 0
    layer_count: int = 1
    layer_type: str = "full_attention"
    phase: Phase = "decode"
    state: Any = None
    request_state: dict[Any, Any] = attrs.field(factory=dict)
    ops: Ops = REFERENCE
    random: Random = Random()
    hidden_states: Tensor | None = None
    query_pre_rope: Tensor | None = None
    key_pre_rope: Tensor | None = None
    window_queries: Tensor | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def query_len(self) -> int:
        """Query rows."""
        return self.query.shape[2]

    @property
    def capacity(self) -> int:
        """Keys in the buffer; equal to ``key_len`` except under graph capture."""
        return self.key.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the masks of this call: ``(batch, heads, query_len, capacity)``."""
        return (self.batch, self.heads, self.query_len, self.capacity)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.query.device

    @cached_property
    def length(self) -> Tensor:
        """Valid keys on the device, int32 ``(1,)``.

        Raises:
            ValueError: If the call was made with neither ``key_len`` nor ``length``.
        """
        if self.given_length is not None:
            return self.given_length
        if self.key_len is None:
            raise ValueError("inputs need key_len or length")
        return torch.full((1,), self.key_len, dtype=torch.int32, device=self.device)

    @cached_property
    def query_position(self) -> Tensor:
        """Key index of every query row, int32 ``(1, query_len)``."""
        if self.given_position is not None:
            return self.given_position
        if self.query_len == 1 and self.key_len is None:
            return (self.length - 1).view(1, 1)
        row = torch.arange(self.query_len, dtype=torch.int32, device=self.device)
        if self.key_len is not None:
            return (row + (self.key_len - self.query_len)).view(1, -1)
        return (row + (self.length - self.query_len)).view(1, -1)

    def budget(self, size: Size, *, unit: int = 1, minimum: int = 0) -> Budget:
        """How many keys ``size`` means: tokens as given, fractions of the real keys rounded down.

        Real keys are the valid keys minus the left padding, so that a padded batch selects what
        each sequence alone selects. Under graph capture a fraction gives a capacity from the buffer
        and a count on the device, computed once for all layers.

        Args:
            size: Tokens or a fraction.
            unit: Keys per unit of the result: the budget in pages of ``unit`` keys, rounded down.
            minimum: Least units, as far as the buffer holds them.
        """
        there = -(-self.capacity // unit)

        def units(keys: int) -> int:
            return min(there, max(minimum, keys // unit))

        if size.fraction is None:
            return Budget(units(size.resolve(self.capacity)))
        if self.key_len is None:
            wanted = (size, unit, minimum)
            known = self.allowed.memo.get(wanted)
            if known is None:
                capacity = units(size.resolve(self.capacity))
                count = self.ops.share(
                    self.length,
                    self.allowed.first,
                    size.fraction,
                    divisor=unit,
                    minimum=minimum,
                    maximum=capacity,
                )
                known = self.allowed.memo[wanted] = Budget(capacity, count)
            return known
        real = (self.key_len - first for first in self.allowed.first_host)
        counts = [units(size.resolve(max(0, keys))) for keys in real]
        if len(set(counts)) == 1:
            return Budget(counts[0])
        count = torch.tensor(counts, dtype=torch.int32, device=self.device).view(-1, 1, 1)
        return Budget(max(counts), count)

    def with_ops(self, ops: Ops) -> Inputs:
        """The same call with other scoring primitives."""
        return self._but(ops=ops)

    def for_step(self, state: Any, random: Random) -> Inputs:
        """The same call as a masker with this state and these random numbers sees it."""
        return self._but(state=state, random=random)

    def _but(self, **fields: Any) -> Inputs:
        """A copy with other fields, none of which `length` and `query_position` depend on: what was
        computed of those stays, which `attrs.evolve` would lose at thrice the time.
        """
        made = object.__new__(Inputs)
        vars(made).update(vars(self), **fields)
        return made

    def rows(self, begin: int, end: int, step: int = 1) -> Inputs:
        """The same call for each ``step``-th query row from ``begin`` to ``end`` (exclusive); keys
        stay whole.
        """
        return attrs.evolve(
            self,
            query=self.query[:, :, begin:end:step],
            allowed=self.allowed.rows(begin, end, step),
            # positions belong to the rows of the whole call, not to the end of the keys
            query_position=self.query_position[:, begin:end:step],
        )

    def part(self, sequences: slice, kv_heads: slice) -> Inputs:
        """The same call for some sequences and KV heads with their query heads, given by the first
        and the last (exclusive); the state stays that of the whole call.
        """
        group = self.group
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        window = self.window_queries
        return self._but(
            query=self.query[sequences, heads],
            key=self.key[sequences, kv_heads],
            value=self.value[sequences, kv_heads],
            allowed=self.allowed.part(sequences, heads, self.heads),
            sinks=None if self.sinks is None else self.sinks[heads],
            window_queries=None if window is None else window[sequences, heads],
        )
