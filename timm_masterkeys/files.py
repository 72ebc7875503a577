"""Atomic writes: a file appears whole under its name, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        yield tmp
        with tmp.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        tmp.chmod(0o666 & ~umask)  # mkstemp makes private files; a written file gets the usual mode
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
