"""Checks of how a step treats what earlier steps selected, and what it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sah_core.allowed import Allowed
from sah_core.inputs import Inputs
from sah_core.mask import Mask
from sah_core.masker import Masker
from sah_core.parameters import to_plain

from .calls import (
    SHAPES,
    SHORT,
    TOLERANCE,
    Run,
    earlier_masks,
    effective,
    nothing,
    same,
    shapes,
    tensors_of,
)
from .verdict import require, skip


def check_no_readmission(masker: Masker) -> None:
    """A restricting step only removes; after an intersection nothing forbidden comes back."""

    def clipped(inputs: Inputs) -> Mask:
        return Mask.full(inputs.shape) & inputs.allowed

    for shape in shapes(masker):
        mask, inputs = shape.run(masker, clipped)
        forbidden = ~inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
        dense = (mask & inputs.allowed).to_dense()
        require(
            not bool(dense[forbidden].any()),
            masker,
            f"with {shape.title} forbidden keys are back after the intersection",
            "leave inputs.allowed as it is",
        )
        if masker.capabilities.restricts:
            require(
                not bool(mask.to_dense()[forbidden].any()),
                masker,
                f"with {shape.title} a step that restricts admits keys",
                "return previous & inputs.allowed, or less",
            )


def check_previous_respected(masker: Masker) -> None:
    """What earlier steps selected stays, with at least its probability, unless the step prunes."""
    if masker.capabilities.prunes:
        skip(masker, "a step that declares prunes may remove what was selected")
    for title, earlier in earlier_masks():
        for shape in shapes(masker):
            mask, inputs = shape.run(masker, earlier)
            before = effective(earlier(inputs), inputs)
            after = effective(mask, inputs)
            require(
                bool((after >= before - TOLERANCE).all()),
                masker,
                f"with {shape.title} it loses keys that were selected before ({title})",
                "return previous | selection, or declare Capabilities(prunes=True)",
            )
            if masker.capabilities.restricts:
                require(
                    same(after, before),
                    masker,
                    f"with {shape.title} a step that restricts selects keys (before: {title})",
                    "return previous & inputs.allowed, or less",
                )


def check_previous_empty_and_full(masker: Masker) -> None:
    """Nothing selected before is a mask like any other, and so is everything."""
    for shape in (*shapes(masker), *SHORT):
        mask, inputs = shape.run(masker, lambda inputs: Mask.full(inputs.shape))
        require(
            mask.shape == inputs.shape, masker, "a full mask loses its shape", "use inputs.shape"
        )
        everything = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape).float()
        require(
            masker.capabilities.prunes or same(effective(mask, inputs), everything),
            masker,
            f"with {shape.title} a full mask does not stay full",
            "return previous when previous.is_full",
        )
        mask, inputs = shape.run(masker, nothing)
        if masker.capabilities.prunes or masker.capabilities.restricts:
            require(
                not bool(effective(mask, inputs).any()),
                masker,
                f"with {shape.title} it selects keys where nothing was selected",
                "an empty mask means that nothing is attended; return it",
            )


def check_nothing_is_edited(masker: Masker) -> None:
    """Inputs, limits, the previous mask and the masker itself stay as they are."""
    for title, earlier in earlier_masks():
        for shape in SHAPES[1:2] + SHAPES[5:6]:
            tokens = shape.tokens()
            kept: list[tuple[Mask, list[Tensor]]] = []

            def remember(
                inputs: Inputs,
                earlier: Callable[[Inputs], Mask] = earlier,
                kept: list[tuple[Mask, list[Tensor]]] = kept,
            ) -> Mask:
                mask = earlier(inputs)
                kept.append((mask, [t.clone() for t in tensors_of(mask)]))
                return mask

            run = Run(masker, tokens, remember)
            before = [t.clone() for t in tokens.tensors()]
            plain = to_plain(masker)
            run.context(shape.length - shape.rows)
            _, inputs = run.question(shape.length - shape.rows, shape.length)
            fresh = Allowed.causal(shape.rows, shape.length, first=tokens.first)
            edited = [
                name
                for name, a, b in zip(
                    ("query", "key", "value", "hidden_states"),
                    before,
                    tokens.tensors(),
                    strict=True,
                )
                if not torch.equal(a, b)
            ]
            if not torch.equal(fresh.start, inputs.allowed.start) or not torch.equal(
                fresh.stop, inputs.allowed.stop
            ):
                edited.append("allowed")
            for mask, tensors in kept:
                if not all(
                    torch.equal(a, b) for a, b in zip(tensors_of(mask), tensors, strict=True)
                ):
                    edited.append(f"previous ({title})")
            if to_plain(masker) != plain:
                edited.append("the masker")
            require(
                not edited,
                masker,
                f"it edits {', '.join(edited)}",
                "write to new tensors only: key and value are the cache itself",
            )
