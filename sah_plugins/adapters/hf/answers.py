"""From what ``generate`` returns to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sah_core import RequestError
from sah_core.errors import short_repr
from sah_core.requests import AnswerDetail, Generated

from .generation import Generation, Watch
from .prompts import Prompt

CACHE = ("cache", "past_key_values")
"""Names of the cache in model outputs."""


def sequences_of(output: Any, prompts: Tensor) -> Tensor:
    """The tokens that ``generate`` returned, those of the prompts first.

    Args:
        output: What it returned.
        prompts: What it was given, ``(rows, prompt length)``.

    Raises:
        RequestError: If that are no tokens behind the prompts, as a decoding loop of the caller's
            may return anything.
    """
    found = getattr(output, "sequences", output)
    rows, length = prompts.shape
    fits = isinstance(found, Tensor) and found.dim() == 2 and found.shape[1] >= length
    if fits and found.shape[0] and found.shape[0] % rows == 0:
        each = prompts.repeat_interleave(found.shape[0] // rows, 0)
        if torch.equal(found[:, :length], each.to(found.device)):
            return cast(Tensor, found)
    raise RequestError(
        f"the decoding loop returned {short_repr(found)}; expected the token ids of every prompt "
        "and what follows them, or an output with these as sequences"
    )


def new_tokens(
    output: Tensor, prompts: Tensor, watch: Watch, generation: Generation
) -> list[list[tuple[tuple[int, ...], str]]]:
    """The new tokens of every row and how they ended.

    Args:
        output: What ``generate`` returned, ``(rows * sequences, length)``.
        prompts: What it was given, ``(rows, prompt length)``.
        watch: The criterion that went with it.
        generation: The options.

    Returns:
        Per row its sequences, each as tokens and ``eos``, ``stop`` or ``length``.
    """
    rows, start = prompts.shape
    each = output.shape[0] // rows
    made = []
    for row, tokens in enumerate(output.tolist()):
        stop = watch.stop_of(row, tokens, start)
        made.append(ended(tuple(tokens[start:]), stop and stop - start, generation))
    return [made[row * each : (row + 1) * each] for row in range(rows)]


def ended(
    tokens: tuple[int, ...], stop: int | None, generation: Generation
) -> tuple[tuple[int, ...], str]:
    """A sequence without the padding behind its end, and how it ended.

    Args:
        tokens: New tokens, padded.
        stop: At which length a stopping criterion held; None if none did.
        generation: The options.
    """
    length = next((i + 1 for i, token in enumerate(tokens) if token in generation.eos), None)
    if length is not None and (stop is None or length <= stop):
        return tokens[:length], "eos"
    if stop is not None:
        return tokens[:stop], "stop"
    return tokens, "length" if len(tokens) >= generation.new_tokens else "stop"


def row_of(output: Any, row: int, rows: int) -> Any:
    """What ``generate`` returned about one of the rows that ran together, without the cache, which
    goes on to the next question.

    Args:
        output: A model output, or a part of one; the first dimension of its tensors holds equally
            many entries of every row.
        row: The row.
        rows: Rows that ran together.
    """
    if isinstance(output, Tensor):
        each = output.shape[0] // rows
        return output[row * each : (row + 1) * each]
    if isinstance(output, Mapping):
        parts = {
            name: row_of(part, row, rows) for name, part in output.items() if name not in CACHE
        }
        return type(output)(**parts)
    if isinstance(output, tuple):
        return tuple(row_of(part, row, rows) for part in output)
    return output


def healed_token(prompt: Prompt) -> int | None:
    """The token that took the place of a prompt's last one; None if that is still there."""
    last = prompt.ids[-1]
    return None if prompt.healed is None or prompt.healed.tail == last else last


def text_behind(tokenizer: Any, prompt: Prompt, tokens: Sequence[int]) -> str:
    """The text of new tokens; what a healed token adds to the prompt's end is its beginning."""
    last = healed_token(prompt)
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if last is None or prompt.healed is None:
        return text
    whole = str(tokenizer.decode([last, *tokens], skip_special_tokens=True))
    known = str(tokenizer.decode([prompt.healed.tail]))
    # a special token has taken the place of text that it begins with
    return whole[len(known) :] if whole.startswith(known) else text


def answer_detail(
    tokenizer: Any,
    prompt: Prompt,
    sequences: Sequence[tuple[tuple[int, ...], str]],
    **facts: Any,
) -> AnswerDetail:
    """The answer to one question.

    Args:
        tokenizer: Turns tokens into text.
        prompt: The question's prompt.
        sequences: Tokens and end of every sequence that was asked for; the first is the answer.
        facts: Times, batch and backends of the detail.
    """
    texts = [text_behind(tokenizer, prompt, tokens) for tokens, _ in sequences]
    (tokens, finished), *others = sequences
    return AnswerDetail(
        text=texts[0],
        token_ids=tokens,
        prompt_tokens=len(prompt.ids),
        context_tokens=prompt.context_tokens,
        new_tokens=len(tokens),
        finished=finished,
        healed_token=healed_token(prompt),
        others=tuple(
            Generated(text=text, token_ids=ids, finished=end)
            for text, (ids, end) in zip(texts[1:], others, strict=True)
        ),
        **facts,
    )
