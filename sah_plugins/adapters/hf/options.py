"""Which options of ``generate`` have a place here, and which values make sense."""

from __future__ import annotations

import copy
import inspect
import logging
import operator
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sah_core import ParameterError, RequestError
from sah_core.errors import nearest_names, one_line, short_repr

from .foreign_code import ALL_MOVED, code_of, load_code, named_source, own_options
from .kv_cache import IMPLEMENTATIONS, check_keeping
from .loading import hub_in_reach

log = logging.getLogger(__name__)

OWN_CACHE = "the context is read once, into a cache that the adapter makes"
REQUEST = "the request holds the prompt"
REFUSED = {
    "is_assistant": "transformers sets it itself, for an assistant",
    "continuous_batching_config": "process_requests makes the batches",
    "synced_gpus": "a model runs in one process",
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
WITHOUT_EFFECT = {
    "use_cache": "the context is read once into a cache, which the answers do not depend on",
    "compile_config": "passes are not compiled; capture_decode is the fast loop",
}
"""Options that choose time and memory, and are not followed: a warning says why."""
OWN = ("seed", "tokenizer", "assistant_tokenizer", "trust_remote_code")
"""Options beside those of ``generate`` and of a generation config."""
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options each of which asks for decoding that verifies proposed tokens."""
DRAFTING = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)
"""Options that transformers reads from the assistant's own generation config."""
RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""Options that ask for more than tokens."""
YES_OR_NO = (
    "do_sample",
    "return_dict_in_generate",
    "token_healing",
    "use_mtp",
)
"""Options that are true or false, beside those."""
COUNTS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_cache_len": 1,
    "prefill_chunk_size": 1,
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
    "top_h": "TopHLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}
"""Classes of transformers that know which values of an option make sense, where tokens are sampled;
greedy decoding reads none of these, so that ``temperature=0`` means there what it says.
"""
PROCESSORS: dict[str, Callable[[Any, Any], object]] = {
    "repetition_penalty": lambda made, value: made.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda made, value: value and made.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda made, value: made.NoBadWordsLogitsProcessor(value),
    "sequence_bias": lambda made, value: made.SequenceBiasLogitsProcessor(value),
    "suppress_tokens": lambda made, value: made.SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda made, value: made.SuppressTokensAtBeginLogitsProcessor(
        value, 0
    ),
    "forced_eos_token_id": lambda made, value: made.ForcedEOSTokenLogitsProcessor(1, value),
    "exponential_decay_length_penalty": lambda made, value: made.ExponentialDecayLengthPenalty(
        value, [0], 1
    ),
}
"""Likewise, however tokens are chosen."""


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

    if generation_kwargs is not None and not isinstance(generation_kwargs, Mapping):
        raise RequestError(
            f"the generation options are {short_repr(generation_kwargs)}; expected a mapping from "
            "names to values"
        )
    options = merged(generation_kwargs or {})
    known = known_options(generate or GenerationMixin.generate) | code_options(options)
    for name in list(options):
        if name in REFUSED:
            if asks(options.pop(name)):
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
    for name in (*YES_OR_NO, *RECORDED):
        if not isinstance(options.get(name) or False, bool):
            raise ParameterError("generation", name, options[name], "true or false")
    check_together(options)
    check_values(options)
    check_keeping(options)
    drop_without_effect(options)
    return options


def drop_without_effect(options: dict[str, Any]) -> None:
    """Take out what is not followed, saying so once."""
    for name, reason in WITHOUT_EFFECT.items():
        value = options.pop(name, None)
        if not (value is None or (name == "use_cache" and value)):
            _say_once(f"generation option {name!r} has no effect: {reason}")


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


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


def code_options(options: dict[str, Any]) -> frozenset[str]:
    """The names of the arguments of the code that ``custom_generate`` brings along or names: a
    function, or what a folder or a repository holds. Code that the options ask for is loaded, if
    the caller trusts it.

    Args:
        options: Options of ``generate``; what asks for nothing is taken out of them.

    Raises:
        RequestError: If it is not trusted, not there, or cannot be loaded.
        ParameterError: If it is neither a function nor a name.
    """
    for name in ALL_MOVED:
        if options.get(name) is False:
            del options[name]  # any value but None would ask for something
        check_form(name, options.get(name))
    check_form("trust_remote_code", options.get("trust_remote_code"))
    custom = options.get("custom_generate")
    if callable(custom):
        return own_options(custom)
    if custom is not None:
        if not isinstance(custom, str | Path) or not str(custom):
            expected = "a function, or the name of a folder or repository"
            raise ParameterError("generation", "custom_generate", custom, expected)
        options["custom_generate"] = named_source(custom)
    source = code_of(options)
    if source is None:
        return frozenset()
    taken = own_options(load_code(source))
    # of a way to decode that was moved, transformers lets no further arguments through
    return frozenset() if custom is None else taken


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
    assisting = [name for name in ASSISTED if asks(options.get(name))]
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
    if assisting and options.get("cache_implementation") == "quantized":
        raise RequestError(
            f"{assisting[0]} does not go together with cache_implementation='quantized': a "
            "quantised cache cannot take rejected tokens back"
        )
    by_blocks = asks(options.get("speculation_type"))
    if by_blocks and options.get("assistant_model") is None:
        raise RequestError("speculation_type needs an assistant_model")
    for name in (*DRAFTING, "assistant_tokenizer"):
        if by_blocks and options.get(name) is not None:
            raise RequestError(
                f"{name} does not go together with speculation_type: the assistant drafts blocks "
                "of its own size, in the model's tokens"
            )
    from_states = "use_mtp" if "use_mtp" in assisting else "speculation_type"
    if asks(options.get(from_states)) and options.get("output_hidden_states"):
        raise RequestError(
            f"{from_states} does not go together with output_hidden_states: the model then returns "
            "those of the layers alone from which drafts are made"
        )
    if options.get("streamer") is not None and beams > 1:
        raise RequestError("streamer does not go together with num_beams: beams end all at once")
    if not options.get("return_dict_in_generate"):
        for name in RECORDED:
            if options.get(name):
                raise RequestError(f"{name} needs return_dict_in_generate=True")


def asks(value: Any) -> bool:
    """Whether the value of an option asks for something."""
    return value is not None and value is not False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(operator.index(value), int)
    except TypeError:
        return False


def _is_several(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Collection) and all(holds(one) for one in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


NUMBER = _is_number, "a number"
FUNCTIONS = (
    lambda value: not isinstance(value, str) and _is_several(value, callable),
    "a list of functions",
)
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stop_strings": (
        lambda value: (
            _is_text(value) or not isinstance(value, str) and _is_several(value, _is_text)
        ),
        "a text or a list of texts, none of them empty",
    ),
    "eos_token_id": (
        lambda value: _is_token(value) or _is_several(value, _is_token),
        "a token id or a list of token ids",
    ),
    "pad_token_id": (lambda value: _is_token(value) and value >= 0, "a token id"),
    "seed": (lambda value: value < 2**64, "an integer >= 0 and < 2**64"),
    "logits_processor": FUNCTIONS,
    "stopping_criteria": FUNCTIONS,
    "prefix_allowed_tokens_fn": (callable, "a function"),
    "streamer": (
        lambda value: (
            callable(getattr(value, "put", None)) and callable(getattr(value, "end", None))
        ),
        "an object with the methods put and end",
    ),
    "assistant_model": (
        lambda value: isinstance(value, str) or (hasattr(value, "config") and callable(value)),
        "a model or the name of one",
    ),
    "speculation_type": (lambda value: value == "dflash", "'dflash'"),
    "cache_implementation": (
        lambda value: isinstance(value, str) and value in IMPLEMENTATIONS,
        f"one of {', '.join(IMPLEMENTATIONS)}",
    ),
    "cache_config": (lambda value: isinstance(value, Mapping), "a mapping"),
    "constraints": (
        lambda value: not isinstance(value, str) and _is_several(value, lambda one: True),
        "a list of constraints",
    ),
    "force_words_ids": (lambda value: isinstance(value, list | tuple), "a list of token ids"),
    "dola_layers": (
        lambda value: (
            value in ("low", "high") if isinstance(value, str) else _is_several(value, _is_token)
        ),
        "low, high or a list of layers",
    ),
    "penalty_alpha": (lambda value: _is_number(value) and value >= 0, "a number >= 0"),
    "num_beam_groups": (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        "an integer >= 1",
    ),
    "diversity_penalty": NUMBER,
    "low_memory": (lambda value: isinstance(value, bool), "true or false"),
    "trust_remote_code": (lambda value: isinstance(value, bool), "true or false"),
    "max_time": (lambda value: _is_number(value) and value >= 0, "a number of seconds >= 0"),
    "guidance_scale": NUMBER,
    "length_penalty": NUMBER,
}
"""Options that have no processor of transformers: what holds of their values, in code and words."""


def check_form(name: str, value: Any) -> None:
    """Refuse a value of another form than that of `FORMS`.

    Raises:
        ParameterError: With what is expected.
    """
    holds, expected = FORMS[name]
    if value is not None and not holds(value):
        raise ParameterError("generation", name, value, expected)


def check_values(options: Mapping[str, Any]) -> None:
    """Let transformers say which values are out of range.

    Raises:
        ParameterError: With its reason.
    """
    from transformers import GenerationConfig, generation

    for name in FORMS:
        check_form(name, options.get(name))
    for name in (*(WARPERS if options.get("do_sample") else ()), *PROCESSORS):
        value = options.get(name)
        if value is None or (name == "top_k" and value == 0):
            continue
        try:
            if name in WARPERS:
                getattr(generation, WARPERS[name])(value)
            else:
                PROCESSORS[name](generation, value)
        except (ValueError, TypeError, IndexError) as error:
            reason = one_line(str(error))
            raise ParameterError("generation", name, value, f"another value ({reason})") from error
    plain = {name: value for name, value in options.items() if name in config_settings()}
    try:
        GenerationConfig(**plain).validate()
    except (ValueError, TypeError) as error:
        raise RequestError(f"these generation options do not go together: {error}") from error


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
