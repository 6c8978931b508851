"""Contexts in a model's cache, and what the maskers keep of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch

from sah_core import Allowed, Inputs, Pipeline, compat
from sah_core.attention import Session
from sah_core.errors import ContextTooLongError, RequestError
from sah_core.patching import use
from sah_core.probing import check_fit

from .loading import Loaded
from .prefilled import ContextState, Prefilled


class Reader:
    """A loaded model that reads contexts: what the adapter's methods stand on."""

    def _take(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        compat.keep_softcap(self.model)
        self.tokenizer: Any = loaded.tokenizer
        self.layer_types = compat.layer_types(self.model)
        self._assistants: dict[str, tuple[Any, Any]] = {}
        self._draft_layers: Any = None
        self._biases: dict[int, dict[tuple[int, ...], float] | None] = {}
        self.devices = compat.devices_of(self.model)
        self._cache_argument = compat.cache_argument(type(self.model).forward)

    @property
    def max_context(self) -> int | None:
        """Tokens that the model allows for prompt and answer together; None if it does not say."""
        limit = getattr(compat.text_config(self.model), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return compat.input_device(self.model)

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse what does not fit into the model."""
        limit, tokens = self.max_context, prompt_tokens + new_tokens
        if limit is not None and tokens > limit:
            what = "the model's context" + (", new tokens included," if new_tokens else "")
            raise ContextTooLongError(tokens, limit, what)

    def _watched(self, session: Session, observers: Sequence[object]) -> Session:
        """A session with observers on the states of another one."""
        if not observers:
            return session
        return self._on_states_of(session, observers)

    def _on_states_of(self, session: Session, observers: Sequence[object] = ()) -> Session:
        """A session on the states of another one, with observers of its own."""
        other = Session(session.pipeline, self.layer_types, observers=observers)
        other.layers, other.request_state = session.layers, session.request_state
        return other

    def _state(self, prefilled: Prefilled, pipeline: Pipeline) -> ContextState:
        """The pipeline's states over the context, built once per context."""
        key = pipeline.text
        if key in prefilled.states:
            return prefilled.states[key]
        check_fit(self.model, pipeline)
        session = prefilled.session
        if session is None:
            if pipeline.prefills:
                raise RequestError(
                    f"pipeline '{key}' prefills sparsely and cannot answer from a dense prefill"
                )
            session = Session(pipeline, self.layer_types)
        elif session.pipeline.text != key:
            raise RequestError(
                f"this context was prefilled by '{session.pipeline.text}'; '{key}' needs its own"
            )
        compat.restore_cache(prefilled.cache, prefilled.base)
        begin = self._now()
        self._end_context(session, prefilled.cache, getattr(prefilled, "padding", ()))
        keeps = any(step.is_stateful() for step in pipeline.steps)
        seconds = self._now() - begin if keeps else 0.0
        prefilled.states[key] = ContextState(session, session.snapshot(), seconds)
        return prefilled.states[key]

    def _hidden(self, prefilled: Prefilled, layers: tuple[int, ...]) -> compat.HiddenStates | None:
        """Hidden states of the contexts at some layers, None for no layers; contexts whose prefill
        has not kept them are read once more.
        """
        if not layers:
            return None
        if prefilled.hidden is None or prefilled.hidden.layers != layers:
            session = prefilled.session
            fresh = session and Session(session.pipeline, self.layer_types)
            hidden = compat.HiddenStates(layers)
            compat.restore_cache(prefilled.cache, prefilled.empty)
            with hidden.recorded(self.model, prefilled.cache):
                pieces = [row.cached for row in prefilled.rows]
                padding, chunk = prefilled.padding, prefilled.chunk
                self._extend(prefilled.cache, pieces, 0, fresh, padding, chunk)
            prefilled.hidden = hidden
        return attrs.evolve(prefilled.hidden)

    def _end_context(self, session: Session, kv_cache: Any, padding: Sequence[int] = ()) -> None:
        """Tell the states that the cache holds the context and nothing else."""
        if session.pipeline.steps:
            # layer by layer, since keys that are kept elsewhere are on the device meanwhile
            for call in self._cached_inputs(kv_cache, padding):
                session.end_prefill({call.layer: call})

    def _cached_inputs(self, kv_cache: Any, padding: Sequence[int]) -> Iterator[Inputs]:
        """Per layer a call without query rows over the cached keys."""
        limits: dict[tuple[int, torch.device], Allowed] = {}
        config = compat.text_config(self.model)
        heads = int(config.num_attention_heads)
        for layer, key, value in compat.cached_tensors(kv_cache):
            # keys that attention never sees as they are cached come to the states by the question
            if self.layer_types[layer] != "full_attention" or compat.caches_latents(self.model):
                continue
            key_len = key.shape[2]
            place = key_len, key.device
            if place not in limits:
                limits[place] = compat.causal_limits(0, key_len, key.device, padding)
            yield Inputs(
                query=key.new_empty((key.shape[0], heads, 0, key.shape[3])),
                key=key,
                value=value,
                allowed=limits[place],
                scaling=key.shape[3] ** -0.5,
                key_len=key_len,
                layer=layer,
                layer_count=len(self.layer_types),
                layer_type=self.layer_types[layer],
                phase="prefill",
            )

    def _extend(
        self,
        kv_cache: Any,
        pieces: Sequence[Sequence[int]],
        past: int,
        session: Session | None,
        padding: Sequence[int] = (),
        chunk: int | None = None,
    ) -> None:
        """Run context tokens through the model, as it is or through a session.

        Args:
            kv_cache: The cache that they join.
            pieces: Token ids of every row, equally many.
            past: Positions that the cache holds.
            session: Attached for the pass, as a prefill.
            padding: Leading positions of every row that are no tokens of it.
            chunk: Tokens per pass; all at once when None.
        """
        ids = torch.tensor(list(map(list, pieces)), dtype=torch.long, device=self.device)
        real = compat.padding_mask(padding, len(pieces), past + ids.shape[1], self.device)
        position = (real.cumsum(-1) - 1).clamp(min=0)
        step = chunk or max(1, ids.shape[1])
        for begin in range(0, ids.shape[1], step):
            end = min(begin + step, ids.shape[1])
            arguments = {
                "input_ids": ids[:, begin:end],
                "attention_mask": real[:, : past + end],
                "logits_to_keep": 1,
                self._cache_argument: kv_cache,
                "use_cache": True,
            }
            if any(padding):
                arguments["position_ids"] = position[:, past + begin : past + end]
            with compat.left_padding(padding):
                if session is None:
                    self.model(**arguments)
                    continue
                session.phase = "prefill"
                with use(self.model, session):
                    self.model(**arguments)
                session.phase = None

    @contextmanager
    def _resumed(
        self,
        prefilled: Prefilled,
        state: ContextState,
        contexts: Sequence[Sequence[int]],
        hidden: compat.HiddenStates | None = None,
    ) -> Iterator[Session]:
        """Cache and states at the end of the contexts of some prompts.

        A prompt may share more with its context than the questions share with each other: the last
        tokens of the context may merge with the start of some questions only. The states then end
        where they end for this question alone. What a sparse prefill selects may depend on where
        its passes end, so that it then reads the whole context again. A context may also end before
        what the cache holds; it is read again where the cache cannot drop its last tokens.

        Args:
            prefilled: The contexts.
            state: The pipeline's state over them.
            contexts: The tokens of every row up to the end of the context, padding included.
            hidden: Hidden states of the contexts; those of what is read here join them.
        """
        compat.restore_cache(prefilled.cache, prefilled.base)
        session = state.session
        kept = session.layers, session.request_state
        recorded = hidden.recorded(self.model, prefilled.cache) if hidden else nullcontext()
        try:
            if len(contexts[0]) == prefilled.width:
                session.restore(state.ended)
            else:
                session.layers, session.request_state = {}, {}
                with recorded:
                    self._reread(prefilled, session, contexts)
                self._end_context(session, prefilled.cache, prefilled.padding)
            yield session
        finally:
            session.layers, session.request_state = kept

    def _reread(
        self, prefilled: Prefilled, session: Session, contexts: Sequence[Sequence[int]]
    ) -> None:
        """Bring the cache to the end of other contexts than those that it holds: of the same
        tokens, but more or less of them.
        """
        kv_cache, padding = prefilled.cache, prefilled.padding
        past, length = prefilled.width, len(contexts[0])
        sparse = prefilled.session is not None
        if length > past and not sparse:
            extra = [tokens[past:] for tokens in contexts]
            self._extend(kv_cache, extra, past, None, padding)
        elif not sparse and compat.can_shorten(kv_cache):
            compat.keep_displaced(kv_cache, prefilled.base, length)
            compat.shorten_cache(kv_cache, length)
        else:
            compat.keep_displaced(kv_cache, prefilled.base, 0)
            compat.restore_cache(kv_cache, prefilled.empty)
            quiet = self._on_states_of(session) if sparse else None
            self._extend(kv_cache, contexts, 0, quiet, padding, prefilled.chunk)

    def _now(self) -> float:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()
