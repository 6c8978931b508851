"""Code from a folder or a repository that takes the place of the decoding loop.

Nothing of it is run unless the caller says ``trust_remote_code=True``; a checkpoint or a file that
asks for it is refused.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sah_core import RequestError, SahError
from sah_core.errors import one_line
from sah_core.hashing import sha256_of

from .gguf import quiet_transformers
from .loading import hub_in_reach

FILE = "custom_generate/generate.py"
"""Where transformers expects the function ``generate`` in a folder or repository."""
MOVED = {
    "constrained_beam_search": ("constraints", "force_words_ids"),
    "dola_generation": ("dola_layers",),
    "contrastive_search": ("penalty_alpha", "low_memory"),
    "group_beam_search": ("num_beam_groups", "diversity_penalty"),
}
"""Ways to decode that transformers has moved to repositories, and the options that they read."""
NEUTRAL = {"penalty_alpha": 0, "num_beam_groups": 1, "diversity_penalty": 0}
"""Values of these options that ask for nothing, where that is not False or None."""
ALL_MOVED = tuple(name for names in MOVED.values() for name in names)
MODE_OPTIONS = (
    *ALL_MOVED,
    *("do_sample", "num_beams", "top_k"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
)
"""What transformers chooses the way to decode by, beside an assistant."""
DEFAULT_TOP_K = 50
"""What transformers takes where nobody says, also while nothing is sampled."""


def asks_for_code(name: str, value: Any) -> bool:
    """Whether the value of one of the moved options asks for something."""
    if value is None or value is False:
        return False
    return not (isinstance(value, int | float) and value == NEUTRAL.get(name))


def named_source(name: str | Path) -> str:
    """A folder or repository as transformers takes it, a home folder spelt out."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else str(name)


def code_of(options: Mapping[str, Any], checkpoint: Any = None) -> str | None:
    """The folder or repository whose code some options ask for; None if they ask for none.

    Args:
        options: Options of ``generate``.
        checkpoint: The model's generation config, which fills in what they do not say; None where
            there is no model yet.

    Raises:
        RequestError: If they ask for code and do not say that it is trusted, or if nothing would
            read one of them.
    """
    custom = options.get("custom_generate")
    asked = [name for name in ALL_MOVED if asks_for_code(name, options.get(name))]
    if custom is not None and not callable(custom):
        _check_trusted(options, f"generation option 'custom_generate' runs code from {custom!r}")
        return str(custom)
    if custom is not None:
        return None
    own = {} if checkpoint is None else {n: getattr(checkpoint, n, None) for n in MODE_OPTIONS}
    if not asked and not any(asks_for_code(name, own.get(name)) for name in ALL_MOVED):
        return None
    mode, repository = _mode(options, own)
    for name in asked:
        if name not in MOVED.get(mode, ()):
            raise RequestError(
                f"generation option {name!r} has no effect: with the other options the way to "
                f"decode is {mode}, which does not read it"
            )
    if repository is not None:
        who = f"generation option {asked[0]!r}" if asked else "the checkpoint's generation config"
        _check_trusted(options, f"{who} runs code from the hub repository {repository!r}")
    return repository


def _mode(options: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str | None]:
    """The way to decode, as transformers chooses it, and the repository that it was moved to."""
    from transformers import GenerationConfig
    from transformers.generation import utils

    said = {name: options[name] for name in MODE_OPTIONS if options.get(name) is not None}
    filled = {name: value for name, value in own.items() if value is not None}
    try:
        with quiet_transformers():
            config = GenerationConfig(**{"top_k": DEFAULT_TOP_K, **filled, **said})
        mode = config.get_generation_mode(options.get("assistant_model"))
    except (ValueError, TypeError) as error:
        raise RequestError(f"these generation options do not go together: {error}") from error
    place = str(utils.GENERATION_MODES_MAPPING.get(mode, ""))
    return str(mode.value), place if "/" in place else None


def _check_trusted(options: Mapping[str, Any], what: str) -> None:
    if options.get("trust_remote_code") is not True:
        raise RequestError(f"{what}; it needs trust_remote_code=True beside it")


def load_code(source: str) -> Callable[..., Any]:
    """The function that takes the place of ``generate``; the code at its top level is run.

    Args:
        source: A folder or a repository, which the caller trusts.

    Raises:
        RequestError: If there is none, or it cannot be loaded.
    """
    return _loaded(source, code_hash(source))


@cache
def _loaded(source: str, _hash: str) -> Callable[..., Any]:
    from transformers.generation.utils import GenerationMixin

    kept = {} if Path(source).is_dir() or hub_in_reach() else {"local_files_only": True}
    try:
        made: Callable[..., Any] = GenerationMixin().load_custom_generate(
            source, trust_remote_code=True, **kept
        )
    except Exception as error:  # it may be anyone's code
        raise RequestError(
            f"the code of {source!r}, which the generation options ask for, cannot be loaded: "
            f"{one_line(str(error)) or type(error).__name__}"
        ) from error
    return made


@contextmanager
def blaming(source: str | None) -> Iterator[None]:
    """Say of a fault inside that the code of a folder or repository failed; None for none.

    Raises:
        RequestError: With the fault.
    """
    try:
        yield
    except (SahError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it may be anyone's code
        if source is None:
            raise
        fault = f"{type(error).__name__}: {one_line(str(error))}"
        raise RequestError(
            f"the code of {source!r} failed with {fault} (its cache holds the context already)"
        ) from error


def code_hash(source: str) -> str:
    """A hash of the files that would be run; none of them is.

    Raises:
        RequestError: If they are not there.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    main = _main_file(source)
    files = [main, *map(Path, get_relative_import_files(main))]
    held = sorted(f"{file.relative_to(main.parent)} {sha256_of(file)}\n" for file in files)
    return f"sha256:{hashlib.sha256(''.join(held).encode()).hexdigest()}"


def identified(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the content of the code that they ask for in place of where it lies."""
    source = code_of(options)
    if source is None:
        return dict(options)
    name = "" if Path(source).is_dir() else f"{source}@"
    return {**options, "custom_generate": f"{name}{code_hash(source)}"}


def _main_file(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if (folder / FILE).is_file():
            return folder / FILE
        raise RequestError(f"the folder {source!r} has no {FILE}, which holds the decoding loop")
    return _from_hub(source)


@cache
def _from_hub(repository: str) -> Path:
    from transformers.utils.hub import cached_file

    reached = hub_in_reach()
    try:
        return Path(str(cached_file(repository, FILE, local_files_only=not reached)))
    except (OSError, ValueError) as error:
        reason = (
            f"the hub says: {one_line(str(error))}"
            if reached
            else "the local hub cache lacks it (the hub is out of reach, or HF_HUB_OFFLINE is set)"
        )
        raise RequestError(
            f"the generation options ask for code from {repository!r}, which is no folder, and "
            f"{reason}"
        ) from error


def own_options(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments that a function takes."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in several)
