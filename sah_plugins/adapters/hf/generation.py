"""From what a caller wants of ``generate`` to what it gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import ParameterError, RequestError, compat
from sah_core.errors import nearest_names

DEFAULT_NEW_TOKENS = 64
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

OWN_CACHE = "the adapter keeps the cache"
REQUEST = "the request holds the prompt"
REFUSED = {
    "max_length": "the context counts into it; use max_new_tokens",
    "min_length": "the context counts into it; use min_new_tokens",
    "assistant_model": "maskers cannot take rejected tokens back",
    "prompt_lookup_num_tokens": "maskers cannot take rejected tokens back",
    "guidance_scale": "a second prompt would run through the state of the first",
    "token_healing": "it changes the end of the prompt",
    "generation_config": "give its settings one by one",
    "custom_generate": "the adapter follows transformers' own loop",
    "return_dict_in_generate": "responses carry text and tokens",
    "prefill_chunk_size": "it belongs into the request options",
    "cache_implementation": OWN_CACHE,
    "cache_config": OWN_CACHE,
    "use_cache": OWN_CACHE,
    "cache": OWN_CACHE,
    "past_key_values": OWN_CACHE,
    "inputs": REQUEST,
    "input_ids": REQUEST,
    "inputs_embeds": REQUEST,
    "attention_mask": REQUEST,
    "position_ids": REQUEST,
}
"""Options of ``generate`` that have no place here, and why."""
NEUTRAL = {"guidance_scale": 1, "use_cache": True}
"""Values of refused options that change nothing, where that is not False or None."""
OWN = ("seed", "tokenizer")
"""Options beside those of ``generate`` and of a generation config."""
COUNTS = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1, "seed": 0}
"""Options that are whole numbers, and the least that each may be."""
WARPERS = {
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
}
"""Classes of transformers that know which values of an option make sense."""


@attrs.frozen
class Generation:
    """What one question's generation is to be.

    Attributes:
        options: Arguments of ``generate``; sequences that are drawn, seed and stops are not among
            them.
        stops: The caller's stopping criteria, stop strings included.
        draws: How often to sample.
        beams: Beams; 1 without beam search.
        seed: Of the sampling of each question, or None.
    """

    options: dict[str, Any]
    stops: tuple[Callable[..., Any], ...] = ()
    draws: int = 1
    beams: int = 1
    seed: int | None = None

    @property
    def new_tokens(self) -> int:
        """The most tokens that it makes."""
        return int(self.options["max_new_tokens"])

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return tuple(self.options["eos_token_id"] or ())


@attrs.define(eq=False)
class Watch:
    """The caller's stopping criteria as one, which also notes what ``generate`` does not tell.

    Attributes:
        elapsed: Seconds since the question began, the device's work done.
        stops: The caller's criteria.
        idle: Rows that nobody waits for; they end at once.
        first_token: Seconds until the first token was known.
        stopped: Per row the length at which a criterion stopped it, -1 for none; a tensor.
    """

    elapsed: Callable[[], float]
    stops: Sequence[Callable[..., Any]] = ()
    idle: tuple[int, ...] = ()
    first_token: float | None = None
    stopped: Tensor | None = None
    _always: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Called by ``generate`` after each token; says which rows are to end."""
        rows = input_ids.shape[0]
        if self._always is None:
            self.first_token = self.elapsed()
            self._always = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
            self._always[list(self.idle)] = True
            self.stopped = torch.full((rows,), -1, dtype=torch.long, device=input_ids.device)
        done = self._always
        for stop in self.stops:
            done = done | torch.as_tensor(stop(input_ids, scores, **others), device=done.device)
        if self.stops and self.stopped is not None:
            fresh = done & (self.stopped < 0)
            self.stopped = torch.where(fresh, input_ids.shape[1], self.stopped)
        return done


def check_options(
    generation_kwargs: Mapping[str, Any] | None, generate: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """The caller's options without those that change nothing; no model is needed.

    Args:
        generation_kwargs: What the caller gave; not changed.
        generate: The method that will be called; that of every transformers model when None.

    Raises:
        RequestError: For an option that does not exist or has no place here, or a combination that
            makes no sense.
        ParameterError: For a value that is out of range.
    """
    from transformers.generation.utils import GenerationMixin

    known = known_options(generate or GenerationMixin.generate)
    options = dict(generation_kwargs or {})
    for name in list(options):
        if name in REFUSED:
            value = options.pop(name)
            scalar = isinstance(value, bool | int | float)
            if value is not None and not (scalar and value == NEUTRAL.get(name, False)):
                raise RequestError(f"generation option {name!r} is not supported: {REFUSED[name]}")
        elif name not in known:
            nearest = nearest_names(name, known - set(REFUSED))
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise RequestError(f"generation option {name!r} is not known{hint}")
    for name, least in COUNTS.items():
        value = options.get(name)
        if value is None:
            options.pop(name, None)
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ParameterError("generation", name, value, f"an integer >= {least}")
    if not isinstance(options.get("do_sample") or False, bool):
        raise ParameterError("generation", "do_sample", options["do_sample"], "true or false")
    wanted, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    if wanted > 1 and wanted > beams and (beams > 1 or not options.get("do_sample")):
        raise RequestError(
            f"num_return_sequences={wanted} needs do_sample=True, or as many num_beams"
        )
    check_values(options)
    return options


def check_values(options: Mapping[str, Any]) -> None:
    """Let transformers say which values are out of range.

    Raises:
        ParameterError: With its reason.
    """
    from transformers import GenerationConfig, generation

    for name, warper in WARPERS.items():
        value = options.get(name)
        if value is None or (name == "top_k" and value == 0):
            continue
        try:
            getattr(generation, warper)(value)
        except (ValueError, TypeError) as error:
            raise ParameterError("generation", name, value, f"another value ({error})") from error
    plain = {name: value for name, value in options.items() if name in vars(GenerationConfig())}
    try:
        GenerationConfig(**plain).validate()
    except (ValueError, TypeError) as error:
        raise RequestError(f"these generation options do not go together: {error}") from error


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
    options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
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
    return Generation(
        options=options,
        stops=stopping_criteria(options, tokenizer),
        draws=draws if beams == 1 else 1,
        beams=beams,
        seed=options.pop("seed", None),
    )


def stopping_criteria(options: dict[str, Any], tokenizer: Any) -> tuple[Callable[..., Any], ...]:
    """The caller's criteria and stop strings, taken out of the options."""
    from transformers import StopStringCriteria

    stops = list(options.pop("stopping_criteria", None) or ())
    strings = options.pop("stop_strings", None)
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


@cache
def known_options(generate: Any) -> frozenset[str]:
    """The names that ``generate`` takes: its own arguments and those of a generation config."""
    from transformers import GenerationConfig

    arguments = set(inspect.signature(generate).parameters) - {"self", "kwargs"}
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return frozenset(arguments | settings | set(OWN))


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
