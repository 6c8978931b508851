"""The calls that the checks make: small random tensors, which go through the `Session` that a model
goes through, without a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.attention import Session
from sah_core.errors import UnsupportedError
from sah_core.inputs import Inputs, Phase
from sah_core.mask import KeyRange, Mask
from sah_core.masker import Masker
from sah_core.ops import REFERENCE, Ops
from sah_core.pipeline import Pipeline


@attrs.frozen(kw_only=True)
class Model:
    """The numbers of a model, which an artefact must fit.

    Attributes:
        layers: Layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Channels of a query, a key and a value.
        hidden: Channels of a layer's input.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


MODEL = Model(layers=4, heads=4, kv_heads=2, head_dim=16, hidden=24)
"""What most calls of the checks look like; some have other numbers of heads."""


SEED = 5


TOLERANCE = 1e-6


@attrs.frozen(kw_only=True)
class Given(Masker):
    """Stands for earlier steps: a literal mask, cut to the call."""

    name: ClassVar[str] = "given"

    make: Callable[[Inputs], Mask]

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Return the literal mask, whatever came before."""
        return self.make(inputs)


@attrs.frozen(kw_only=True)
class Idle(Masker):
    """Takes up a place in the pipeline, on which random numbers depend, and does nothing."""

    name: ClassVar[str] = "idle"

    def add_mask(self, inputs: Inputs, previous: Mask) -> Mask:
        """Return what came before."""
        return previous


@attrs.frozen(kw_only=True, eq=False)
class Tokens:
    """Random queries, keys and values of whole sequences.

    Attributes:
        query: ``(batch, heads, length, head_dim)``; in memory the heads of a token lie together,
            as a model's projection leaves them.
        key: ``(batch, kv_heads, length, head_dim)``.
        value: ``(batch, kv_heads, length, value_dim)``.
        hidden: ``(batch, length, channels)``.
        first: First real key per sequence, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    first: Tensor | None = None

    @classmethod
    def random(
        cls,
        length: int,
        *,
        batch: int = 1,
        heads: int = MODEL.heads,
        kv_heads: int = MODEL.kv_heads,
        value_dim: int = MODEL.head_dim,
        seed: int = 0,
        first: Sequence[int] | None = None,
    ) -> Tokens:
        """Draw sequences of one length."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return cls(
            query=draw(batch, length, heads, MODEL.head_dim).transpose(1, 2) * 2,
            key=draw(batch, kv_heads, length, MODEL.head_dim),
            value=draw(batch, kv_heads, length, value_dim),
            hidden=draw(batch, length, MODEL.hidden),
            first=None if first is None else torch.tensor(first, dtype=torch.int32),
        )

    def through(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same sequences in another place or type."""
        query, key, value, hidden = map(change, self.tensors())
        first = self.first if self.first is None else change(self.first)
        return attrs.evolve(self, query=query, key=key, value=value, hidden=hidden, first=first)

    @property
    def length(self) -> int:
        """Tokens per sequence, padding included."""
        return self.key.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value and hidden states."""
        return self.query, self.key, self.value, self.hidden

    def followed_by(self, other: Tokens, length: int, factor: float = 1.0) -> Tokens:
        """The first ``length`` tokens, then those of another sequence, times a factor."""
        query, key, value, hidden = (
            torch.cat(
                [a.narrow(d, 0, length), b.narrow(d, length, b.shape[d] - length) * factor], d
            )
            for a, b, d in zip(self.tensors(), other.tensors(), (2, 2, 2, 1), strict=True)
        )
        return attrs.evolve(self, query=query, key=key, value=value, hidden=hidden)

    def with_keys(self, where: Tensor, factor: float) -> Tokens:
        """The same with some numbers of the keys, and their values, times a factor."""
        key = torch.where(where, self.key * factor, self.key)
        return attrs.evolve(
            self, key=key, value=torch.where(where, self.value * factor, self.value)
        )

    def taken(self, rows: Tensor) -> Tokens:
        """The sequences in another order, some of them several times."""
        return self.through(lambda tensor: tensor.index_select(0, rows))

    def sequence(self, index: int, padding: int) -> Tokens:
        """One sequence of the batch without its padding."""
        query, key, value, hidden = (
            t[index : index + 1].narrow(d, padding, self.length - padding)
            for t, d in zip(self.tensors(), (2, 2, 2, 1), strict=True)
        )
        return Tokens(query=query, key=key, value=value, hidden=hidden)


def nothing(inputs: Inputs) -> Mask:
    """Nothing selected before."""
    return Mask.empty(inputs.shape)


def everything(inputs: Inputs) -> Mask:
    """Everything selected before, from which a step that prunes removes."""
    return Mask.full(inputs.shape)


class Run:
    """A masker in a running request, its mask the only thing that is looked at.

    What earlier steps selected is nothing unless it is said, or everything for a step that prunes,
    which of nothing would leave nothing whatever its state.
    """

    def __init__(
        self,
        masker: Masker,
        tokens: Tokens,
        previous: Callable[[Inputs], Mask] | None = None,
        *,
        behind: Sequence[Masker] = (),
        then: Sequence[Masker] = (),
        seed: int = SEED,
        ops: Ops = REFERENCE,
    ) -> None:
        self.masker = masker
        self.tokens = tokens
        self.ops = ops
        if previous is None:
            previous = everything if masker.capabilities.prunes else nothing
        steps = (Given(make=previous), *behind, masker, *then)
        pipeline = Pipeline.of(*steps, prefill="sparse", seed=seed)
        self.session = Session(pipeline, ["full_attention"] * MODEL.layers)

    def inputs(
        self, begin: int, end: int, phase: Phase, layer: int, allowed: Allowed | None
    ) -> Inputs:
        """The call of query rows ``begin`` to ``end`` over the keys before ``end``."""
        tokens, needs = self.tokens, self.masker.capabilities.needs
        rows = tokens.query[:, :, begin:end]
        limits = Allowed.causal(end - begin, end, first=tokens.first, device=tokens.key.device)

        def needed(name: str, tensor: Tensor) -> Tensor | None:
            return tensor if name in needs else None

        return Inputs(
            query=rows,
            key=tokens.key[:, :, :end],
            value=tokens.value[:, :, :end],
            allowed=limits if allowed is None else allowed,
            scaling=0.25,
            key_len=end,
            layer=layer,
            layer_count=MODEL.layers,
            phase=phase,
            request_state=self.session.request_state,
            ops=self.ops,
            hidden_states=needed("hidden_states", tokens.hidden[:, begin:end]),
            query_pre_rope=needed("query_pre_rope", rows),
            key_pre_rope=needed("key_pre_rope", tokens.key[:, :, :end]),
        )

    def call(
        self,
        begin: int,
        end: int,
        phase: Phase,
        *,
        layer: int = 0,
        allowed: Allowed | None = None,
    ) -> tuple[Mask, Inputs]:
        """One attention call, up to its mask."""
        inputs = self.inputs(begin, end, phase, layer, allowed)
        states = self.session.advance(inputs)
        inputs = self.session.remember(inputs)
        mask = self.session.mask_for(inputs, states)
        self._attended(inputs, mask)
        return mask, inputs

    def captured(self, end: int, room: int) -> tuple[Mask, Inputs]:
        """A decode step whose lengths are on the device, in a key buffer with more room."""
        known = self.inputs(end - 1, end, "decode", 0, None)
        tokens = self.tokens
        length = torch.full((1,), end, dtype=torch.int32, device=tokens.key.device)
        first = known.allowed.first
        limits = Allowed(first.view(-1, 1, 1), length.view(1, 1, 1), first)
        keys = tokens.key[:, :, : end + room]
        inputs = attrs.evolve(
            known,
            key=keys,
            value=tokens.value[:, :, : end + room],
            allowed=limits,
            key_len=None,
            length=length,
            query_position=None,
            key_pre_rope=None if known.key_pre_rope is None else keys,
        )
        states = self.session.advance(inputs)
        mask = self.session.mask_for(inputs, states)
        self._attended(inputs, mask)
        return mask, inputs

    def _attended(self, inputs: Inputs, mask: Mask) -> None:
        """Tell the maskers that ask for it of the attention that the mask gives."""
        if self.session.listens:
            needed = "lse" in self.masker.capabilities.needs
            self.session.attended(inputs, mask, log_sum_exp(inputs, mask) if needed else None)

    def context(self, end: int, chunks: Sequence[int] = (), *, layer: int = 0) -> None:
        """Show the masker a context, at once or in chunks of keys."""
        begin = 0
        for size in chunks or (end,):
            if size:
                inputs = self.inputs(begin, begin + size, "prefill", layer, None)
                self.session.advance(inputs)
                self.session.remember(inputs)
            begin += size

    def question(self, begin: int, end: int, *, layer: int = 0) -> tuple[Mask, Inputs]:
        """The call of a question, or of a generated token, after its context."""
        return self.call(begin, end, "question" if end > begin + 1 else "decode", layer=layer)


@attrs.frozen(kw_only=True)
class Shape:
    """A kind of call."""

    title: str
    length: int
    rows: int
    batch: int = 1
    heads: int = MODEL.heads
    kv_heads: int = MODEL.kv_heads
    value_dim: int = MODEL.head_dim
    first: tuple[int, ...] | None = None

    def tokens(self) -> Tokens:
        """Sequences for such a call."""
        tokens = Tokens.random(
            self.length,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            value_dim=self.value_dim,
        )
        if self.first is None:
            return tokens
        return attrs.evolve(tokens, first=torch.tensor(self.first, dtype=torch.int32))

    def run(
        self, masker: Masker, previous: Callable[[Inputs], Mask] | None = None
    ) -> tuple[Mask, Inputs]:
        """The mask of the call after its context, and the call."""
        run = Run(masker, self.tokens(), previous)
        begin = self.length - self.rows
        if not begin:
            return run.call(0, self.length, "prefill")
        run.context(begin)
        return run.question(begin, self.length)


SHAPES = (
    Shape(title="one query row", length=203, rows=1),
    Shape(title="several query rows", length=203, rows=5),
    Shape(title="a prefill", length=61, rows=61),
    Shape(title="as many KV heads as query heads", length=203, rows=2, kv_heads=4),
    Shape(title="one KV head", length=203, rows=1, heads=6, kv_heads=1),
    Shape(title="values of another size than keys", length=203, rows=2, value_dim=20),
    Shape(title="a left-padded batch", length=203, rows=3, batch=2, first=(0, 58)),
    Shape(title="a sequence that is nearly all padding", length=90, rows=1, batch=2, first=(88, 0)),
)


SHORT = (
    Shape(title="one key", length=1, rows=1),
    Shape(title="two keys", length=2, rows=1),
    Shape(title="three keys and two rows", length=3, rows=2),
    Shape(title="seven keys", length=7, rows=1, batch=2, first=(0, 5)),
)


def fits(masker: Masker, heads: int, kv_heads: int) -> bool:
    """Whether the masker takes calls with these numbers of heads: an artefact fits one model."""
    if (heads, kv_heads) == (MODEL.heads, MODEL.kv_heads):
        return True
    try:
        Shape(title="a try", length=40, rows=1, heads=heads, kv_heads=kv_heads).run(masker)
    except UnsupportedError:
        return False
    except Exception:  # the check proper reports what a masker under test raises
        return True
    return True


def shapes(masker: Masker) -> tuple[Shape, ...]:
    """The kinds of calls that the masker takes."""
    return tuple(shape for shape in SHAPES if fits(masker, shape.heads, shape.kv_heads))


def effective(mask: Mask, inputs: Inputs) -> Tensor:
    """The probability of every key that may be attended."""
    return mask.to_dense() * inputs.allowed.to_dense(inputs.capacity)


def log_sum_exp(inputs: Inputs, mask: Mask) -> Tensor:
    """The logarithm of the weights' sum of every row, ``(batch, heads, query_len)``."""
    key = inputs.key.float().repeat_interleave(inputs.group, dim=1)
    logits = inputs.query.float() @ key.mT * inputs.scaling
    chance = effective(mask, inputs)
    return (logits - chance.log()).masked_fill(chance == 0, float("-inf")).logsumexp(-1)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE).all())


def earlier_masks() -> Iterator[tuple[str, Callable[[Inputs], Mask]]]:
    """Selections that earlier steps may have made, in every form."""

    def indices(inputs: Inputs) -> Tensor:
        first = inputs.allowed.first.view(-1, 1, 1, 1)
        steps = torch.arange(0, 9, 4, dtype=torch.int32)
        return (first + steps).clamp(max=inputs.capacity - 1)[..., : inputs.capacity]

    def ranges(inputs: Inputs) -> Mask:
        position = inputs.query_position.unsqueeze(1)
        window = KeyRange(position, position, 3, start_offset=-2, stop_offset=1)
        return Mask.from_ranges(inputs.shape, [window])

    def keys(inputs: Inputs) -> Mask:
        chosen = indices(inputs)
        chosen = chosen.expand(-1, inputs.kv_heads, inputs.query_len, -1)
        first_of_each = torch.ones_like(chosen, dtype=torch.bool)
        first_of_each[..., 1:] = chosen[..., 1:] != chosen[..., :-1]
        return Mask.from_indices(inputs.shape, chosen.masked_fill(~first_of_each, -1))

    def sampled(inputs: Inputs) -> Mask:
        mask = keys(inputs)
        assert mask.selected is not None
        chance = torch.full(mask.selected.indices.shape, 0.25)
        return Mask.from_indices(inputs.shape, mask.selected.indices, probability=chance)

    def dense(inputs: Inputs) -> Mask:
        return Mask.from_dense(keys(inputs).to_dense() * 0.5, inputs.shape)

    yield "a range", ranges
    yield "keys by index", keys
    yield "sampled keys", sampled
    yield "a range and sampled keys", lambda inputs: ranges(inputs) | sampled(inputs)
    yield "a dense mask", dense


def tensors_of(mask: Mask) -> list[Tensor]:
    """Every tensor that a mask holds."""
    tensors = [t for part in mask.ranges for t in (part.start_base, part.stop_base)]
    if mask.selected is not None:
        selected = mask.selected
        parts = (selected.indices, selected.count, selected.probability, selected.origin)
        tensors += [t for t in parts if t is not None]
    return tensors if mask.dense is None else [*tensors, mask.dense]
