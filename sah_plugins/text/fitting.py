"""Fitting a context to a number of tokens, whatever the tokenizer."""

from collections.abc import Callable
from typing import Any

import attrs

from sah_core.benchmark import Tokenizer


@attrs.frozen
class PromptMeter:
    """Counts the tokens of whole prompts, as an adapter sends them."""

    tokenizer: Tokenizer
    chat: bool
    bos: bool = True
    """Whether a BOS counts, for tokenizers that have one."""

    def text_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text`` without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_tokens(self, user_text: str, answer_prefix: str) -> int:
        """Return the tokens of a prompt: template or BOS, the user's text, the answer prefix."""
        tokenizer: Any = self.tokenizer
        if self.chat and getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": user_text}]
            rendered = tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
            return self.text_tokens(rendered + answer_prefix)
        # One place is kept for a BOS, whether or not this tokenizer adds one.
        bos = self.bos and getattr(tokenizer, "bos_token_id", None) is not None
        return self.text_tokens(user_text + answer_prefix) + bos


def largest_size(fits: Callable[[int], bool], guess: int) -> int:
    """Return the largest size that fits, knowing that size 0 does.

    Args:
        fits: whether a size fits; true up to some size, false from there on.
        guess: where to look first. The answer does not depend on it.
    """
    low, step = 0, 1
    start = guess - guess // 32
    if start > 0 and fits(start):
        low = start
    elif start > 0:
        return _bisect(fits, 0, start)
    while fits(low + step):
        low, step = low + step, 2 * step
    return _bisect(fits, low, low + step)


def largest_near(fits: Callable[[int], bool], guess: int) -> int:
    """Return the largest size that fits, found in two trials if ``guess`` is right.

    Args:
        fits: whether a size fits; true up to some size, false from there on; size 0 fits.
        guess: where to look first. The answer does not depend on it.
    """
    low, step = max(0, guess), 1
    if low > 0 and not fits(low):
        high = low
        while (low := max(0, high - step)) > 0 and not fits(low):
            high, step = low, 2 * step
        return _bisect(fits, low, high)
    while fits(low + step):
        low, step = low + step, 2 * step
    return _bisect(fits, low, low + step)


def _bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
