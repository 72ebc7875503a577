"""Folders on disk that are made once, by whichever process comes first, and used from then on."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import BaseFileLock, FileLock, SoftFileLock
from huggingface_hub import constants

from ..errors import CheckpointError

_logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TIMM_MASTERKEYS_CACHE"

_DAMAGE = (CheckpointError, OSError, json.JSONDecodeError)  # what a folder that is not as it was saved raises

Made = TypeVar("Made")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class CacheEntry:
    """A folder in the cache.

    Attributes:
        path: The folder.
        size: Bytes.
        used: When it was last loaded, in seconds since 1970.
    """

    path: Path
    size: int
    used: float


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where repaired networks are kept.

    The environment variable ``TIMM_MASTERKEYS_CACHE``, else a folder in ``cache_dir``, as given to ``create_model``,
    else in the Hub's cache for other libraries (``HF_HOME/assets``).
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(cache_dir or constants.HF_ASSETS_CACHE).expanduser() / "timm_masterkeys"


def load_or_make(
    root: Path,
    name: str,
    make: Callable[[], Made],
    save: Callable[[Made, Path], object],
    load: Callable[[Path], Loaded],
) -> Loaded:
    """Loads ``root/name``, made and saved first if it is missing or damaged; by one process, the others wait for it.

    A folder appears whole or not at all. Where the cache cannot be written, what was made is saved to and loaded from a
    temporary folder.

    Args:
        root: The cache's folder; made if missing.
        name: Of the folder in it.
        make: Does the work.
        save: Writes what was made into a folder that does not exist yet.
        load: Reads such a folder.

    Raises:
        Whatever ``make`` and ``load`` raise; ``load``'s errors only of a folder just made.
    """
    folder = root / name
    if folder.is_dir():
        try:
            return _loaded(folder, load)
        except _DAMAGE as error:
            _logger.warning("%s is damaged and will be made anew: %s", folder, error)
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()  # not a folder: whoever has the lock removes those as rubbish
            stack.callback(_acquired(root / f".{name}.lock").release)
        except OSError as error:
            _logger.warning("%s cannot be written (%s): what is made now will be made again next time.", root, error)
            return _load_from_temporary(make(), name, save, load)
        if folder.is_dir():
            try:
                return _loaded(folder, load)  # made meanwhile
            except _DAMAGE:
                shutil.rmtree(folder)
        for stale in root.glob(f".{name}.*/"):  # of a process that was killed: this one has the lock
            shutil.rmtree(stale, ignore_errors=True)
        made = make()
        try:
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as tmp:
                save(made, Path(tmp) / name)
                os.replace(Path(tmp) / name, folder)
        except OSError as error:
            _logger.warning("%s cannot be written (%s): what was made will be made again next time.", folder, error)
            return _load_from_temporary(made, name, save, load)
    return load(folder)


def list_entries(root: Path) -> list[CacheEntry]:
    """The folders of a cache, the last used first."""
    folders = [path for path in root.glob("[!.]*/") if (path / "config.json").is_file()]
    entries = [
        CacheEntry(path, sum(file.stat().st_size for file in path.iterdir() if file.is_file()), path.stat().st_mtime)
        for path in folders
    ]
    return sorted(entries, key=lambda entry: -entry.used)


def clear_entries(root: Path) -> int:
    """Removes the folders of a cache, and what killed processes left there; how many entries there were."""
    entries = list_entries(root)
    for path in [entry.path for entry in entries] + list(root.glob(".*.*/")):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".*.lock"):
        path.unlink(missing_ok=True)
    return len(entries)


def _acquired(path: Path) -> BaseFileLock:
    """Held until released, or until the process ends."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks: a killed process leaves this one behind
        lock = SoftFileLock(path)
        lock.acquire()
    return lock


def _loaded(folder: Path, load: Callable[[Path], Loaded]) -> Loaded:
    loaded = load(folder)
    try:
        os.utime(folder)
    except OSError:  # a cache that others fill
        pass
    return loaded


def _load_from_temporary(
    made: Made, name: str, save: Callable[[Made, Path], object], load: Callable[[Path], Loaded]
) -> Loaded:
    with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as tmp:
        save(made, Path(tmp) / name)
        return load(Path(tmp) / name)
