"""Calls that tests of maskers make, and statistics of the samplers among them."""

import attrs
import pytest
import torch

from sah_core import Allowed, Inputs, Mask
from sah_core.attention import build_mask, layer_info
from sah_core.randomness import Random


def make_inputs(
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    query_len=3,
    key_len=20,
    head_dim=8,
    first=None,
    keep_heads=0,
    dtype=torch.float32,
    **more,
):
    """A call on random tensors; with ``keep_heads`` its limits are a foreign mask."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, heads, query_len, head_dim, generator=generator)
    key = torch.randn(batch, kv_heads, key_len, head_dim, generator=generator)
    value = torch.randn(batch, kv_heads, key_len, head_dim, generator=generator)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    allowed = Allowed.causal(query_len, key_len, first=first)
    if keep_heads:
        keep = torch.rand(batch, keep_heads, query_len, key_len, generator=generator) < 0.5
        allowed = Allowed.from_dense(keep & allowed.to_dense(key_len))
    given = {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "value": value.to(dtype),
        "allowed": allowed,
        "scaling": 0.4,
        "key_len": key_len,
    }
    return Inputs(**(given | more))


def tiny(query_len=1, *, heads=4, kv_heads=2, key_len=61, layer=1, first=None, **more):
    """A call of one of two layers with 8 channels, whose values are its keys."""
    torch.manual_seed(layer)
    first = None if first is None else torch.tensor(first, dtype=torch.int32)
    batch = 1 if first is None else len(first)
    key = torch.randn(batch, kv_heads, key_len, 8)
    return Inputs(
        query=torch.randn(batch, heads, query_len, 8),
        key=key,
        value=key,
        allowed=Allowed.causal(query_len, key_len, first=first),
        scaling=0.3,
        key_len=key_len,
        layer=layer,
        layer_count=2,
        **more,
    )


def with_state(masker, inputs, *, chunks=None):
    """The call with a state that has seen its keys, all at once or in chunks of some sizes."""
    state = masker.init_state(layer_info(inputs))
    start = 0
    for size in chunks or [inputs.key_len]:
        part = inputs.key[:, :, start : start + size]
        masker.append(state, part, part, start)
        start += size
    return attrs.evolve(inputs, state=state)


def chosen(masker, inputs):
    """Which allowed keys a masker selects by itself."""
    mask = masker.add_mask(inputs, Mask.empty(inputs.shape))
    return (mask & inputs.allowed).to_dense() > 0


def captured(inputs, room=5):
    """The same call as inside a graph capture: a longer buffer, and the length on the device."""
    extra = torch.full_like(inputs.key[:, :, :1], 99.0).expand(-1, -1, room, -1)
    return attrs.evolve(
        inputs,
        key=torch.cat([inputs.key, extra], 2),
        value=torch.cat([inputs.value, extra], 2),
        key_len=None,
        length=inputs.length,
    )


def previous_mask(kind, inputs):
    """What earlier steps may have selected."""
    from sah_core import KeyRange

    generator = torch.Generator().manual_seed(9)
    position = inputs.query_position.unsqueeze(1)
    first = inputs.allowed.first.view(-1, 1, 1)
    ranges = Mask.from_ranges(
        inputs.shape,
        [
            KeyRange(first, first, 2, stop_offset=2),
            KeyRange(position, position, 3, start_offset=-2, stop_offset=1),
        ],
    )
    keys = torch.rand(1, inputs.kv_heads, 1, inputs.capacity, generator=generator)
    keys = keys.argsort(-1)[..., :2].int()
    dense = torch.rand(inputs.shape, generator=generator)
    return {
        "empty": Mask.empty(inputs.shape),
        "ranges": ranges,
        "keys": Mask.from_indices(inputs.shape, keys),
        "both": ranges | Mask.from_indices(inputs.shape, keys),
        "pages": ranges
        | Mask.from_indices(
            inputs.shape,
            torch.zeros(1, 1, 1, 1).int(),
            page_size=4,
            origin=inputs.allowed.first,
        ),
        "dense": Mask.from_dense(dense * (dense < 0.3)),
    }[kind]


def effective(mask, inputs):
    """The probability of every key that may be attended."""
    return mask.to_dense() * inputs.allowed.to_dense(inputs.capacity)


class Draws:
    """Many independent draws of a sampler from one attention row: rows and heads of one call.

    Attributes:
        logits: float64 ``(key_len,)``.
        value: float64 ``(key_len, value_dim)``.
        probability: Of every draw and key, float64 ``(draws, key_len)``, 0 where not drawn.
    """

    def __init__(self, steps, logits, *, draws=20_000, heads=20, value_dim=3, seed=0):
        key_len = logits.shape[0]
        generator = torch.Generator().manual_seed(seed)
        key = torch.zeros(1, 1, key_len, 2)
        key[0, 0, :, 0] = logits.float()
        query = torch.zeros(1, heads, draws // heads, 2)
        query[..., 0] = 1.0
        value = torch.randn(1, 1, key_len, value_dim, generator=generator) + 0.5
        inputs = Inputs(
            query=query,
            key=key,
            value=value,
            allowed=Allowed.everything(key_len),
            scaling=1.0,
            key_len=key_len,
            random=Random(seed=seed),
        )
        mask = build_mask(steps, inputs, seed=seed)
        self.logits, self.value = logits.double(), value[0, 0].double()
        self.probability = mask.to_dense().double().view(-1, key_len)
        self.weight = self.logits.exp()

    @property
    def included(self):
        return self.probability > 0

    def denominators(self):
        """The estimate of each draw, float64 ``(draws,)``."""
        return self.factors() @ self.weight

    def numerators(self):
        return self.factors() @ (self.weight.unsqueeze(1) * self.value)

    def factors(self):
        return torch.where(self.included, 1 / self.probability.clamp(min=1e-300), 0.0)

    def check_unbiased(self):
        """Means lie within 4 standard errors of the exact sums."""
        for found, exact in (
            (self.denominators().unsqueeze(1), self.weight.sum()),
            (self.numerators(), self.weight @ self.value),
        ):
            error = found.std(0) / found.shape[0] ** 0.5
            assert ((found.mean(0) - exact).abs() <= 4 * error + 1e-9).all()


@pytest.fixture(scope="session")
def calls():
    """What this module defines, as attributes of one object."""

    class Calls:
        make = staticmethod(make_inputs)
        tiny = staticmethod(tiny)
        with_state = staticmethod(with_state)
        chosen = staticmethod(chosen)
        captured = staticmethod(captured)
        previous = staticmethod(previous_mask)
        effective = staticmethod(effective)

    Calls.Draws = Draws
    return Calls
