"""Texts as windows of tokens, what calibration and training read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sah_core import compat
from sah_core.errors import RequestError

LONGEST_TOKEN = 12
"""Characters per token taken at first; a window that needs more gets more."""


def check_length(model: Any, length: int) -> None:
    """Refuse windows that a model cannot read, before it tries.

    Raises:
        RequestError: If the model's context is shorter than a window.
    """
    limit = getattr(compat.text_config(model), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise RequestError(
            f"length = {length} is more than the {limit} tokens of the model's context; "
            "set a smaller length"
        )


def token_windows(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    count: int,
    *,
    begin: float = 0.0,
    end: float = 1.0,
) -> list[Tensor]:
    """Windows of tokens, evenly spread over a part of the texts.

    Every window starts at a word, with the special tokens that the tokenizer puts before a text.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Read as one, in order.
        length: Tokens per window.
        count: Windows, fewer where the text does not hold so many apart.
        begin: Where the part starts, as a fraction of the text.
        end: Where it ends.

    Returns:
        int64 tensors ``(1, length)``.

    Raises:
        RequestError: If the text is shorter than one window.
    """
    text = "\n\n".join(texts)
    text = text[int(begin * len(text)) : int(end * len(text))]
    # a token is a character at least, so that so many windows do not overlap by much
    count = max(1, min(count, len(text) // length))
    windows = []
    for index in range(count):
        at = index * len(text) // count
        if at:
            space = text.find(" ", at)
            at = len(text) if space < 0 else space + 1
        ids = _tokens(tokenizer, text, at, length)
        if len(ids) == length:
            windows.append(torch.tensor([ids]))
    if not windows:
        raise RequestError(
            f"the text has fewer than the {length} tokens of one sample; "
            "give more text, or set a smaller length"
        )
    return windows


def _tokens(tokenizer: Any, text: str, at: int, length: int) -> list[int]:
    """The first ``length`` tokens from a place on, or all there are."""
    room = LONGEST_TOKEN * length
    while True:
        ids: list[int] = tokenizer(text[at : at + room])["input_ids"]
        if len(ids) > length or at + room >= len(text):
            return ids[:length]
        room *= 2
