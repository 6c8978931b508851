"""The adapter for transformers models: one prefill per context, any number of questions and
pipelines on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs
import torch

from sah_core import Allowed, Inputs, Pipeline, Request, Response, compat
from sah_core.attention import Session
from sah_core.errors import ContextTooLongError, ParameterError, RequestError
from sah_core.patching import use
from sah_core.requests import AnswerDetail, Likelihood

from .captured import CapturedDecode
from .generation import FirstToken, generation_options
from .loading import Loaded, load_model
from .prefilled import ContextState, Prefilled, shared_context
from .prompts import Prompt, build_prompts

ROOM = 256
"""Tokens of cache taken ahead for generation."""
REQUEST_OPTIONS = ("max_context_length", "truncation", "chat", "prefill_chunk_size")


class HuggingFaceAdapter:
    """A transformers causal language model with a pipeline attached.

    Args:
        model_name: Alias, hub id, local folder or GGUF file.
        pipeline: What `process_request` runs; a `Pipeline` or its text.
        model_kwargs: For ``from_pretrained`` of the model; not changed.
        tokenizer_kwargs: For ``from_pretrained`` of the tokenizer; not changed.
        device: ``cpu``, ``cuda``, ...; CUDA if available when None.
        dtype: Type of the weights; float32 on the CPU and bfloat16 on CUDA when None.

    Raises:
        ModelNotFoundError: If the name leads nowhere.
        UnsupportedError: If the model's attention cannot be patched.
    """

    name: ClassVar[str] = "hf"

    def __init__(
        self,
        model_name: str,
        *,
        pipeline: Pipeline | str = "dense",
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.pipeline = Pipeline.parse(pipeline)
        self._take(
            load_model(
                model_name,
                model_kwargs=model_kwargs,
                tokenizer_kwargs=tokenizer_kwargs,
                device=device,
                dtype=dtype,
            )
        )

    @classmethod
    def of(cls, loaded: Loaded, pipeline: Pipeline | str = "dense") -> HuggingFaceAdapter:
        """An adapter around a model that is loaded already."""
        adapter = cls.__new__(cls)
        adapter.pipeline = Pipeline.parse(pipeline)
        adapter._take(loaded)
        return adapter

    def _take(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        compat.keep_softcap(self.model)
        self.tokenizer: Any = loaded.tokenizer
        self.layer_types = compat.layer_types(self.model)
        self._cache_argument = compat.cache_argument(type(self.model).forward)

    @property
    def max_context(self) -> int | None:
        """Tokens that the model allows for prompt and answer together; None if it does not say."""
        limit = getattr(compat.text_config(self.model), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return torch.device(self.model.get_input_embeddings().weight.device)

    def identity(self) -> dict[str, Any]:
        """What makes results of this model comparable: label, weights hash and dtype."""
        return {
            "adapter": self.name,
            "model": self.loaded.source.label,
            "weights": self.loaded.weights_hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    # Requests

    def process_request(
        self,
        request: Request,
        generation_kwargs: Mapping[str, Any] | None = None,
        request_kwargs: Mapping[str, Any] | None = None,
        *,
        observers: Sequence[object] = (),
    ) -> Response:
        """Answer all questions of a request with the adapter's pipeline.

        Args:
            request: Context and questions.
            generation_kwargs: For transformers' ``generate``; not changed. Greedy decoding of at
                most 64 new tokens unless it says otherwise.
            request_kwargs: ``max_context_length`` (tokens of context kept), ``truncation`` (middle,
                head or none), ``chat`` (use the chat template) and ``prefill_chunk_size`` (tokens
                per prefill step).
            observers: Objects with observer hooks.

        Returns:
            One answer for a str question, a list for several.

        Raises:
            ContextTooLongError: If prompt and answer do not fit into the model.
            RequestError: For options that are not known.
        """
        # what is wrong with the options should be said before the expensive part
        options = generation_options(self.model, self.tokenizer, generation_kwargs)
        prefilled = self.prefill(
            request,
            request_kwargs,
            self.pipeline,
            new_tokens=options["max_new_tokens"],
            observers=observers,
        )
        return self.answer(prefilled, self.pipeline, generation_kwargs, observers=observers)

    @torch.no_grad()
    def prefill(
        self,
        request: Request,
        request_kwargs: Mapping[str, Any] | None = None,
        pipeline: Pipeline | str | None = None,
        *,
        new_tokens: int = 0,
        observers: Sequence[object] = (),
    ) -> Prefilled:
        """Run the context once.

        Args:
            request: Context and questions.
            request_kwargs: As for `process_request`.
            pipeline: Only needed where its prefill is sparse; dense otherwise.
            new_tokens: Tokens that are going to be generated, as far as known: whether they fit is
                checked, and room is taken for them.
            observers: Objects with observer hooks; only a sparse prefill has something to observe.
        """
        options = dict(request_kwargs or {})
        unknown = sorted(set(options) - set(REQUEST_OPTIONS))
        if unknown:
            raise RequestError(
                f"request option {unknown[0]!r} is not known; "
                f"options are {', '.join(REQUEST_OPTIONS)}"
            )
        chunk = options.pop("prefill_chunk_size", None)
        if chunk is not None and (
            isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1
        ):
            raise ParameterError("request", "prefill_chunk_size", chunk, "an integer >= 1")
        prompts = build_prompts(request, self.tokenizer, **options)
        longest = max(len(p.ids) for p in prompts)
        self._check_length(longest, new_tokens)
        shared = shared_context(prompts)
        kv_cache = compat.make_cache(self.model, longest + max(ROOM, new_tokens))
        session = None
        if pipeline is not None:
            parsed = Pipeline.parse(pipeline)
            if "prefill" in parsed.phases and not parsed.is_dense:
                session = Session(parsed, self.layer_types)
        watched = session and self._watched(session, observers)
        begin = self._now()
        self._extend(kv_cache, prompts[0].ids[:shared], 0, watched, chunk)
        seconds = self._now() - begin - (watched.observer_seconds if watched else 0.0)
        base = compat.snapshot_cache(kv_cache)
        return Prefilled(request, prompts, shared, kv_cache, base, seconds, session)

    @torch.no_grad()
    def answer(
        self,
        prefilled: Prefilled,
        pipeline: Pipeline | str | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        observers: Sequence[object] = (),
        indices: Sequence[int] | None = None,
    ) -> Response:
        """Answer questions from a prefilled context.

        Args:
            prefilled: What `prefill` returned; it can be used again, by other pipelines too.
            pipeline: What to run on question and generated tokens; the adapter's when None.
            generation_kwargs: For ``generate``; not changed.
            observers: Objects with observer hooks.
            indices: Which questions; all when None.

        Raises:
            RequestError: If the prefill was sparse and belongs to another pipeline.
        """
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        options = generation_options(self.model, self.tokenizer, generation_kwargs)
        state = self._state(prefilled, parsed)
        session = self._watched(state.session, observers)
        request = prefilled.request
        session.observe("sah_request_begin", request=request, pipeline=parsed)
        session.observe(
            "sah_prefill_end",
            layer_count=len(self.layer_types),
            context_tokens=prefilled.context_tokens,
        )
        chosen = range(len(prefilled.prompts)) if indices is None else indices
        details = tuple(
            self._generate(prefilled, attrs.evolve(state, session=session), index, options)
            for index in chosen
        )
        single = isinstance(request.questions, str)
        texts = [d.text for d in details]
        response = Response(responses=texts[0] if single else texts, details=details)
        session.observe("sah_request_end", request=request, response=response)
        return response

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
                to another pipeline.
        """
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        state = self._state(prefilled, parsed)
        session = self._watched(state.session, observers)
        state = attrs.evolve(state, session=session)
        chosen = range(len(prefilled.prompts)) if indices is None else indices
        return tuple(self._score(prefilled, state, index, step) for index in chosen)

    # Parts

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
        with self._resumed(prefilled, state, prompt) as session, use(self.model, session):
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
        watched = Session(session.pipeline, self.layer_types, observers=observers)
        watched.layers, watched.request_state = session.layers, session.request_state
        return watched

    @torch.no_grad()
    def capture_decode(
        self,
        prefilled: Prefilled,
        pipeline: Pipeline | str | None = None,
        *,
        index: int = 0,
        room: int = 256,
    ) -> CapturedDecode:
        """Answer one question greedily with the decode step captured in a CUDA graph.

        Args:
            prefilled: What `prefill` returned; using it otherwise ends the loop's validity.
            pipeline: What to run; the adapter's when None.
            index: Which question.
            room: Most tokens to be decoded after the first.

        Returns:
            The loop, its first token (chosen from the question) waiting to be fed.

        Raises:
            UnsupportedError: If pipeline or model cannot be captured.
        """
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        state, prompt = self._state(prefilled, parsed), prefilled.prompts[index]
        batch = prefilled.batch
        asked = [prompt.ids[prompt.context_tokens :]] * batch
        seen = torch.ones(batch, len(prompt.ids), dtype=torch.long, device=self.device)
        with self._resumed(prefilled, state, prompt) as session, use(self.model, session):
            session.start_question()
            output = self.model(
                input_ids=torch.tensor(asked, device=self.device),
                attention_mask=seen,
                logits_to_keep=1,
                use_cache=True,
                **{self._cache_argument: prefilled.cache},
            )
            live = Session(parsed, self.layer_types)
            live.layers, live.request_state = session.layers, session.request_state
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        return CapturedDecode(self.model, live, prefilled.cache, token, room=room)

    def _state(self, prefilled: Prefilled, pipeline: Pipeline) -> ContextState:
        """The pipeline's states over the context, built once per context."""
        key = pipeline.text
        if key in prefilled.states:
            return prefilled.states[key]
        session = prefilled.session
        if session is None:
            if "prefill" in pipeline.phases and not pipeline.is_dense:
                raise RequestError(
                    f"pipeline '{key}' prefills sparsely and cannot answer from a dense prefill"
                )
            session = Session(pipeline, self.layer_types)
        elif session.pipeline.text != key:
            raise RequestError(
                f"this context was prefilled by '{session.pipeline.text}'; '{key}' needs its own"
            )
        compat.restore_cache(prefilled.cache, prefilled.base)
        before = session.snapshot() if session is prefilled.session else None
        begin = self._now()
        self._end_context(session, prefilled.cache)
        keeps = any(step.is_stateful() for step in pipeline.steps)
        seconds = self._now() - begin if keeps else 0.0
        prefilled.states[key] = ContextState(session, session.snapshot(), before, seconds)
        return prefilled.states[key]

    def _end_context(self, session: Session, kv_cache: Any) -> None:
        """Tell the states that the cache holds the context and nothing else."""
        if session.pipeline.steps:
            session.end_prefill(self._cached_inputs(kv_cache))

    def _cached_inputs(self, kv_cache: Any) -> dict[int, Inputs]:
        """Per layer a call without query rows over the cached keys."""
        calls = {}
        config = compat.text_config(self.model)
        heads = int(config.num_attention_heads)
        for layer, key, value in compat.cached_tensors(kv_cache):
            if self.layer_types[layer] != "full_attention":
                continue
            key_len = key.shape[2]
            calls[layer] = Inputs(
                query=key.new_empty((key.shape[0], heads, 0, key.shape[3])),
                key=key,
                value=value,
                allowed=Allowed.causal(0, key_len, device=key.device),
                scaling=key.shape[3] ** -0.5,
                key_len=key_len,
                layer=layer,
                layer_count=len(self.layer_types),
                layer_type=self.layer_types[layer],
                phase="prefill",
            )
        return calls

    def _extend(
        self,
        kv_cache: Any,
        ids: Sequence[int],
        past: int,
        session: Session | None,
        chunk: int | None = None,
    ) -> None:
        """Run context tokens through the model, as it is or through a session."""
        step = chunk or max(1, len(ids))
        for begin in range(0, len(ids), step):
            piece = torch.tensor([ids[begin : begin + step]], device=self.device)
            mask = torch.ones(
                1, past + begin + piece.shape[1], dtype=torch.long, device=self.device
            )
            arguments = {
                "input_ids": piece,
                "attention_mask": mask,
                "logits_to_keep": 1,
                self._cache_argument: kv_cache,
                "use_cache": True,
            }
            if session is None:
                self.model(**arguments)
                continue
            session.phase = "prefill"
            with use(self.model, session):
                self.model(**arguments)
            session.phase = None

    @contextmanager
    def _resumed(
        self, prefilled: Prefilled, state: ContextState, prompt: Prompt
    ) -> Iterator[Session]:
        """Cache and states at the end of a prompt's context.

        A prompt may share more with its context than the questions share with each other: the last
        tokens of the context may merge with the start of some questions only. The states then end
        where they end for this question alone.
        """
        compat.restore_cache(prefilled.cache, prefilled.base)
        session, extra = state.session, prompt.ids[prefilled.shared : prompt.context_tokens]
        kept = session.layers, session.request_state
        try:
            if not extra:
                session.restore(state.ended)
            elif state.open is not None:
                session.restore(state.open)
                self._extend(prefilled.cache, extra, prefilled.shared, session)
                self._end_context(session, prefilled.cache)
            else:
                session.layers, session.request_state = {}, {}
                self._extend(prefilled.cache, extra, prefilled.shared, None)
                self._end_context(session, prefilled.cache)
            yield session
        finally:
            session.layers, session.request_state = kept

    def _generate(
        self, prefilled: Prefilled, state: ContextState, index: int, options: dict[str, Any]
    ) -> AnswerDetail:
        prompt = prefilled.prompts[index]
        self._check_length(len(prompt.ids), options["max_new_tokens"])
        begin = self._now()
        observed = state.session.observer_seconds
        question = torch.tensor([prompt.ids[prompt.context_tokens :]], device=self.device)
        clock = FirstToken(
            lambda: self._now() - begin - (state.session.observer_seconds - observed)
        )
        with self._resumed(prefilled, state, prompt) as session, use(self.model, session):
            session.start_question()
            output = self.model.generate(
                question,
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long, device=self.device),
                **{self._cache_argument: prefilled.cache},
                **clock.added_to(options),
            )
        seconds = self._now() - begin - (session.observer_seconds - observed)
        new = tuple(output[0, question.shape[1] :].tolist())
        ended = bool(new) and new[-1] in (options["eos_token_id"] or ())
        finished = "eos" if ended else "length" if len(new) >= options["max_new_tokens"] else "stop"
        return AnswerDetail(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            token_ids=new,
            prompt_tokens=len(prompt.ids),
            context_tokens=prompt.context_tokens,
            new_tokens=len(new),
            seconds_prefill=prefilled.seconds,
            seconds_decode=seconds,
            finished=finished,
            backends=tuple(sorted(session.backends_used)),
            seconds_first_token=seconds if clock.seconds is None else clock.seconds,
            seconds_index=state.seconds,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
