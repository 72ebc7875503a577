"""Files: atomic writes, locks, and the SHA-256 of files, folders and tensors."""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

_SETTLED = 2  # seconds: the coarsest tick of a file system's clock

_digests: dict[tuple[int, ...], str] = {}  # of the files that this process has hashed, see ``file_sha256``


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is flushed to disk and renamed to ``path``.

    Args:
        path: The file to write. Its folder must exist.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full; ``path`` is not changed.

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
        tmp.chmod(0o666 & ~umask)  # mkstemp makes files private; this gives the usual mode
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def os_errors() -> Iterator[None]:
    """Turns an error of safetensors, such as a full disk or a missing folder, into an OSError.

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
    """The SHA-256 of a file in hex. A process hashes an unchanged file only once.

    Inode, size and times tell whether a file is unchanged, as in git's index. ``st_ctime_ns`` changes with each write
    (not with each through a memory map), even if the modification time is set back; but not within a tick of the clock,
    so a recent file is always hashed.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())  # of the opened file: where a link leads can change before it is opened
        identity = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED:
            return _hash(file)
        if identity not in _digests:
            _digests[identity] = _hash(file)
        return _digests[identity]


def _hash(file: BinaryIO) -> str:
    """The SHA-256 of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: str | os.PathLike[str], changed: bool = False) -> str:
    """The SHA-256, in hex, of names, sizes and times of the files in a folder, as ``walk_files`` finds them.

    The contents of thousands of images would take too long to read. With ``changed`` the time of the last
    change of any kind (``st_ctime_ns``) is included. It cannot be set, so other files and copies have another digest.
    """
    root, digest = os.fspath(folder), hashlib.sha256()
    for path in walk_files(root):
        stat = path.stat()
        times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}" if changed else str(stat.st_mtime_ns)
        digest.update(f"{path.relative_to(root).as_posix()} {stat.st_size} {times}\n".encode())
    return digest.hexdigest()


def walk_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All visible files in a folder, at all depths, sorted; links are followed, each folder is read once."""
    paths, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [os.path.join(parent, name) for name in names if not name.startswith(".")]
        paths += [Path(path) for path in visible if os.path.isfile(path)]
    return sorted(paths)


def tensors_sha256(value: Any) -> str:
    """The SHA-256, in hex, of a state dict, independent of its order, with nested mappings and sequences.

    Raises:
        TypeError: It holds something that is neither a tensor, a number, a string, None, a mapping nor a sequence.
    """
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        if not value.is_meta:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)} ".encode())
        for name in sorted(value, key=str):
            digest.update(f"{name!r}: ".encode())
            _update(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence {len(value)} ".encode())
        for item in value:
            _update(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(f"{value!r} ".encode())
    else:
        raise TypeError(f"a {type(value).__name__} has no digest")


@contextmanager
def locked(path: str | os.PathLike[str], wait: bool = True) -> Iterator[bool]:
    """Holds a lock until the context or the process ends; yields whether the lock is held.

    Args:
        path: The lock's file; created if missing, and not removed.
        wait: Wait for the lock; else the context runs at once, without the lock if another process holds it.
    """
    timeout = -1 if wait else 0
    lock: BaseFileLock = FileLock(path, timeout=timeout)
    try:
        try:
            lock.acquire()
        except NotImplementedError:  # a file system without locks: a killed process leaves this file behind
            lock = SoftFileLock(path, timeout=timeout)
            lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields a hidden temporary folder, and removes it afterwards; also removes those of killed processes.

    Args:
        parent: The existing folder.
        prefix: Prefix of the folder's name; only folders with this prefix are removed.
    """
    for lock_file in parent.glob(f".{prefix}-*.lock"):  # a living process holds its lock
        with locked(lock_file, wait=False) as free:
            if free:
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                with suppress(OSError):
                    lock_file.unlink()
    folder = parent / f".{prefix}-{secrets.token_hex(4)}"
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        with locked(lock):
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):
            lock.unlink()
