"""GGUF files, converted once into a folder that transformers loads fast.

transformers reads a GGUF's vocabulary several times and rebuilds its tensor names per submodule:
15 s and more for a model of 135M parameters. So the first load writes config, tokenizer and
safetensors into the user cache, in a folder named after the file's hash; later loads read those.
"""

import io
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from sah_core.errors import ModelNotFoundError, OutputFolderError
from sah_core.hashing import file_sha256, sha256_of
from sah_core.models import cache_folder

_CONVERTER = 1
"""Changes whenever the same GGUF would be written differently."""
_MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


def converted_folder(path: Path) -> Path:
    """Return the folder that holds the converted form of a GGUF file, making it if need be.

    Any number of processes may ask at once: one converts, the others wait. The folder appears
    under its name only when it is complete, and one that has been damaged is made anew.

    Raises:
        ModelNotFoundError: transformers cannot read the file.
        OutputFolderError: the cache folder cannot be written.
    """
    digest = file_sha256(path)
    root = cache_folder() / "gguf"
    folder = root / f"{digest[:32]}-{_CONVERTER}"
    if _is_sound(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            # Another process may have made it while this one waited for the lock.
            if not _is_sound(folder):
                _make(path, digest, folder)
    except OSError as error:
        reason = f"{error.strerror or error}; set SAH_CACHE_DIR to a folder that can be written"
        raise OutputFolderError(str(root), reason) from error
    return folder


def _make(path: Path, digest: str, folder: Path) -> None:
    # Holding the lock, so whatever unfinished folder lies here is of a process that was killed.
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):
        _remove(leftover)
    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    building.mkdir()
    _log.info("converting %s once, into %s", path.name, folder)
    try:
        _convert(path, building)
        manifest = {"source_sha256": digest, "converter": _CONVERTER, "files": _entries(building)}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():
            damaged = folder.with_name(f"{folder.name}.{os.getpid()}.old.tmp")
            os.replace(folder, damaged)
            _remove(damaged)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The bar of the GGUF reader knows no switch and would cut through the caller's display.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
            split = _pre_tokenizer_name(path)
    except Exception as error:  # transformers and gguf raise anything on a file they do not know
        raise unreadable(str(path), error) from error
    _restore_pre_tokenizer(tokenizer, split)
    _strip_quantization_marks(model)
    # Half the size where that loses nothing: the weights of a bfloat16 or integer-only file.
    if all(torch.equal(w, w.to(torch.bfloat16).to(w.dtype)) for w in model.state_dict().values()):
        model = model.to(torch.bfloat16)
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, which safetensors does not raise as OSError
        raise OSError(str(error)) from error


def _pre_tokenizer_name(path: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _restore_pre_tokenizer(tokenizer: Any, name: str) -> None:
    # transformers 5 splits every GPT-2 style GGUF vocabulary in GPT-2's way. SmolLM's tokenizer
    # takes digits one by one before that, which matters after two spaces or a line break.
    if name != "smollm":
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def _strip_quantization_marks(model: Any) -> None:
    # save_pretrained refuses a model that was read from GGUF, although its weights are plain.
    model.hf_quantizer = None
    for owner, mark in (
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, mark):
            delattr(owner, mark)


def _entries(folder: Path) -> dict[str, dict[str, int | str]]:
    entries: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.iterdir()):
        status = path.stat()
        entries[path.name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256_of(path),
        }
    return entries


def _is_sound(folder: Path) -> bool:
    """Whether the folder is whole: sizes and headers always, contents if a file was touched."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(_is_intact(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return False


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != entry["size"]:
        return False
    if status.st_mtime_ns != entry["mtime_ns"]:
        if sha256_of(path) != entry["sha256"]:
            return False
        with suppress(OSError):  # a copied cache: its times are mended, so it is read only once
            os.utime(path, ns=(status.st_atime_ns, entry["mtime_ns"]))
    return path.suffix != ".safetensors" or _has_header(path, status.st_size)


def _has_header(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            return False
        header = json.loads(file.read(length))
    ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
    return bool(max(ends) == size - 8 - length)


def unreadable(name: str, error: Exception) -> ModelNotFoundError:
    """Return the one-line form of what transformers raised on a model's files."""
    text = str(error).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    return ModelNotFoundError(name, f"transformers cannot load it ({reason.rstrip('.')})")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars and its chatter below errors, then restore both."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
