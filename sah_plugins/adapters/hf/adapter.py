"""The adapter for transformers models: one prefill per context, any number of questions and
pipelines on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import attrs
import torch

from sah_core import Pipeline, Request, Response, compat
from sah_core.attention import Session
from sah_core.errors import ParameterError, RequestError, short_repr
from sah_core.patching import use
from sah_core.probing import check_fit, check_padding, check_reading
from sah_core.requests import AnswerDetail

from .captured import CapturedDecode
from .foreign_code import identified
from .generation import Generation, generation_options
from .healing import Healer
from .loading import Loaded, check_name, load_model
from .options import check_options, merged
from .prefilled import Prefilled, check_alone, check_questions, padded_rows, same_lengths
from .prompts import build_prompts, request_options, stripped
from .refusals import refuse
from .rounds import rounds

ROOM = 256
"""Tokens of cache taken ahead for generation."""
BATCH_SIZE = 8
"""Contexts that `process_requests` reads together unless it is told otherwise."""


class HuggingFaceAdapter(Healer):
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

    @classmethod
    def check_generation(cls, generation_kwargs: Mapping[str, Any] | None) -> None:
        """Find what is wrong with generation options before any model is loaded.

        Args:
            generation_kwargs: As for `process_request`.

        Raises:
            RequestError: For an option that does not exist or has no place here, or a combination
                that makes no sense.
            ParameterError: For a value that is out of range.
        """
        check_options(generation_kwargs)

    @classmethod
    def plain_generation(cls, generation_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options with the content of a ``generation_config`` in the place of its name.

        Args:
            generation_kwargs: As for `process_request`; not changed.

        Raises:
            RequestError: If the config cannot be read.
        """
        return merged(generation_kwargs or {})

    @classmethod
    def generation_identity(cls, generation_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options with a hash of the code that they ask for in the place of where it lies.

        Args:
            generation_kwargs: As for `process_request`; not changed.

        Raises:
            RequestError: If the code is not there.
        """
        return identified(merged(generation_kwargs or {}))

    @classmethod
    def check_model(cls, model_name: str) -> None:
        """Find out, without loading it, that a model is not there.

        Raises:
            ModelNotFoundError: The name leads to no model.
        """
        check_name(model_name)

    def check_pipeline(self, pipeline: Pipeline | str) -> None:
        """Find out, before anything is read, that a pipeline cannot run on the model.

        Raises:
            UnsupportedError: If the model cannot be patched, or a masker asks for what it is not
                given.
            PipelineError: If the pipeline applies to no layer.
            ArtifactError: If an artefact is not there, or was made from other weights.
        """
        check_fit(self.model, Pipeline.parse(pipeline))

    def identity(self) -> dict[str, Any]:
        """What makes results of this model comparable: label, weights hash and dtype."""
        return {
            "adapter": self.name,
            "model": self.loaded.source.label,
            "weights": self.loaded.weights_hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

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
                most 64 new tokens unless it says otherwise. ``seed`` makes sampling reproducible:
                every question's draws start from it, and the global generators are left alone.
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
        generation = self._prepared([request], generation_kwargs, request_kwargs)
        prefilled = self.prefill(
            request,
            request_kwargs,
            self.pipeline,
            new_tokens=generation.new_tokens,
            observers=observers,
            generation_kwargs=generation_kwargs,
        )
        return self.answer(prefilled, self.pipeline, generation_kwargs, observers=observers)

    def process_requests(
        self,
        requests: Sequence[Request],
        generation_kwargs: Mapping[str, Any] | None = None,
        request_kwargs: Mapping[str, Any] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        observers: Sequence[object] = (),
    ) -> list[Response]:
        """Answer several requests, their contexts read together in batches with left padding.

        Greedy answers are those of `process_request` for each alone, as far as the arithmetic of
        the model does not depend on the batch (in float32 it hardly does). Questions of equal
        length run together; a row whose request has none of that length idles meanwhile, so
        requests with equally long questions gain most.

        Args:
            requests: Contexts and questions, of any lengths and numbers.
            generation_kwargs: As for `process_request`. Draws of a row depend on the other rows.
            request_kwargs: As for `process_request`, the same for all.
            batch_size: Contexts that are read together; assisted generation takes one at a time,
                and so do a sparse prefill in chunks, whose choices may depend on where each
                context is cut, and a quantised cache, which shares scales.
            observers: Objects with observer hooks. They see whole batches, rows that idle or have
                ended included.

        Returns:
            One response per request, in order.

        Raises:
            ParameterError: If ``batch_size`` is no positive integer.
            ContextTooLongError: As for `process_request`.
            RequestError: Likewise.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ParameterError("request", "batch_size", batch_size, "an integer >= 1")
        generation = self._prepared(requests, generation_kwargs, request_kwargs)
        chunk = request_options(request_kwargs)[1] or generation.keeping.chunk
        in_pieces = chunk is not None and self.pipeline.prefills
        if generation.assisted or in_pieces or generation.keeping.reads_alone:
            batch_size = 1
        responses: list[Response] = []
        for begin in range(0, len(requests), batch_size):
            prefilled = self.prefill_batch(
                requests[begin : begin + batch_size],
                request_kwargs,
                self.pipeline,
                new_tokens=generation.new_tokens,
                observers=observers,
                generation_kwargs=generation_kwargs,
            )
            responses += self.answer_batch(
                prefilled, self.pipeline, generation_kwargs, observers=observers
            )
            del prefilled
        return responses

    def prefill(
        self,
        request: Request,
        request_kwargs: Mapping[str, Any] | None = None,
        pipeline: Pipeline | str | None = None,
        *,
        new_tokens: int = 0,
        observers: Sequence[object] = (),
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> Prefilled:
        """Run the context once.

        Args:
            request: Context and questions.
            request_kwargs: As for `process_request`.
            pipeline: Only needed where its prefill is sparse; dense otherwise.
            new_tokens: Tokens that are going to be generated, as far as known: whether they fit is
                checked, and room is taken for them.
            observers: Objects with observer hooks; only a sparse prefill has something to observe.
            generation_kwargs: What the answers will be asked with; read for the options that say
                how the context is kept (``cache_implementation``, ``cache_config``,
                ``max_cache_len``) and read (``prefill_chunk_size``), and whether drafts start from
                its hidden states.
        """
        return self.prefill_batch(
            [request],
            request_kwargs,
            pipeline,
            new_tokens=new_tokens,
            observers=observers,
            generation_kwargs=generation_kwargs,
        )

    @torch.no_grad()
    def prefill_batch(
        self,
        requests: Sequence[Request],
        request_kwargs: Mapping[str, Any] | None = None,
        pipeline: Pipeline | str | None = None,
        *,
        new_tokens: int = 0,
        observers: Sequence[object] = (),
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> Prefilled:
        """Run several contexts at once, left-padded to the longest.

        Args:
            requests: Contexts and questions.
            request_kwargs: As for `process_request`, the same for all.
            pipeline: As for `prefill`.
            new_tokens: As for `prefill`.
            observers: As for `prefill`.
            generation_kwargs: As for `prefill`.

        Raises:
            RequestError: For contexts of different lengths and a sparse prefill in chunks; for
                several contexts and a quantised cache; for options as in `process_request`.
            UnsupportedError: If the model reads a text in pieces, or behind padding, otherwise than
                at once, or its layers cannot be kept as the options say.
        """
        options, chunk = request_options(request_kwargs)
        keeping, hidden = self._kept_for(generation_kwargs)
        chunk = chunk or keeping.chunk
        if not requests:
            raise RequestError("there is no request")
        for request in requests:
            if not isinstance(request, Request):
                raise RequestError(f"{short_repr(request)} is no request; expected a Request")
        prompts = [build_prompts(request, self.tokenizer, **options) for request in requests]
        self._check_length(max(len(p.ids) for made in prompts for p in made), new_tokens)
        rows = padded_rows(requests, prompts)
        longest = max(row.padding + len(p.ids) for row in rows for p in row.prompts)
        check_reading(self.model)
        if any(row.padding for row in rows):
            check_padding(self.model)
        if keeping.reads_alone and len(rows) > 1:
            raise RequestError(
                "a quantised cache takes one context at a time, for what it shares between "
                "sequences would depend on the others; prefill these alone"
            )
        kv_cache = keeping.new_cache(self.model, longest + max(ROOM, new_tokens))
        session = None
        if pipeline is not None:
            parsed = Pipeline.parse(pipeline)
            if parsed.prefills:
                check_fit(self.model, parsed)
                if chunk is not None and any(row.padding for row in rows):
                    raise RequestError(
                        "a sparse prefill in chunks reads contexts of equal length together, for "
                        "its choices may depend on where each is cut; prefill these alone"
                    )
                session = Session(parsed, self.layer_types)
        watched = session and self._watched(session, observers)
        empty = compat.snapshot_cache(kv_cache)
        begin = self._now()
        pieces = [row.cached for row in rows]
        padding = tuple(row.padding for row in rows)
        with hidden.recorded(self.model, kv_cache) if hidden else nullcontext():
            self._extend(kv_cache, pieces, 0, watched, padding, chunk)
        seconds = self._now() - begin - (watched.observer_seconds if watched else 0.0)
        base = compat.snapshot_cache(kv_cache)
        return Prefilled(
            rows, kv_cache, base, seconds, session, empty, chunk, keeping, hidden=hidden
        )

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
            generation_kwargs: As for `process_request`.
            observers: Objects with observer hooks.
            indices: Which questions; all when None.

        Raises:
            RequestError: If the prefill was sparse and belongs to another pipeline, or is of
                several contexts, or does not ask such a question.
        """
        check_alone(prefilled, "answer", "answer_batch answers them all")
        [response] = self.answer_batch(
            prefilled,
            pipeline,
            generation_kwargs,
            observers=observers,
            indices=None if indices is None else [indices],
        )
        return response

    @torch.no_grad()
    def answer_batch(
        self,
        prefilled: Prefilled,
        pipeline: Pipeline | str | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        observers: Sequence[object] = (),
        indices: Sequence[Sequence[int]] | None = None,
    ) -> list[Response]:
        """Answer questions from contexts that were prefilled together.

        Args:
            prefilled: What `prefill_batch` returned.
            pipeline: As for `answer`.
            generation_kwargs: As for `process_request`.
            observers: Objects with observer hooks.
            indices: Which questions of each request; all when None.

        Returns:
            One response per request, in order.
        """
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        generation = generation_options(self.model, self.tokenizer, generation_kwargs)
        refuse(parsed, generation, self.model, len(prefilled.rows))
        prefilled.keeping.check_answered(generation.keeping)
        generation = self._assisted(generation)
        rows = prefilled.rows
        asked = [range(len(row.prompts)) for row in rows] if indices is None else indices
        if len(asked) != len(rows):
            raise RequestError(
                f"there are indices for {len(asked)} requests; {len(rows)} were prefilled"
            )
        for row, chosen in zip(rows, asked, strict=True):
            check_questions(row, chosen)
        if generation.heals:
            rows = self._stripped(rows, asked)
        for row, chosen in zip(rows, asked, strict=True):
            for index in chosen:
                tokens = len(row.prompts[index].ids)
                self._check_length(tokens, generation.behind(tokens).new_tokens)
        state = self._state(prefilled, parsed)
        self._hidden(prefilled, generation.hidden_layers)
        if generation.heals:
            prefilled = self._healed(attrs.evolve(prefilled, rows=rows), state, asked)
            rows = prefilled.rows
        session = self._watched(state.session, observers)
        state = attrs.evolve(state, session=session)
        for row in rows:
            session.observe("sah_request_begin", request=row.request, pipeline=parsed)
            session.observe(
                "sah_prefill_end",
                layer_count=len(self.layer_types),
                context_tokens=max(p.context_tokens for p in row.prompts),
            )
        details: dict[tuple[int, int], AnswerDetail] = {}
        for together in rounds(rows, asked, whole=generation.counts_prompt):
            tokens = together.prompt_tokens(rows)
            made = self._generate(prefilled, state, together, generation.behind(tokens))
            for number, (asks, detail) in enumerate(zip(together.asked, made, strict=True)):
                if asks is not None and detail is not None:
                    details[number, asks] = detail
        responses = []
        for number, row in enumerate(rows):
            own = tuple(details[number, index] for index in asked[number])
            texts = [detail.text for detail in own]
            single = isinstance(row.request.questions, str) and bool(texts)
            responses.append(Response(responses=texts[0] if single else texts, details=own))
            session.observe("sah_request_end", request=row.request, response=responses[-1])
        return responses

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
            index: Which question; of contexts that were prefilled together, that of each.
            room: Most tokens to be decoded after the first.

        Returns:
            The loop, its first token (chosen from the question) waiting to be fed.

        Raises:
            UnsupportedError: If pipeline or model cannot be captured.
            RequestError: If contexts that were prefilled together, or their questions, differ in
                length.
        """
        prompts = same_lengths(prefilled.rows, index)
        parsed = self.pipeline if pipeline is None else Pipeline.parse(pipeline)
        state = self._state(prefilled, parsed)
        asked = [prompt.ids[prompt.context_tokens :] for prompt in prompts]
        seen = torch.ones(len(asked), len(prompts[0].ids), dtype=torch.long, device=self.device)
        contexts = [prompt.ids[: prompt.context_tokens] for prompt in prompts]
        resumed = self._resumed(prefilled, state, contexts)
        with resumed as session, use(self.model, session):
            session.start_question()
            output = self.model(
                input_ids=torch.tensor(asked, device=self.device),
                attention_mask=seen,
                logits_to_keep=1,
                use_cache=True,
                **{self._cache_argument: prefilled.cache},
            )
            live = self._on_states_of(session)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        return CapturedDecode(self.model, live, prefilled.cache, token, room=room)

    def _prepared(
        self,
        requests: Sequence[Request],
        generation_kwargs: Mapping[str, Any] | None,
        request_kwargs: Mapping[str, Any] | None,
    ) -> Generation:
        """The options of some requests, after all that can be found wrong before one is read."""
        self.check_pipeline(self.pipeline)
        generation = generation_options(self.model, self.tokenizer, generation_kwargs)
        refuse(self.pipeline, generation, self.model, 1)
        generation.keeping.new_cache(self.model, 1)
        generation = self._assisted(generation)
        if generation.counts_prompt:
            options, _ = request_options(request_kwargs)
            for request in requests:
                for prompt in build_prompts(request, self.tokenizer, **options):
                    counted = stripped(prompt, self.tokenizer) if generation.heals else prompt
                    generation.behind(len(counted.ids))
        return generation
