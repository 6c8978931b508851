"""From the name of a model to its weights and tokenizer."""

import copy
import gc
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import attrs

from sah_core import registry
from sah_core.errors import (
    ModelNotFoundError,
    ParameterError,
    UnknownParameterError,
    nearest_names,
)
from sah_core.hashing import file_sha256, files_sha256
from sah_core.models import ModelSource

from .gguf import converted_folder, quiet_transformers, unreadable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONTENT_SUFFIXES = {".safetensors", ".bin", ".pt", ".json", ".jinja", ".model", ".txt"}
_OWNER = "HuggingFaceAdapter"
_LOADING_OPTIONS = (
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "variant",
)
"""Names among which a slip in ``model_kwargs`` is looked for."""


@attrs.frozen(kw_only=True, eq=False)
class Loaded:
    """A model that is ready to run, and what it is."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: ModelSource
    weights_hash: str
    """What identifies weights, configuration and tokenizer.

    The SHA-256 of a GGUF file; of the files of a folder; ``commit:…`` for a hub repository.
    """


def load_model(
    name: str,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: an alias of a ``sah.models`` plugin, a local folder, a ``.gguf`` file or a hub id.
        model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained``; never changed. A
            ``config`` in it is copied, so that two models do not share one.
        tokenizer_kwargs: passed to ``AutoTokenizer.from_pretrained``; never changed.
        device: where the model goes; by default CUDA if there is one, else the CPU. A
            ``device_map`` in ``model_kwargs`` places the model instead.
        dtype: of the weights; by default bfloat16 on CUDA and float32 elsewhere. ``dtype`` or
            ``torch_dtype`` in ``model_kwargs`` mean the same.

    Raises:
        ModelNotFoundError: the name leads to no model that transformers can load.
        OutputFolderError: a GGUF file cannot be converted, for lack of a cache folder.
        ParameterError: there is no such device or dtype.
    """
    with _paused_garbage_collection():
        return _load(name, dict(model_kwargs or {}), dict(tokenizer_kwargs or {}), device, dtype)


def load_drafter(name: str, *, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Load a model that drafts for another one and speaks its tokens: without head or tokenizer.

    Args:
        name: a local folder, a hub id or an alias.
        device: where the model goes.
        dtype: of the weights.

    Raises:
        ModelNotFoundError: the name leads to no model that transformers can load.
    """
    from transformers import AutoModel

    source = resolve(name)
    kwargs: dict[str, Any] = {"dtype": dtype, "revision": source.revision}
    if source.kind != "hub" or not hub_in_reach():
        kwargs["local_files_only"] = True
    try:
        with quiet_transformers():
            model = AutoModel.from_pretrained(source.location, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if source.kind == "hub" and isinstance(error, OSError):
            raise _absent_from_hub(name, kwargs, error) from error
        raise unreadable(name, error) from error
    return model.to(device).eval()


def _load(
    name: str,
    model_kwargs: dict[str, Any],
    tokenizer_kwargs: dict[str, Any],
    device: "str | torch.device | None",
    dtype: "str | torch.dtype | None",
) -> Loaded:
    source = resolve(name)
    placed = "device_map" in model_kwargs
    target = _device(device)
    model_kwargs["dtype"] = _dtype(dtype, model_kwargs, target)
    if "config" in model_kwargs:
        model_kwargs["config"] = copy.deepcopy(model_kwargs["config"])

    location = source.location
    if source.kind == "gguf":
        location = str(converted_folder(Path(location)))
    local_only = source.kind != "hub" or not hub_in_reach()
    for kwargs in (model_kwargs, tokenizer_kwargs):
        if local_only:
            kwargs["local_files_only"] = True
        if source.revision is not None:
            kwargs.setdefault("revision", source.revision)
    if "revision" in model_kwargs:
        tokenizer_kwargs.setdefault("revision", model_kwargs["revision"])

    model, tokenizer = _from_pretrained(name, source, location, model_kwargs, tokenizer_kwargs)
    if not placed:
        model = model.to(target)
    return Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        source=source,
        weights_hash=_weights_hash(source, model),
    )


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    # Importing torch and transformers makes millions of objects that stay: collecting meanwhile
    # takes 0.7 of 5 s.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def resolve(name: str) -> ModelSource:
    """Return the place that ``name`` stands for: alias, folder, GGUF file or hub id, in that order.

    Raises:
        ModelNotFoundError: it is a path to nothing, or cannot be a hub id.
    """
    # Disabled aliases too, so that one is called disabled instead of taken for a hub id.
    if any(name in (entry.name, entry.id) for entry in registry.models.entries()):
        source: ModelSource = registry.models[name]()
        return source
    if not name.strip():
        raise ModelNotFoundError(name, "no name was given", _NAMES_HINT)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(name, "the folder holds no config.json", _NAMES_HINT)
        return ModelSource(kind="folder", location=str(path), label=path.resolve().name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(name, "there is no such file")
        return ModelSource(kind="gguf", location=str(path), label=path.stem)
    if path.exists():
        raise ModelNotFoundError(name, "it is a file, but not a .gguf one", _NAMES_HINT)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelNotFoundError(name, "there is no such file or folder")
    return ModelSource(kind="hub", location=name, label=name)


def check_name(name: str) -> None:
    """Resolve ``name`` and, for a hub id, read no more than the configuration.

    Raises:
        ModelNotFoundError: the name leads to no model.
    """
    source = resolve(name)
    if source.kind != "hub":
        return
    from transformers.utils import cached_file

    kwargs: dict[str, Any] = {} if hub_in_reach() else {"local_files_only": True}
    try:
        with quiet_transformers():
            cached_file(source.location, "config.json", revision=source.revision, **kwargs)
    except OSError as error:
        raise _absent_from_hub(name, kwargs, error) from error


_NAMES_HINT = "give a folder written by save_pretrained, a .gguf file, a hub id or an alias"


def _from_pretrained(
    name: str,
    source: ModelSource,
    location: str,
    model_kwargs: dict[str, Any],
    tokenizer_kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            with _naming("model_kwargs", model_kwargs):
                model = AutoModelForCausalLM.from_pretrained(location, **model_kwargs)
            with _naming("tokenizer_kwargs", tokenizer_kwargs):
                tokenizer = AutoTokenizer.from_pretrained(
                    location, **{"padding_side": "left", **tokenizer_kwargs}
                )
    except UnknownParameterError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        if source.kind == "hub" and isinstance(error, OSError):
            raise _absent_from_hub(name, model_kwargs, error) from error
        raise unreadable(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


@contextmanager
def _naming(owner: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Name the argument that ``from_pretrained`` does not take."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in given:
            raise
        raise UnknownParameterError(
            _OWNER,
            found[1],
            given[found[1]],
            f"an argument of from_pretrained in {owner}",
            nearest_names(found[1], _LOADING_OPTIONS),
        ) from error


def _absent_from_hub(
    name: str, model_kwargs: Mapping[str, Any], error: OSError
) -> ModelNotFoundError:
    aliases = registry.models.names()
    nearest = nearest_names(name, aliases)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    hint += f"aliases: {', '.join(aliases)}" if aliases else ""
    if model_kwargs.get("local_files_only"):
        reason = (
            "it is no alias, file or folder, and the local hub cache lacks it "
            "(the hub is out of reach, or HF_HUB_OFFLINE is set)"
        )
    else:
        text = " ".join(str(error).split())
        reason = f"it is no alias, file or folder, and the hub says: {text.rstrip('.')}"
    return ModelNotFoundError(name, reason, hint)


def hub_in_reach() -> bool:
    """Whether asking the hub makes sense.

    Without a network, transformers retries every file for 23 s before it looks into its cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # names are then resolved by the proxy
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _device(device: "str | torch.device | None") -> "torch.device":
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ParameterError(_OWNER, "device", device, "a device such as cpu or cuda:0") from None
    count = torch.cuda.device_count() if target.type == "cuda" else 1
    if (target.index if target.type == "cuda" and target.index else 0) >= count:
        raise ParameterError(
            _OWNER, "device", str(device), f"a device of this machine, which has {count} GPUs"
        )
    return target


def _dtype(
    dtype: "str | torch.dtype | None", model_kwargs: dict[str, Any], device: "torch.device"
) -> "str | torch.dtype":
    """Return the dtype that was asked for, taking it out of ``model_kwargs``."""
    import torch

    inner = [model_kwargs.pop(key, None) for key in ("dtype", "torch_dtype")]
    asked = {_parsed_dtype(value) for value in (dtype, *inner) if value is not None}
    if len(asked) > 1:
        raise ParameterError(
            _OWNER, "dtype", sorted(map(str, asked)), "one dtype, not several that differ"
        )
    if asked:
        return asked.pop()
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _parsed_dtype(dtype: "str | torch.dtype") -> "str | torch.dtype":
    import torch

    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ParameterError(_OWNER, "dtype", dtype, "float32, bfloat16, float16 or auto")
    return parsed


def _weights_hash(source: ModelSource, model: Any) -> str:
    if source.kind == "gguf":
        return file_sha256(Path(source.location))
    if source.kind == "folder":
        folder = Path(source.location)
        return files_sha256([path for path in folder.iterdir() if path.suffix in _CONTENT_SUFFIXES])
    commit = getattr(model.config, "_commit_hash", None)
    return f"commit:{commit}" if commit else f"hub:{source.location}"
