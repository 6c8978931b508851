"""Checks of what a masker costs: waiting for the device, memory, the budget it promises."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.masker import Masker
from sah_core.parameters import Size, specs

from .calls import Run, Tokens, effective, same, tensors_of
from .simulated import DEVICE, Simulated, far, near
from .verdict import require, skip

ROOM = 40
"""Keys that the buffer of a captured decode step holds beyond the valid ones."""

BYTES_PER_KEY = 32
"""What a mask may hold per selected key: an index and a probability, four times over."""

BYTES_FREE = 2048
"""What a mask may hold whatever it selects: limits, counts."""

MAX_SIZE = 24
"""Keys to which a selection without a bound is held where the host must know one."""

SHORT_KEYS, LONG_KEYS = 256, 1024


def bounded_form(masker: Masker) -> Masker | None:
    """The masker itself where the host knows a bound of what it selects, else the same with a
    ``max_size``; None for one that has no such parameter.
    """
    if not masker.capabilities.unbounded or getattr(masker, "max_size", None) is not None:
        return masker
    if not any(spec.name == "max_size" and spec.type is Size for spec in specs(type(masker))):
        return None
    plain: Any = masker  # not every masker has the field
    bounded: Masker = attrs.evolve(plain, max_size=Size(tokens=MAX_SIZE))
    return bounded


def check_no_host_sync(masker: Masker) -> None:
    """A decode step never waits for the device."""
    bounded = bounded_form(masker)
    if bounded is None:
        skip(masker, "it declares unbounded: the host must learn how much it selected")
    masker = bounded
    with Simulated() as device:
        run = _decoding(masker, device, 200)
        with device.watch():
            run.question(201, 202)
        _require_no_wait(masker, device, "in a decode step")
        if "window_queries" in masker.capabilities.needs:
            return
        with device.watch():
            run.captured(203, ROOM)
        _require_no_wait(masker, device, "with the length on the device (key_len is None)")


def _require_no_wait(masker: Masker, device: Simulated, where: str) -> None:
    require(
        not device.waits,
        masker,
        f"{where} it {device.waits[0] if device.waits else ''}",
        "keep to tensors: budgets from inputs.budget, lengths from inputs.length, and masks of "
        "a capacity that the host knows with a count on the device",
    )


def check_device(masker: Masker) -> None:
    """Tensors are made where the inputs live."""
    change = "make tensors with device=inputs.device (state tensors with LayerInfo.device)"
    with Simulated() as device:
        run = _decoding(masker, device, 120)
        with device.watch():
            mask, _ = run.question(121, 124)
        require(
            not device.strays,
            masker,
            f"it mixes tensors of the host and of the device (in {', '.join(device.strays[:3])})",
            change,
        )
        for tensor in tensors_of(mask):
            require(
                tensor.device == DEVICE,
                masker,
                f"its mask holds a tensor on {tensor.device} where the inputs are on a device",
                change,
            )


def check_captured_decode(masker: Masker) -> None:
    """With its lengths on the device a decode step selects what it selects otherwise."""
    bounded = bounded_form(masker)
    if bounded is None:
        skip(masker, "it declares unbounded and no max_size, which captured decoding refuses")
    masker = bounded
    if "window_queries" in masker.capabilities.needs:
        skip(masker, "it needs window_queries, which captured decoding refuses")
    tokens = Tokens.random(210 + ROOM)
    for first in (None, (0, 58)):
        if first is not None:
            tokens = Tokens.random(210 + ROOM, batch=2, first=first)
        plain = Run(masker, tokens)
        plain.context(200)
        plain.question(200, 201)
        with Simulated() as device:
            run = _decoding(masker, device, 200, tokens)
            for end in range(202, 210):
                expected = effective(*plain.question(end - 1, end))
                mask, inputs = run.captured(end, ROOM)
                found = near(effective(mask, inputs))
                require(
                    same(found[..., :end], expected),
                    masker,
                    "with the length on the device (key_len is None) it selects other keys",
                    "read inputs.length, inputs.query_position and inputs.budget; the buffer is "
                    "longer than the keys in it",
                )


def _decoding(masker: Masker, device: Simulated, context: int, tokens: Tokens | None = None) -> Run:
    """A request on the simulated device after its context and its first question row."""
    tokens = Tokens.random(context + ROOM + 10) if tokens is None else tokens
    run = Run(masker, tokens.through(far), ops=device.ops)
    run.context(context)
    run.question(context, context + 1)
    return run


def check_memory(masker: Masker) -> None:
    """A mask takes memory for what it selects, and one query row none that grows like its keys
    squared.
    """
    largest = []
    for keys in (SHORT_KEYS, LONG_KEYS):
        with Simulated() as device:
            run = _decoding(masker, device, keys - 2)
            inputs = run.inputs(keys - 1, keys, "decode", 0, None)
            states = run.session.advance(inputs)
            inputs = run.session.remember(inputs)
            with device.watch():
                mask = run.session.mask_for(inputs, states)
            largest.append(device.largest)
            held = sum(near(t).untyped_storage().nbytes() for t in tensors_of(mask))
            chosen = int((near(mask.to_dense()) > 0).sum())
    if not masker.capabilities.unbounded:
        require(
            held <= BYTES_FREE + BYTES_PER_KEY * chosen,
            masker,
            f"its mask holds {held} bytes for {chosen} selected keys among {LONG_KEYS}",
            "return ranges or indices; the dense form is for tests",
        )
    if masker.capabilities.position_only:
        require(
            largest[1] <= 2 * BYTES_FREE + 2 * BYTES_PER_KEY * chosen,
            masker,
            f"it makes a tensor of {largest[1]} bytes to select {chosen} keys by position",
            "compute the positions that it selects, not a flag for each of them all",
        )
    growth = LONG_KEYS // SHORT_KEYS
    require(
        largest[1] <= 1.5 * growth * largest[0] + BYTES_FREE,
        masker,
        f"for one query row its largest tensor grows from {largest[0]} to {largest[1]} bytes when "
        f"the keys grow from {SHORT_KEYS} to {LONG_KEYS}",
        "keep to one score per key and head",
    )


def check_density(masker: Masker) -> None:
    """As many keys as its sizes say: at most their sum, and at least half of a single one."""
    sizes = [spec.name for spec in specs(type(masker)) if spec.type is Size]
    values = [size for name in sizes if (size := getattr(masker, name)) is not None]
    what = masker.capabilities
    if what.unbounded or what.restricts or not values:
        skip(masker, "it declares no size that bounds what it selects")
    page = int(getattr(masker, "page_size", 1)) if what.page_granular else 1
    for keys in (203, LONG_KEYS):
        run = Run(masker, Tokens.random(keys))
        run.context(keys - 1)
        chosen = _chosen(*run.question(keys - 1, keys))
        least, greatest = int(chosen.min()), int(chosen.max())
        budget = sum(size.resolve(keys) for size in values)
        # whole pages, of which a method takes a few whatever the budget
        most = budget if page == 1 else (-(-budget // page) + 4) * page
        require(
            greatest <= most,
            masker,
            f"it selects {greatest} of {keys} keys, where {' + '.join(sizes)} allows {most}",
            "select no more than inputs.budget says, or declare Capabilities(unbounded=True)",
        )
        exact = len(values) == 1 and not (what.stochastic or what.prunes)
        require(
            not exact or 2 * least >= min(budget, keys),
            masker,
            f"it selects {least} of {keys} keys, where {sizes[0]} asks for {budget}",
            "select as many keys as inputs.budget says",
        )


def _chosen(mask: Mask, inputs: Inputs) -> torch.Tensor:
    """Selected allowed keys per head of the last row."""
    return (effective(mask, inputs) > 0).sum(-1)[..., -1]
