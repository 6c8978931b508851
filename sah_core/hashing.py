"""Names by content: of files, remembered in the cache folder, and of texts."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sah_core.models import cache_folder


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    It is remembered by path, size and modification time, so that large files are read once.
    """
    path = path.resolve()
    status = path.stat()
    identity = f"{path}\n{status.st_size}\n{status.st_mtime_ns}"
    memo = cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError):
        known = memo.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    digest = sha256_of(path)
    # Remembering is only a saving: a cache folder that cannot be written costs time, not results.
    with suppress(OSError):
        _write_atomically(memo, digest)
    return digest


def files_sha256(files: Sequence[Path]) -> str:
    """Return one SHA-256 for several files: of their names and their contents, in name order."""
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        whole.update(f"{path.name} {file_sha256(path)}\n".encode())
    return whole.hexdigest()


def text_id(text: str) -> str:
    """Return a short name of a text by its content: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", text=True)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must leave no temporary file behind
        with suppress(OSError):
            os.unlink(temporary)
        raise
