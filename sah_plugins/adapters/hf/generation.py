"""From what a caller wants of ``generate`` to what it gets."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import RequestError, compat

from .foreign_code import ALL_MOVED, asks_for_code, code_of, load_code
from .kv_cache import Keeping
from .options import ASSISTED, DRAFTING, check_options

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 64
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
OF_THE_CHECKPOINT = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
    "guidance_scale",
    "token_healing",
    "stop_strings",
)
"""Options that a checkpoint may set and that have to be known here."""
GIVEN_CACHE = {
    "use_cache": True,
    "cache_implementation": None,
    "max_cache_len": None,
    "prefill_chunk_size": None,
}
"""What ``generate`` is told of the cache that it is given, whatever the checkpoint says: some carry
``use_cache=False`` from their training, with which the context would not be seen.
"""


@attrs.frozen
class Generation:
    """What one question's generation is to be.

    Attributes:
        options: Arguments of ``generate``; sequences that are drawn, lengths of the whole prompt,
            assistant, negative prompt, seed and stops are not among them.
        stops: The caller's stopping criteria, stop strings included.
        draws: How often to sample.
        beams: Beams; 1 without beam search.
        seed: Of the sampling of each question, or None.
        max_length: Most tokens of prompt and answer together; None where the answer's own are
            limited.
        min_length: Least tokens of both, below which no sequence ends; likewise.
        assistant: The model that proposes tokens, or its name, and what goes with it.
        keeping: How the context is to be read and kept.
        draft_layers: The model's own layers for multi-token prediction, where they propose; not
            part of the model.
        heals: Whether the prompt's last token is to be chosen anew.
        code: The folder or repository whose code takes the place of the decoding loop.
        negative: The negative prompt of guidance, by the names of ``generate``'s arguments.
    """

    options: dict[str, Any]
    stops: tuple[Callable[..., Any], ...] = ()
    draws: int = 1
    beams: int = 1
    seed: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    assistant: Assistant | None = None
    keeping: Keeping = Keeping()
    draft_layers: Any = None
    heals: bool = False
    code: str | None = None
    negative: dict[str, Any] = attrs.field(factory=dict)

    @property
    def new_tokens(self) -> int:
        """The most tokens that it makes; 0 where that depends on the prompt."""
        return int(self.options.get("max_new_tokens", 0))

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return tuple(self.options["eos_token_id"] or ())

    @property
    def assisted(self) -> bool:
        """Whether several proposed tokens are verified in one pass."""
        return self.assistant is not None or any(self.options.get(name) for name in ASSISTED)

    @property
    def predicts_ahead(self) -> bool:
        """Whether the model's layers for multi-token prediction propose; transformers asks them
        after the model's first layers and after the prompt.
        """
        return bool(self.options.get("use_mtp")) and not self._asks_others_first

    @property
    def drafts_blocks(self) -> bool:
        """Whether the assistant drafts blocks from hidden states of the model (DFlash)."""
        return (
            self.options.get("speculation_type") is not None
            and self.assistant is not None
            and not self.options.get("use_mtp")
            and not self._asks_others_first
        )

    @property
    def _asks_others_first(self) -> bool:
        before = ("assistant_early_exit", "prompt_lookup_num_tokens")
        return self.beams > 1 or any(self.options.get(name) is not None for name in before)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states of the whole prompt proposals start from, or that contrastive
        search compares with; the assistant has to be loaded.
        """
        if self.assistant is not None and self.drafts_blocks:
            return tuple(self.assistant.model.config.target_layer_ids)
        return (compat.LAST,) if self.predicts_ahead or self.starts_over else ()

    @property
    def starts_over(self) -> bool:
        """Whether its loop reads the whole prompt, and begins with an empty cache only: contrastive
        search does, for the sake of hidden states.
        """
        asked = asks_for_code("penalty_alpha", self.options.get("penalty_alpha"))
        return self.code is not None and asked

    @property
    def loop(self) -> str | None:
        """The option by which other code takes the place of the decoding loop; None for none."""
        if self.options.get("custom_generate") is not None:
            return "custom_generate"
        names = (n for n in ALL_MOVED if asks_for_code(n, self.options.get(n)))
        return next(names, None if self.code is None else "trust_remote_code")

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional prompt runs along."""
        return self.options.get("guidance_scale", 1) not in (None, 1)

    @property
    def counts_prompt(self) -> bool:
        """Whether it depends on the length of the prompt."""
        return self.max_length is not None or self.min_length is not None

    def behind(self, prompt_tokens: int) -> Generation:
        """The same with lengths of the whole prompt turned into lengths of the answer.

        Raises:
            RequestError: If the prompt leaves no room.
        """
        options = dict(self.options)
        if self.max_length is not None:
            if prompt_tokens >= self.max_length:
                raise RequestError(
                    f"generation option 'max_length' is {self.max_length}, which the prompt of "
                    f"{prompt_tokens} tokens uses up; raise it or give max_new_tokens"
                )
            options["max_new_tokens"] = self.max_length - prompt_tokens
        if self.min_length is not None:
            options["min_new_tokens"] = max(0, self.min_length - prompt_tokens)
        return attrs.evolve(self, options=options, max_length=None, min_length=None)


@attrs.frozen
class Assistant:
    """A model that proposes tokens.

    Attributes:
        model: The model, or a name by which it can be loaded.
        tokenizer: Its tokenizer, where the caller gave it.
        target_tokenizer: The tokenizer of the model that it assists; likewise.
        settings: Drafting options that are to hold in place of those of its generation config.
    """

    model: Any
    tokenizer: Any = None
    target_tokenizer: Any = None
    settings: dict[str, Any] = attrs.field(factory=dict)

    @contextmanager
    def drafting(self, target: Any) -> Iterator[None]:
        """The settings hold inside; what transformers notes in the assistant's generation config
        is gone afterwards, so that no question depends on those before it.
        """
        model = target if self.model is None else self.model
        before = getattr(model, "generation_config", None)
        if before is None:
            yield
            return
        model.generation_config = copy.deepcopy(before)
        model.generation_config.update(**self.settings)
        try:
            yield
        finally:
            model.generation_config = before


@attrs.define(eq=False)
class Watch:
    """The caller's stopping criteria as one, which also notes what ``generate`` does not tell.

    Attributes:
        elapsed: Seconds since the question began, the device's work done.
        stops: The caller's criteria.
        idle: Rows that nobody waits for; they end at once.
        first_token: Seconds until the first token was known.
        stopped: Per row the length at which a criterion stopped it, -1 for none; a tensor.
        length: Tokens that the criteria have been asked about, the prompt's at first.
        beams: Whether rows are beams, which change places: see `endings`.
        endings: Beams at which a criterion held, prompt included. ``generate`` pads them without
            telling where, with an EOS if the padding token is 0.
    """

    elapsed: Callable[[], float]
    stops: Sequence[Callable[..., Any]] = ()
    idle: tuple[int, ...] = ()
    first_token: float | None = None
    stopped: Tensor | None = None
    length: int = 0
    beams: bool = False
    endings: set[tuple[int, ...]] = attrs.field(factory=set)
    _always: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Called by ``generate`` after each pass; says which rows are to end.

        A pass that verified proposals brings several tokens: the criteria are asked after each.
        """
        rows, length = input_ids.shape
        if self._always is None:
            self.first_token = self.elapsed()
            self._always = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
            self._always[list(self.idle)] = True
            self.stopped = torch.full((rows,), -1, dtype=torch.long, device=input_ids.device)
        done = self._always
        begin, self.length = min(self.length + 1, length), length
        if not self.stops or self.stopped is None:
            return done
        for end in range(begin, length + 1):
            for stop in self.stops:
                made = stop(input_ids[:, :end], scores, **others)
                done = done | torch.as_tensor(made, device=done.device)
            if self.beams:
                self.endings.update(map(tuple, input_ids[done, :end].tolist()))
            else:
                self.stopped = torch.where(done & (self.stopped < 0), end, self.stopped)
        return done

    def stop_of(self, row: int, tokens: Sequence[int], prompt_tokens: int) -> int | None:
        """The length at which a criterion ended a sequence, None if none did.

        Args:
            row: Its row in what ``generate`` returned.
            tokens: All of its tokens, the prompt's included.
            prompt_tokens: The prompt's.
        """
        if self.beams:
            lengths = range(prompt_tokens + 1, len(tokens) + 1)
            return next((n for n in lengths if tuple(tokens[:n]) in self.endings), None)
        stop = -1 if self.stopped is None else int(self.stopped[row])
        return None if stop < 0 else stop


def generation_options(
    model: Any, tokenizer: Any, generation_kwargs: Mapping[str, Any] | None
) -> Generation:
    """The caller's options with defaults filled in: greedy, every EOS that model or tokenizer
    declare.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        generation_kwargs: What the caller gave; not changed.

    Raises:
        RequestError: As `check_options`.
        ParameterError: As `check_options`.
    """
    options = check_options(generation_kwargs, type(model).generate)
    code = code_of(options, model.generation_config)
    if code is None:
        options.pop("trust_remote_code", None)
    else:
        load_code(code)  # a checkpoint may have asked for it
    max_length, min_length = options.pop("max_length", None), options.pop("min_length", None)
    if max_length is None:
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    elif "max_new_tokens" in options:
        log.warning("max_new_tokens takes precedence over max_length=%s", max_length)
        max_length = None
    if "min_new_tokens" in options:
        min_length = None
    elif min_length is None:
        min_length = getattr(model.generation_config, "min_length", None) or None
    for name in OF_THE_CHECKPOINT:
        options.setdefault(name, getattr(model.generation_config, name, None))
    if not options.setdefault("do_sample", False):
        for name in SAMPLING:
            options.setdefault(name, None)
    eos = options.get("eos_token_id")
    if eos is None:
        eos = eos_token_ids(model, tokenizer)
    options["eos_token_id"] = [eos] if isinstance(eos, int) else list(eos) or None
    if options.get("pad_token_id") is None:
        pad = tokenizer.pad_token_id
        options["pad_token_id"] = (
            next(iter(options["eos_token_id"] or (0,))) if pad is None else pad
        )
    # a checkpoint may carry values for these two
    beams = options.setdefault("num_beams", 1)
    draws = options.setdefault("num_return_sequences", 1)
    if beams == 1:
        options["num_return_sequences"] = 1
    assistant = take_assistant(options)
    keeping = Keeping.taken_from(options)
    options.update(GIVEN_CACHE)
    heals = bool(options["token_healing"])
    if heals:
        options["token_healing"] = False  # it is done before
    return Generation(
        options=options,
        stops=stopping_criteria(options, tokenizer),
        draws=draws if beams == 1 else 1,
        beams=beams,
        seed=options.pop("seed", None),
        max_length=max_length,
        min_length=min_length,
        assistant=assistant,
        keeping=keeping,
        heals=heals,
        code=code,
        negative={
            name: options.pop(name)
            for name in ("negative_prompt_ids", "negative_prompt_attention_mask")
            if options.get(name) is not None
        },
    )


def take_assistant(options: dict[str, Any]) -> Assistant | None:
    """The assistant, taken out of the options with what concerns it alone."""
    found = {name: options.pop(name) for name in DRAFTING if name in options}
    settings = {name: value for name, value in found.items() if value is not None}
    model, tokenizer = (
        options.pop("assistant_model", None),
        options.pop("assistant_tokenizer", None),
    )
    if model is None and options.get("assistant_early_exit") is None:
        if tokenizer is not None:
            raise RequestError("assistant_tokenizer needs an assistant_model")
        return None
    return Assistant(model, tokenizer, options.get("tokenizer"), settings)


def stopping_criteria(options: dict[str, Any], tokenizer: Any) -> tuple[Callable[..., Any], ...]:
    """The caller's criteria and stop strings, taken out of the options."""
    from transformers import StopStringCriteria

    stops = list(options.pop("stopping_criteria", None) or ())
    strings = options.get("stop_strings")
    options["stop_strings"] = None  # nor are they to be looked for a second time
    tokenizer = options.pop("tokenizer", None) or tokenizer
    if strings:
        strings = [strings] if isinstance(strings, str) else list(strings)
        stops.append(StopStringCriteria(tokenizer, strings))
    return tuple(stops)


@contextmanager
def seeded(seed: int | None, devices: Sequence[torch.device]) -> Iterator[None]:
    """Random numbers of a seed inside; the caller's generators go on as if nothing had happened.

    Args:
        seed: None leaves the generators alone.
        devices: Devices of the model.
    """
    if seed is None:
        yield
        return
    indices = [d.index or 0 for d in devices if d.type == "cuda"]
    with torch.random.fork_rng(indices, enabled=True):
        torch.manual_seed(seed)
        yield


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every end-of-sequence token that generation config, model config or tokenizer declare."""
    found: list[int] = []
    sources = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(compat.text_config(model), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    for source in sources:
        for token in source if isinstance(source, list | tuple) else [source]:
            if token is not None and int(token) not in found:
                found.append(int(token))
    return found


def negative_prompt(generation: Generation, ids: Tensor) -> dict[str, Tensor]:
    """The negative prompt of guidance for every row of a batch.

    Raises:
        RequestError: If it is not one sequence of tokens.
    """
    made = {}
    for name, given in generation.negative.items():
        tokens = torch.as_tensor(given, dtype=torch.long, device=ids.device)
        tokens = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
        if tokens.dim() != 2 or tokens.shape[0] != 1 or not tokens.numel():
            raise RequestError(
                f"generation option {name!r} has shape {tuple(tokens.shape)}; expected the tokens "
                "of one sequence"
            )
        made[name] = tokens.expand(ids.shape[0], -1)
    return made
