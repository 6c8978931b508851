"""From what a caller wants of ``generate`` to what it gets."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from sah_core import ParameterError, RequestError, compat
from sah_core.errors import nearest_names, one_line, short_repr

from .loading import hub_in_reach

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 64
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

OWN_CACHE = "the context is read once, into a cache that the adapter keeps"
REQUEST = "the request holds the prompt"
HUB_CODE = "transformers runs it with code from the hub only, and no remote code is run"
DRAFT_LAYERS = "drafts by layers that only a few models have are not known here"
REFUSED = {
    "token_healing": "it takes the whole prompt apart and tokenises it anew, without its special "
    "tokens, so that the context would not be the one that was read",
    "constraints": HUB_CODE,
    "force_words_ids": HUB_CODE,
    "dola_layers": HUB_CODE,
    "penalty_alpha": HUB_CODE,
    "low_memory": HUB_CODE,
    "num_beam_groups": HUB_CODE,
    "diversity_penalty": HUB_CODE,
    "trust_remote_code": HUB_CODE,
    "use_mtp": DRAFT_LAYERS,
    "speculation_type": DRAFT_LAYERS,
    "is_assistant": "transformers sets it itself, for an assistant",
    "compile_config": "transformers compiles for static caches only",
    "continuous_batching_config": "process_requests makes the batches",
    "synced_gpus": "a model runs in one process",
    "prefill_chunk_size": "it belongs into the request options",
    "cache_implementation": OWN_CACHE,
    "cache_config": OWN_CACHE,
    "max_cache_len": OWN_CACHE,
    "use_cache": OWN_CACHE,
    "cache": OWN_CACHE,
    "cache_params": OWN_CACHE,
    "past_key_values": OWN_CACHE,
    "inputs": REQUEST,
    "input_ids": REQUEST,
    "inputs_embeds": REQUEST,
    "attention_mask": REQUEST,
    "position_ids": REQUEST,
}
"""Options of ``generate`` that have no place here, and why."""
NEUTRAL = {
    "use_cache": (True,),
    "cache_implementation": ("dynamic", "hybrid"),
    "penalty_alpha": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
}
"""Values of refused options that change nothing, where that is not False or None."""
OWN = ("seed", "tokenizer", "assistant_tokenizer")
"""Options beside those of ``generate`` and of a generation config."""
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Options each of which asks for decoding that verifies proposed tokens."""
DRAFTING = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
"""Options that transformers reads from the assistant's own generation config."""
OF_THE_CHECKPOINT = ("prompt_lookup_num_tokens", "assistant_early_exit", "guidance_scale")
"""Options that a checkpoint may set and that have to be known here."""
RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""Options that ask for more than tokens."""
COUNTS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": 1,
    "max_matching_ngram_size": 1,
    "num_assistant_tokens": 1,
    "assistant_early_exit": 1,
    "seed": 0,
}
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
        before = model.generation_config
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
    """

    elapsed: Callable[[], float]
    stops: Sequence[Callable[..., Any]] = ()
    idle: tuple[int, ...] = ()
    first_token: float | None = None
    stopped: Tensor | None = None
    length: int = 0
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
            self.stopped = torch.where(done & (self.stopped < 0), end, self.stopped)
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

    options = merged(generation_kwargs or {})
    custom = options.get("custom_generate")
    known = known_options(generate or GenerationMixin.generate) | custom_options(custom)
    for name in list(options):
        if name in REFUSED:
            value = options.pop(name)
            scalar = isinstance(value, bool | int | float | str)
            if value is not None and not (scalar and value in NEUTRAL.get(name, (False,))):
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
    for name in ("do_sample", "return_dict_in_generate", *RECORDED):
        if not isinstance(options.get(name) or False, bool):
            raise ParameterError("generation", name, options[name], "true or false")
    check_together(options)
    check_values(options)
    return options


def merged(generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's options with those of a ``generation_config`` beneath them, as ``generate``
    merges them.

    Args:
        generation_kwargs: Its ``generation_config`` may be an object, a mapping, or a name: a JSON
            file, a folder with a ``generation_config.json`` or a repository. Nothing is changed.

    Raises:
        RequestError: If it is none of these.
    """
    options = dict(generation_kwargs)
    config = options.pop("generation_config", None)
    return options if config is None else {**settings_of(config), **options}


def settings_of(config: Any) -> dict[str, Any]:
    """What a generation config says: a copy of its settings that are not None.

    Entries of an object or a file that ``generate`` does not know are left out with a warning, as
    checkpoints carry many; those of a mapping are the caller's own words, and are checked.
    """
    from transformers import GenerationConfig

    if isinstance(config, Mapping):
        if "generation_config" in config:
            raise RequestError("generation option 'generation_config' stands inside itself")
        given = {name: value for name, value in config.items() if value is not None}
        given.pop("transformers_version", None)
        return copy.deepcopy(given)
    if isinstance(config, str | Path):
        config = read_config(str(config))
    if not isinstance(config, GenerationConfig):
        raise RequestError(
            f"generation option 'generation_config' is {short_repr(config)}; expected a "
            "GenerationConfig, a mapping, or the name of a file, folder or repository"
        )
    known = config_settings()
    found = {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
    for name in sorted(set(found) - known):
        log.warning("generation_config has %r, which transformers' generate does not read", name)
        del found[name]
    return copy.deepcopy(found)


def read_config(name: str) -> Any:
    """A generation config by its name.

    Raises:
        RequestError: If there is none.
    """
    from transformers import GenerationConfig

    path = Path(name).expanduser()
    place: tuple[str, ...] = (str(path.parent), path.name) if path.is_file() else (name,)
    local = path.exists() or not hub_in_reach()
    try:
        return GenerationConfig.from_pretrained(*place, local_files_only=local)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"generation option 'generation_config' names {name!r}, which cannot be read: "
            f"{one_line(str(error))}"
        ) from error


def custom_options(custom: Any) -> frozenset[str]:
    """The names of the arguments that a decoding loop of the caller takes.

    Raises:
        RequestError: If it is the name of a repository, whose code would be run.
    """
    if custom is None:
        return frozenset()
    if not callable(custom):
        raise RequestError(
            f"generation option 'custom_generate' is {short_repr(custom)}; expected a function: "
            "no remote code is run"
        )
    return frozenset(inspect.signature(custom).parameters)


def check_together(options: Mapping[str, Any]) -> None:
    """Refuse combinations that make no sense, or of which transformers would ignore a part.

    Raises:
        RequestError: With the options.
    """
    wanted, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    if wanted > 1 and wanted > beams and (beams > 1 or not options.get("do_sample")):
        raise RequestError(
            f"num_return_sequences={wanted} needs do_sample=True, or as many num_beams"
        )
    assisting = [name for name in ASSISTED if options.get(name) is not None]
    if len(assisting) > 1:
        raise RequestError(f"{assisting[0]} and {assisting[1]} exclude each other")
    for name in (*DRAFTING, "assistant_tokenizer"):
        if options.get(name) is not None and not set(assisting) & {ASSISTED[0], ASSISTED[2]}:
            raise RequestError(f"{name} needs an assistant_model (or assistant_early_exit)")
    if assisting and beams > 1:
        raise RequestError(f"{assisting[0]} does not go together with num_beams={beams}")
    if assisting and options.get("guidance_scale", 1) not in (None, 1):
        raise RequestError(
            f"{assisting[0]} does not go together with guidance_scale: the unconditional branch "
            "cannot take rejected tokens back"
        )
    if options.get("streamer") is not None and beams > 1:
        raise RequestError("streamer does not go together with num_beams: beams end all at once")
    if not options.get("return_dict_in_generate"):
        for name in RECORDED:
            if options.get(name):
                raise RequestError(f"{name} needs return_dict_in_generate=True")


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
    plain = {name: value for name, value in options.items() if name in config_settings()}
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
    return Generation(
        options=options,
        stops=stopping_criteria(options, tokenizer),
        draws=draws if beams == 1 else 1,
        beams=beams,
        seed=options.pop("seed", None),
        max_length=max_length,
        min_length=min_length,
        assistant=assistant,
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
    arguments = set(inspect.signature(generate).parameters) - {"self", "kwargs"}
    return frozenset(arguments | config_settings() | set(OWN) | set(REFUSED))


@cache
def config_settings() -> frozenset[str]:
    """The settings of a generation config."""
    from transformers import GenerationConfig

    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


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
