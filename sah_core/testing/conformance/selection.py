"""Checks of what one call selects: shape, limits, causality, heads, padding, types."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from sah_core.allowed import Allowed
from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.masker import Masker

from .calls import (
    MODEL,
    SHORT,
    TOLERANCE,
    Run,
    Tokens,
    earlier_masks,
    effective,
    fits,
    nothing,
    same,
    shapes,
)
from .verdict import fail, require, skip


def check_shape(masker: Masker) -> None:
    """The mask is well formed for every kind of call."""
    for shape in shapes(masker):
        mask, inputs = shape.run(masker)
        require_well_formed(masker, mask, inputs, shape.title)


def require_well_formed(masker: Masker, mask: Mask, inputs: Inputs, where: str) -> None:
    """Shape, types, probabilities in [0, 1], and no key twice."""
    require(
        isinstance(mask, Mask) and mask.shape == inputs.shape,
        masker,
        f"with {where} the mask has shape {getattr(mask, 'shape', None)}, not {inputs.shape}",
        "build it with inputs.shape",
    )
    dense = mask.to_dense()
    require(
        bool(((dense >= 0) & (dense <= 1)).all()),
        masker,
        f"with {where} probabilities lie outside [0, 1]",
        "give the inclusion probability of each key, not a score or a weight",
    )
    require(
        masker.capabilities.stochastic or bool(((dense == 0) | (dense == 1)).all()),
        masker,
        f"with {where} keys have probabilities between 0 and 1",
        "declare capabilities = Capabilities(stochastic=True), or select with probability 1",
    )
    for part in mask.ranges:
        length = int((part.stop - part.start).max())
        require(
            length <= part.capacity,
            masker,
            f"with {where} a range has {length} keys and a capacity of {part.capacity}",
            "give KeyRange a capacity that bounds its length",
        )
    if mask.selected is None:
        return
    keys, _ = mask.selected.tokens(inputs.capacity)
    ordered = keys.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    require(
        not bool(twice.any()),
        masker,
        f"with {where} a key is selected twice in a row of indices",
        "keep indices distinct: backends add every entry to the softmax",
    )


def check_short_keys(masker: Masker) -> None:
    """Fewer keys than any budget are no problem."""
    for shape in SHORT:
        mask, inputs = shape.run(masker)
        require_well_formed(masker, mask, inputs, shape.title)
        run = Run(masker, shape.tokens())
        for end in range(1, shape.length + 1):
            mask, inputs = run.call(end - 1, end, "prefill")
            require_well_formed(masker, mask, inputs, f"{shape.title}, token by token")


def check_allowed_only(masker: Masker) -> None:
    """What may not be attended is never attended, whatever the limits look like."""
    change = "choose among inputs.allowed; what it forbids is taken out again and must not cost"
    kinds: list[tuple[str, Callable[[int, int], Allowed]]] = [
        ("causal limits", lambda rows, keys: Allowed.causal(rows, keys)),
        ("a sliding window", lambda rows, keys: Allowed.causal(rows, keys, window=9)),
        ("a foreign mask", foreign),
    ]
    for title, limits in kinds:
        for begin, end in ((96, 97), (90, 97)):
            run = Run(masker, Tokens.random(end))
            run.context(begin)
            allowed = limits(end - begin, end)
            mask, inputs = run.call(begin, end, "question", allowed=allowed)
            require_well_formed(masker, mask, inputs, title)
            keep = allowed.to_dense(end).expand(inputs.shape)
            dense = (mask & allowed).to_dense()
            require(not bool(dense[~keep].any()), masker, f"{title} are not respected", change)
            chosen, total = (t.expand(inputs.shape[:3]) for t in mask.counts(allowed))
            require(
                torch.equal(chosen, (dense > 0).sum(-1)) and bool((chosen <= total).all()),
                masker,
                f"with {title} the mask counts {int(chosen.sum())} keys and has "
                f"{int((dense > 0).sum())}",
                "keep indices distinct and inside the keys",
            )
            if masker.is_stateful() or masker.capabilities.page_granular:
                continue  # an index or a page may hold keys of any kind
            hidden = ~keep.any(2)[:, :1, :, None].expand_as(run.tokens.key)
            run = Run(masker, run.tokens.with_keys(hidden, factor=30.0))
            run.context(begin)
            other = effective(*run.call(begin, end, "question", allowed=allowed))
            require(
                same(dense, other),
                masker,
                f"with {title} it selects other keys if those that no row may attend change",
                change,
            )


def foreign(rows: int, keys: int) -> Allowed:
    """Limits that are no interval: every third key is hidden."""
    keep = Allowed.causal(rows, keys).to_dense(keys).clone()
    keep[..., 1::3] = False
    return Allowed.from_dense(keep)


def check_causality(masker: Masker) -> None:
    """Later tokens change nothing in earlier rows, in one forward pass or in chunks.

    A page-granular masker may judge a page by all its keys, so for it the change begins with a
    page.
    """
    page = int(getattr(masker, "page_size", 1)) if masker.capabilities.page_granular else 1
    cut = -(-37 // page) * page
    length = cut + 24
    tokens = Tokens.random(length)
    changed = tokens.followed_by(Tokens.random(length, seed=1), cut, factor=3.0)
    for title, chunks in (("a prefill", (length,)), ("chunks", (cut - 9, 20, 13))):
        masks = []
        for sequence in (tokens, changed):
            run = Run(masker, sequence)
            begin, parts = 0, []
            for size in chunks:
                mask, inputs = run.call(begin, begin + size, "prefill")
                dense = effective(mask, inputs)
                parts.append(torch.nn.functional.pad(dense, (0, length - begin - size)))
                begin += size
            masks.append(torch.cat(parts, dim=2))
        rows = [t[:, :, :cut] for t in masks]
        wrong = ((rows[0] - rows[1]).abs() > TOLERANCE).any(-1).flatten(0, 1).any(0)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            fail(
                masker,
                f"in {title}, tokens from position {cut} on change what row {row} attends",
                "let a query row depend on the keys up to its own position only",
            )


def check_kv_groups(masker: Masker) -> None:
    """Each query head uses the keys of its own KV group."""
    counts = [k for k in (1, 2) if fits(masker, 4, k)] if fits(masker, 4, 4) else []
    if not counts:
        skip(masker, f"what it was given fits {MODEL.heads} heads on {MODEL.kv_heads} only")
    for kv_heads in counts:
        grouped = Tokens.random(150, kv_heads=kv_heads)
        group = 4 // kv_heads
        single = attrs.evolve(
            grouped,
            key=grouped.key.repeat_interleave(group, dim=1),
            value=grouped.value.repeat_interleave(group, dim=1),
        )
        found = []
        for tokens in (grouped, single):
            run = Run(masker, tokens)
            run.context(147)
            found.append(run.question(147, 150))
        (mask, inputs), (alone, other) = found
        require(
            4 % mask.heads == 0,
            masker,
            f"with {kv_heads} KV heads and 4 query heads the mask has {mask.heads} selections",
            "select per query head, per KV head, or once",
        )
        if mask.heads == 4:
            require(
                same(effective(mask, inputs), effective(alone, other)),
                masker,
                f"with {kv_heads} KV heads it differs from the same keys repeated for 4 heads",
                "query head h belongs to KV head h // inputs.group",
            )


def check_left_padding(masker: Masker) -> None:
    """A left-padded batch selects for each sequence what the sequence alone selects."""
    length, first = 211, (0, 77, 140)
    batch = attrs.evolve(
        Tokens.random(length, batch=3), first=torch.tensor(first, dtype=torch.int32)
    )
    for rows in (1, 4):
        begin = length - rows
        run = Run(masker, batch)
        run.context(begin)
        together = effective(*run.question(begin, length))
        for index, padding in enumerate(first):
            run = Run(masker, batch.sequence(index, padding))
            run.context(begin - padding)
            expected = effective(*run.question(begin - padding, length - padding))
            require(
                same(together[index : index + 1, :, :, padding:], expected),
                masker,
                f"a sequence with {padding} keys of padding selects other keys than it does alone",
                "count from inputs.allowed.first, take sizes from inputs.budget, and give the "
                "state LayerInfo.first",
            )


def check_position_only(masker: Masker) -> None:
    """A step that declares `position_only` selects the same for any tensors and in any layer."""
    if not masker.capabilities.position_only:
        skip(masker, "it does not declare position_only")
    change = "drop position_only from its capabilities, or read neither tensors nor the layer"
    require(not masker.is_stateful(), masker, "position_only and yet a state", change)
    for title, earlier in (("nothing", nothing), *earlier_masks()):
        masks = []
        for seed, layer in ((0, 0), (1, 0), (0, 3)):
            run = Run(masker, Tokens.random(97, seed=seed), earlier)
            masks.append(effective(*run.question(90, 97, layer=layer)))
        for other in masks[1:]:
            require(
                same(masks[0], other),
                masker,
                f"it declares position_only and selects otherwise for other tensors or in another "
                f"layer (before: {title})",
                change,
            )


def check_dtypes(masker: Masker) -> None:
    """Half-precision tensors give nine in ten of the keys that their values give in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (1, 5):
            typed = Tokens.random(203).through(lambda t, dtype=dtype: t.to(dtype))  # type: ignore[misc]
            found = []
            for tokens in (typed, typed.through(lambda t: t.float())):
                run = Run(masker, tokens)
                run.context(203 - rows)
                mask, inputs = run.question(203 - rows, 203)
                require_well_formed(masker, mask, inputs, f"{dtype} tensors")
                found.append(effective(mask, inputs))
            shared = float(torch.minimum(*found).sum())
            either = float(torch.maximum(*found).sum())
            require(
                shared >= 0.9 * either,
                masker,
                f"with {dtype} tensors it selects other keys than for the same values in float32",
                "compute scores in float32: query.float(), key.float()",
            )
