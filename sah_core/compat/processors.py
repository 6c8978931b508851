"""Logits processors of transformers in batches with left padding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class RowByRow:
    """A logits processor that sees of every sequence what that sequence alone would show.

    Args:
        each: The processor of every sequence.
        padding: Leading positions of every sequence that are no tokens of it.
    """

    def __init__(self, each: Sequence[Any], padding: Sequence[int]) -> None:
        self.each, self.padding = tuple(each), tuple(padding)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a processor of transformers; rows are sequences, or several beams of each."""
        beams = input_ids.shape[0] // len(self.padding)
        made = []
        for row in range(input_ids.shape[0]):
            own = row // beams
            tokens = input_ids[row : row + 1, self.padding[own] :]
            made.append(self.each[own](tokens, scores[row : row + 1]))
        return torch.cat(made)


@contextmanager
def unpadded_processors(model: Any, padding: Sequence[int]) -> Iterator[None]:
    """Let the processors that ``generate`` makes to find repetitions look at tokens alone.

    Left padding would count as a token that has occurred, and has occurred twice. The caller's own
    processors get whole rows.

    Args:
        model: The model.
        padding: Leading positions of every sequence that are no tokens of it; nothing is done where
            there are none.
    """
    if not any(padding):
        yield
        return
    make = model._get_logits_processor

    def made(*arguments: Any, **named: Any) -> Any:
        found = make(*arguments, **named)
        own = list(named.get("logits_processor") or ())
        for index, processor in enumerate(found):
            if all(processor is not other for other in own):
                found[index] = _unpadded(processor, padding, named["encoder_input_ids"])
        return found

    model._get_logits_processor = made
    try:
        yield
    finally:
        del model._get_logits_processor


def _unpadded(processor: Any, padding: Sequence[int], prompts: Tensor) -> Any:
    """A processor that looks for repetitions, row by row; others as they are."""
    from transformers import generation as made

    own = [prompts[row : row + 1, begin:] for row, begin in enumerate(padding)]
    if isinstance(processor, made.EncoderRepetitionPenaltyLogitsProcessor):
        each = [copy.copy(processor) for _ in own]
        for one, tokens in zip(each, own, strict=True):
            one.encoder_input_ids = tokens
        return RowByRow(each, padding)
    if isinstance(processor, made.EncoderNoRepeatNGramLogitsProcessor):
        kind, size = type(processor), processor.ngram_size
        return RowByRow([kind(size, tokens) for tokens in own], padding)
    # newer versions of transformers leave padding out of this one by themselves
    knows = getattr(processor, "prompt_ignore_length", None) is not None
    repeats = made.NoRepeatNGramLogitsProcessor, made.RepetitionPenaltyLogitsProcessor
    if isinstance(processor, repeats) and not knows:
        return RowByRow([processor] * len(padding), padding)
    return processor
