"""How well a model predicts given texts behind contexts in its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from sah_core import Pipeline
from sah_core.errors import RequestError
from sah_core.patching import use
from sah_core.requests import Likelihood

from .prefilled import ContextState, Prefilled, check_alone, check_questions
from .reader import Reader


class Predictor(Reader):
    """A loaded model that scores texts behind contexts.

    Attributes:
        pipeline: What runs where nothing else is asked for.
    """

    pipeline: Pipeline

    @torch.no_grad()
    def loglikelihood(
        self,
        prefilled: Prefilled,
        pipeline: Pipeline | str | None = None,
        *,
        observers: Sequence[object] = (),
        indices: Sequence[int] | None = None,
        step: int | None = None,
    ) -> tuple[Likelihood, ...]:
        """How well each question's text is predicted from the context, with that text given.

        Args:
            prefilled: What `prefill` returned; the questions are the texts, and a request without
                template, separator and answer prefix makes them plain continuations.
            pipeline: What to run on the text; the adapter's when None.
            observers: Objects with observer hooks.
            indices: Which questions; all when None.
            step: Tokens per forward pass. None reads a text at once, as a question is read; 1 reads
                it as generated tokens are, for pipelines that are sparse while decoding only.

        Raises:
            RequestError: If a text has less than two tokens, or the prefill was sparse and belongs
                to another pipeline, or is of several contexts.
        """
        check_alone(prefilled, "loglikelihood")
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        state = self._state(prefilled, parsed)
        session = self._watched(state.session, observers)
        state = attrs.evolve(state, session=session)
        chosen = range(len(prefilled.prompts)) if indices is None else indices
        check_questions(prefilled.rows[0], chosen)
        return tuple(self._score(prefilled, state, index, step) for index in chosen)

    def _score(
        self, prefilled: Prefilled, state: ContextState, index: int, step: int | None
    ) -> Likelihood:
        prompt = prefilled.prompts[index]
        self._check_length(len(prompt.ids), 0)
        text = prompt.ids[prompt.context_tokens :]
        if len(text) < 2:
            raise RequestError(f"text {index} has {len(text)} token; at least 2 are needed")
        begin, observed = self._now(), state.session.observer_seconds
        losses: list[float] = []
        correct: list[bool] = []
        resumed = self._resumed(prefilled, state, [prompt.ids[: prompt.context_tokens]])
        with resumed as session, use(self.model, session):
            session.start_question()
            past = prompt.context_tokens
            for piece, logits in self._forward(prefilled.cache, text, past, step):
                following = torch.tensor(
                    text[piece.start + 1 : piece.stop + 1], dtype=torch.long, device=self.device
                )
                scores = logits[: len(following)].float()
                losses += torch.nn.functional.cross_entropy(
                    scores, following, reduction="none"
                ).tolist()
                correct += (scores.argmax(-1) == following).tolist()
        return Likelihood(
            token_ids=tuple(text[1:]),
            losses=tuple(losses),
            correct=tuple(correct),
            context_tokens=prompt.context_tokens,
            seconds=self._now() - begin - (session.observer_seconds - observed),
            backends=tuple(sorted(session.backends_used)),
        )

    def _forward(
        self, kv_cache: Any, ids: Sequence[int], past: int, step: int | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Run given tokens behind the cached ones and yield the logits of each piece."""
        length = step or len(ids)
        for begin in range(0, len(ids), length):
            piece = slice(begin, min(begin + length, len(ids)))
            output = self.model(
                input_ids=torch.tensor([ids[piece]], device=self.device),
                attention_mask=torch.ones(
                    1, past + piece.stop, dtype=torch.long, device=self.device
                ),
                use_cache=True,
                **{self._cache_argument: kv_cache},
            )
            yield piece, output.logits[0]
