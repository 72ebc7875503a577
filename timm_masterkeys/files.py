"""Atomic writes: a file appears whole under its name, or not at all. And what is in a file, as a number."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; on success it is flushed to disk and renamed to ``path``.

    Args:
        path: The file to write. Its folder must exist.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full; ``path`` is then as it was.

    Example:
        >>> with atomic_path("bank.safetensors") as tmp:
        ...     tmp.write_bytes(b"...")
    """
    path = Path(path)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(fd)
    tmp = Path(name)
    try:
        with os_errors():
            yield tmp
        with tmp.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        tmp.chmod(0o666 & ~umask)  # mkstemp makes private files; a written file gets the usual mode
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def os_errors() -> Iterator[None]:
    """Raises what safetensors says of a full disk or a lost folder as the OSError it is.

    Example:
        >>> with os_errors():
        ...     save_file(tensors, "model.safetensors")
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if not number:
            raise OSError(f"Cannot write: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hex, as ``sha256sum`` and the Hub have it.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
