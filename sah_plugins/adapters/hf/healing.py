"""Token healing: the last token of a prompt is chosen anew among those that begin with its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from sah_core import compat

from .generation import Generation, generation_options
from .options import config_settings
from .prefilled import ContextState, Prefilled, Row, with_prompts
from .prompts import Healed, Prompt, stripped
from .rounds import Round, rounds
from .writer import Writer

BIAS = 10.0
"""Added to the logits of the tokens that may take the last one's place, as in transformers."""
BIAS_OF_ITSELF = 11.0
"""Added to the last token's own."""
Bias = dict[tuple[int, ...], float]
Asked = Sequence[Sequence[int]]


class Healer(Writer):
    """A loaded model that can choose the last token of a prompt anew before it answers."""

    def _stripped(self, rows: tuple[Row, ...], asked: Asked) -> tuple[Row, ...]:
        """Rows whose questions that are asked have lost the whitespace at their end."""
        made = {
            (number, index): stripped(rows[number].prompts[index], self.tokenizer)
            for number, indices in enumerate(asked)
            for index in indices
        }
        return with_prompts(rows, made)

    def _healed(self, prefilled: Prefilled, state: ContextState, asked: Asked) -> Prefilled:
        """Contexts whose questions that are asked have their last token chosen anew.

        Each is a greedy token behind its prompt without the last one, read by the pipeline as an
        answer's would be; the states are afterwards as before.

        Args:
            prefilled: The contexts, the questions stripped.
            state: The pipeline's state over them.
            asked: Which questions of each.
        """
        options = {"max_new_tokens": 1, "token_healing": False}
        if "use_mtp" in config_settings():
            options["use_mtp"] = False
        generation = generation_options(self.model, self.tokenizer, options)
        rows = prefilled.rows
        tails: dict[tuple[int, int], int] = {}
        made: dict[tuple[int, int], Prompt] = {}
        for number, indices in enumerate(asked):
            for index in indices:
                prompt = rows[number].prompts[index]
                if self._bias(prompt) is not None:
                    tails[number, index] = prompt.ids[-1]
                    made[number, index] = without_tail(prompt)
        trimmed = attrs.evolve(prefilled, rows=with_prompts(rows, made))
        waiting = [[i for i in indices if (n, i) in tails] for n, indices in enumerate(asked)]
        for together in rounds(trimmed.rows, waiting, whole=generation.counts_prompt):
            for tail, some in by_tail(together, tails):
                begin = self._now()
                chosen = self._chosen(trimmed, state, some, generation, self._biases[tail])
                healed = Healed(tail, self._now() - begin)
                for (number, index), token in chosen.items():
                    prompt = rows[number].prompts[index]
                    ids = (*prompt.ids[:-1], token)
                    made[number, index] = attrs.evolve(prompt, ids=ids, healed=healed)
        return attrs.evolve(prefilled, rows=with_prompts(rows, made))

    def _chosen(
        self,
        prefilled: Prefilled,
        state: ContextState,
        together: Round,
        generation: Generation,
        bias: Bias | None,
    ) -> dict[tuple[int, int], int]:
        """The token that follows each prompt of a round under a bias, by row and question."""
        behind = generation.behind(together.prompt_tokens(prefilled.rows))
        biased = attrs.evolve(behind, options={**behind.options, "sequence_bias": bias})
        prompts = together.tokens(prefilled.rows, biased.options["pad_token_id"])
        drawn = self._draw(prefilled, state, together, biased, prompts, self._now)
        return {
            (number, index): drawn.sequences[number][0][0][0]
            for number, index in enumerate(together.asked)
            if index is not None
        }

    def _bias(self, prompt: Prompt) -> Bias | None:
        """The bias towards the tokens that may take the place of a prompt's last one; None if there
        is no other, or nothing to heal.
        """
        tail = prompt.ids[-1]
        if not prompt.given.strip() or len(prompt.ids) < 2:
            return None
        if tail not in self._biases:
            found = extensions(self.tokenizer, tail, compat.vocabulary_size(self.model))
            bias: Bias = {(token,): BIAS for token in found}
            bias[tail,] = BIAS_OF_ITSELF
            # a tail whose text is written otherwise in the vocabulary is not among them
            self._biases[tail] = bias if tail in found and len(found) > 1 else None
        return self._biases[tail]


def extensions(tokenizer: Any, tail: int, size: int) -> list[int]:
    """The tokens of a vocabulary that begin with the text of another one, which is looked up as
    transformers does: decoded, spaces as the vocabulary spells a space if that is a token of it.

    Args:
        tokenizer: A transformers tokenizer.
        tail: The token.
        size: Tokens that the model knows; the vocabulary may have more.
    """
    if tail in tokenizer.all_special_ids:
        return []
    text = str(tokenizer.decode([tail]))
    space = tokenizer.convert_tokens_to_ids(" ")
    if space is not None:
        text = text.replace(" ", tokenizer.convert_ids_to_tokens(space)[0])
    vocabulary = tokenizer.get_vocab().items()
    return [
        index for token, index in vocabulary if text and token.startswith(text) and index < size
    ]


def without_tail(prompt: Prompt) -> Prompt:
    """A prompt without its last token; one of its tokens at least lies behind the context."""
    inside = min(prompt.context_tokens, len(prompt.ids) - 2)
    return attrs.evolve(prompt, ids=prompt.ids[:-1], context_tokens=inside)


def by_tail(together: Round, tails: dict[tuple[int, int], int]) -> Iterator[tuple[int, Round]]:
    """The questions of a round that have the same last token, for each such token."""
    known = [None if i is None else tails[n, i] for n, i in enumerate(together.asked)]
    for tail in dict.fromkeys(token for token in known if token is not None):
        pairs = zip(together.asked, known, strict=True)
        asked = tuple(index if token == tail else None for index, token in pairs)
        yield tail, attrs.evolve(together, asked=asked)
