"""The adapter for transformers models: one prefill per context, any number of questions and
pipelines on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch

from sah_core import Allowed, Inputs, Pipeline, Request, Response, compat
from sah_core.attention import Session, Snapshot
from sah_core.errors import ContextTooLongError, ParameterError, RequestError
from sah_core.patching import use
from sah_core.requests import AnswerDetail

from .loading import Loaded, load_model
from .prompts import Prompt, build_prompts

DEFAULT_NEW_TOKENS = 64
ROOM = 256
"""Tokens of cache taken ahead for generation."""
REQUEST_OPTIONS = ("max_context_length", "truncation", "chat", "prefill_chunk_size")


@attrs.define
class Prefilled:
    """A context whose keys and values are ready.

    Attributes:
        request: What is asked.
        prompts: One per question.
        shared: Leading tokens that all prompts share and that the cache holds.
        cache: The KV cache.
        base: Its snapshot after the context.
        seconds: Time of the prefill.
        session: The session that ran it if the prefill was sparse, else None; only that pipeline
            can then answer.
        sessions: States built on this context, per pipeline, and their snapshots.
    """

    request: Request
    prompts: list[Prompt]
    shared: int
    cache: Any
    base: list[Any]
    seconds: float
    session: Session | None = None
    sessions: dict[str, tuple[Session, Snapshot]] = attrs.field(factory=dict)

    @property
    def context_tokens(self) -> int:
        """Tokens of the longest context part among the prompts."""
        return max(p.context_tokens for p in self.prompts)

    @property
    def shareable(self) -> bool:
        """Whether any pipeline with a dense prefill can answer from here."""
        return self.session is None


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
        prefilled = self.prefill(request, request_kwargs, self.pipeline)
        return self.answer(prefilled, self.pipeline, generation_kwargs, observers=observers)

    @torch.no_grad()
    def prefill(
        self,
        request: Request,
        request_kwargs: Mapping[str, Any] | None = None,
        pipeline: Pipeline | str | None = None,
    ) -> Prefilled:
        """Run the context once.

        Args:
            request: Context and questions.
            request_kwargs: As for `process_request`.
            pipeline: Only needed where its prefill is sparse; dense otherwise.
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
        if self.max_context is not None and longest > self.max_context:
            raise ContextTooLongError(longest, self.max_context, "the model's context")
        shared = shared_context(prompts)
        kv_cache = compat.make_cache(self.model, longest + ROOM)
        session = None
        if pipeline is not None:
            parsed = Pipeline.parse(pipeline)
            if "prefill" in parsed.phases and not parsed.is_dense:
                session = Session(parsed, self.layer_types)
        begin = self._now()
        self._extend(kv_cache, prompts[0].ids[:shared], 0, session, chunk)
        seconds = self._now() - begin
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
        session, snapshot = self._session(prefilled, parsed)
        watching = Session(parsed, self.layer_types, observers=observers) if observers else None
        if watching is not None:
            watching.layers, watching.request_state = session.layers, session.request_state
            session = watching
        request = prefilled.request
        session.observe("sah_request_begin", request=request, pipeline=parsed)
        chosen = range(len(prefilled.prompts)) if indices is None else indices
        details = tuple(
            self._generate(prefilled, session, snapshot, prefilled.prompts[i], generation_kwargs)
            for i in chosen
        )
        single = isinstance(request.questions, str)
        texts = [d.text for d in details]
        response = Response(responses=texts[0] if single else texts, details=details)
        session.observe("sah_request_end", request=request, response=response)
        return response

    # Parts

    def _session(self, prefilled: Prefilled, pipeline: Pipeline) -> tuple[Session, Snapshot]:
        """The pipeline's states over the context, built once per context."""
        key = pipeline.text
        if key in prefilled.sessions:
            return prefilled.sessions[key]
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
        if session.pipeline.steps:
            session.end_prefill(self._cached_inputs(prefilled.cache))
        prefilled.sessions[key] = session, session.snapshot()
        return prefilled.sessions[key]

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

    def _generate(
        self,
        prefilled: Prefilled,
        session: Session,
        snapshot: Snapshot,
        prompt: Prompt,
        generation_kwargs: Mapping[str, Any] | None,
    ) -> AnswerDetail:
        kv_cache = prefilled.cache
        compat.restore_cache(kv_cache, prefilled.base)
        session.restore(snapshot)
        options = self._generation_options(generation_kwargs)
        limit, room = self.max_context, options["max_new_tokens"]
        if limit is not None and len(prompt.ids) + room > limit:
            raise ContextTooLongError(
                len(prompt.ids) + room, limit, "the model's context, new tokens included"
            )
        begin = self._now()
        observed = session.observer_seconds
        # a prompt may share more with its context than the questions share with each other
        sparse_prefill = session if prefilled.session is not None else None
        if prompt.context_tokens > prefilled.shared:
            extra = prompt.ids[prefilled.shared : prompt.context_tokens]
            self._extend(kv_cache, extra, prefilled.shared, sparse_prefill)
        question = torch.tensor([prompt.ids[prompt.context_tokens :]], device=self.device)
        session.start_question()
        with use(self.model, session):
            output = self.model.generate(
                question,
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long, device=self.device),
                **{self._cache_argument: kv_cache},
                **options,
            )
        seconds = self._now() - begin - (session.observer_seconds - observed)
        new = tuple(output[0, question.shape[1] :].tolist())
        ended = bool(new) and new[-1] in options["eos_token_id"]
        finished = "eos" if ended else "length" if len(new) >= room else "stop"
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
        )

    def _generation_options(self, generation_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The caller's options with defaults filled in: greedy, every EOS that model or tokenizer
        declare.
        """
        options = dict(generation_kwargs or {})
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
        room = options["max_new_tokens"]
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise ParameterError("generation", "max_new_tokens", room, "an integer >= 1")
        if not options.setdefault("do_sample", False):
            for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
                options.setdefault(name, None)
        eos = options.get("eos_token_id", self.eos_token_ids())
        options["eos_token_id"] = [eos] if isinstance(eos, int) else list(eos)
        if options.get("pad_token_id") is None:
            pad = self.tokenizer.pad_token_id
            options["pad_token_id"] = options["eos_token_id"][0] if pad is None else pad
        if options.get("stop_strings"):
            options.setdefault("tokenizer", self.tokenizer)
        return options

    def eos_token_ids(self) -> list[int]:
        """Every end-of-sequence token that generation config, model config or tokenizer declare."""
        found: list[int] = []
        sources = (
            getattr(self.model.generation_config, "eos_token_id", None),
            getattr(compat.text_config(self.model), "eos_token_id", None),
            getattr(self.tokenizer, "eos_token_id", None),
        )
        for source in sources:
            for token in source if isinstance(source, list | tuple) else [source]:
                if token is not None and int(token) not in found:
                    found.append(int(token))
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def shared_context(prompts: Sequence[Prompt]) -> int:
    """Leading context tokens that all prompts have in common."""
    first = prompts[0].ids
    length = min(p.context_tokens for p in prompts)
    # at least one token must be left for the question's forward pass
    length = min(length, *(len(p.ids) - 1 for p in prompts))
    for prompt in prompts[1:]:
        for index in range(length):
            if prompt.ids[index] != first[index]:
                length = index
                break
    return length
