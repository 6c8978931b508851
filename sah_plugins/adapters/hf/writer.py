"""What a model writes behind contexts in its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import torch

from sah_core import Pipeline, compat
from sah_core.attention import Session
from sah_core.errors import RequestError
from sah_core.patching import set_apart, use
from sah_core.requests import AnswerDetail
from sah_core.selection import overflow_rows

from .answers import answer_detail, new_tokens, row_of, sequences_of
from .assistants import with_assistant
from .foreign_code import blaming
from .generation import Generation, Watch, generation_options, negative_prompt, seeded
from .gguf import quiet_transformers
from .kv_cache import Keeping
from .likelihood import Predictor
from .prefilled import ContextState, Prefilled
from .rounds import Round


@attrs.frozen(eq=False)
class Drawn:
    """What one call of ``generate`` gave.

    Attributes:
        sequences: Per row its sequences, each as tokens and how it ended.
        output: The model output, where one was asked for.
        first_token: Seconds until the first token, or None.
        overflow: Rows that wanted more keys than they got.
    """

    sequences: list[list[tuple[tuple[int, ...], str]]]
    output: Any
    first_token: float | None
    overflow: int


class Writer(Predictor):
    """A loaded model that answers questions behind contexts."""

    def _assisted(self, generation: Generation) -> Generation:
        """The generation with its assistant, or the model's layers for drafts, loaded."""
        generation = with_assistant(generation, self.model, self.tokenizer, self._assistants)
        if not generation.predicts_ahead:
            return generation
        if not compat.draft_layer_count(self.model):
            raise RequestError(
                f"generation option 'use_mtp' is not supported with {type(self.model).__name__}: "
                "its configuration has no layers for multi-token prediction (num_mtp_layers)"
            )
        if self._draft_layers is None:
            with quiet_transformers():
                self._draft_layers = compat.read_draft_layers(self.model)
        return attrs.evolve(generation, draft_layers=self._draft_layers)

    def _kept_for(
        self, generation_kwargs: Mapping[str, Any] | None
    ) -> tuple[Keeping, compat.HiddenStates | None]:
        """How a context is to be kept for a generation, and what is to keep its hidden states if
        the generation starts from them; nothing is asked for by one that is not known yet.
        """
        if generation_kwargs is None:
            return Keeping(), None
        generation = generation_options(self.model, self.tokenizer, generation_kwargs)
        layers = self._assisted(generation).hidden_layers
        return generation.keeping, compat.HiddenStates(layers) if layers else None

    def _generate(
        self,
        prefilled: Prefilled,
        state: ContextState,
        together: Round,
        generation: Generation,
    ) -> list[AnswerDetail | None]:
        """Answer one question of every row that has one in this round."""
        rows = prefilled.rows
        prompts = together.tokens(rows, generation.options["pad_token_id"])
        begin, observed = self._now(), state.session.observer_seconds

        def elapsed() -> float:
            return self._now() - begin - (state.session.observer_seconds - observed)

        with seeded(generation.seed, self.devices):
            draws = [
                self._draw(prefilled, state, together, generation, prompts, elapsed)
                for _ in range(generation.draws)
            ]
        seconds = elapsed()
        first_token = next((d.first_token for d in draws if d.first_token is not None), seconds)
        outputs = [drawn.output for drawn in draws if drawn.output is not None]
        details: list[AnswerDetail | None] = []
        for number, (row, index) in enumerate(zip(rows, together.asked, strict=True)):
            if index is None:
                details.append(None)
                continue
            healed = row.prompts[index].healed
            healing = 0.0 if healed is None else healed.seconds
            detail = answer_detail(
                self.tokenizer,
                row.prompts[index],
                [sequence for drawn in draws for sequence in drawn.sequences[number]],
                outputs=tuple(row_of(output, number, len(rows)) for output in outputs),
                batch=len(rows),
                overflow_rows=sum(drawn.overflow for drawn in draws),
                backends=tuple(sorted(state.session.backends_used)),
                seconds_prefill=prefilled.seconds,
                seconds_decode=healing + seconds,
                seconds_first_token=healing + first_token,
                seconds_index=state.seconds,
            )
            details.append(detail)
        return details

    def _draw(
        self,
        prefilled: Prefilled,
        state: ContextState,
        together: Round,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        elapsed: Callable[[], float],
    ) -> Drawn:
        """Call ``generate`` once, from the end of the contexts."""
        # an idle row has padding only where the others end before its context begins
        padding = tuple(min(count, len(prompts[0]) - 1) for count in prefilled.padding)
        ids = torch.tensor(prompts, device=self.device)
        real = compat.padding_mask(padding, len(prompts), ids.shape[1], self.device)
        context = prefilled.width + together.extra
        contexts = [tokens[:context] for tokens in prompts]
        beams = generation.beams > 1
        idle = () if beams else together.idle
        watch = Watch(elapsed, generation.stops, idle, length=ids.shape[1], beams=beams)
        hidden = self._hidden(prefilled, generation.hidden_layers)
        asks = generation.options.get("output_attentions", False)
        weighed = bool(asks) and not compat.makes_weights(self.model)
        with (
            self._resumed(prefilled, state, contexts, hidden) as session,
            use(self.model, session, always=weighed),
            compat.left_padding(padding),
            compat.unpadded_processors(self.model, padding),
        ):
            session.start_question(ids.shape[1] - context if generation.assisted else None)
            kv_cache = prefilled.cache
            if generation.loop is not None:
                kv_cache = compat.branched_cache(kv_cache)
            if beams:
                kv_cache = compat.repeated_cache(kv_cache, generation.beams)
                rows = torch.arange(len(prompts)).repeat_interleave(generation.beams)
                # the context's own states are put back by the block that resumed them
                session.layers = session.branched(rows)
            with (
                self._beside(session, generation, kv_cache, ids.shape[1]),
                hidden.handed_out(self.model, kv_cache) if hidden else nullcontext(),
                blaming(generation.code),
            ):
                output = self.model.generate(
                    ids,
                    attention_mask=real,
                    stopping_criteria=[watch],
                    **{self._cache_argument: kv_cache},
                    **generation.options,
                    **negative_prompt(generation, ids),
                )
            overflow = overflow_rows(session.request_state)
        sequences = sequences_of(output, ids)
        return Drawn(
            new_tokens(sequences, ids, watch, generation),
            None if sequences is output else output,
            watch.first_token,
            overflow,
        )

    @contextmanager
    def _beside(
        self, session: Session, generation: Generation, kv_cache: Any, length: int
    ) -> Iterator[None]:
        """What runs beside the answer while it is generated: the states follow the beams, and the
        unconditional branch of guidance and the model as its own assistant get sessions of their
        own; layers for drafts, which are not the model's, need none.

        Args:
            session: What the answer runs.
            generation: The options.
            kv_cache: The cache of the answer, which is no other's.
            length: Tokens of the prompt.
        """
        with ExitStack() as stack:
            if generation.beams > 1:
                stack.enter_context(compat.followed(kv_cache, session.reorder))
            if generation.guided or generation.assistant is not None:
                other = session.pipeline if generation.guided else Pipeline.dense()
                fresh = partial(Session, other, self.layer_types)
                stack.enter_context(set_apart(self.model, kv_cache, fresh))
            if generation.assisted:
                stack.enter_context(compat.without_cached(self.model, kv_cache, length))
            if generation.starts_over:
                stack.enter_context(compat.seeming_empty(self.model, kv_cache, length))
            if generation.assistant is not None:
                stack.enter_context(generation.assistant.drafting(self.model))
            if generation.draft_layers is not None:
                layers = generation.draft_layers
                stack.enter_context(compat.using_draft_layers(self.model, layers))
            yield
