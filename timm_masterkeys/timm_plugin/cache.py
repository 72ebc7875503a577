"""Folders on disk that are made once, by whichever process comes first, and used from then on."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants

from ..files import locked, work_folder

_logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TIMM_MASTERKEYS_CACHE"
MARK = "timm_masterkeys cache entry"  # an entry has it in its config.json, under the name "made_by"

_FOLDER = "timm_masterkeys"

Made = TypeVar("Made")


@dataclass(frozen=True)
class CacheEntry:
    """A calibrated network in the cache.

    Attributes:
        path: The folder.
        size: Bytes.
        used: When it was last loaded, in seconds since 1970.
    """

    path: Path
    size: int
    used: float


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where calibrated networks are kept: a folder ``timm_masterkeys`` of our own.

    It is in the folder that the environment variable ``TIMM_MASTERKEYS_CACHE`` names, else in ``cache_dir``, as given
    to ``create_model``, else in the Hub's cache for other libraries (``HF_HOME/assets``).
    """
    parent = os.environ.get(CACHE_VARIABLE) or cache_dir or constants.HF_ASSETS_CACHE
    return Path(parent).expanduser() / _FOLDER


@contextmanager
def cached_folder(
    root: Path,
    name: str,
    make: Callable[[], Made],
    save: Callable[[Made, Path], object],
    usable: Callable[[Path], bool],
) -> Iterator[Path]:
    """Gives ``root/name``, made first if it is missing or damaged; by one process, the others wait for it.

    A folder appears whole or not at all. Where the cache cannot be written, what was made is in a temporary folder,
    which lasts as long as the context.

    Args:
        root: The cache's folder; made if missing.
        name: Of the folder in it.
        make: Does the work.
        save: Writes what was made into an empty folder.
        usable: Whether a folder's files are as they were saved.

    Raises:
        Whatever ``make`` raises.
    """
    folder = root / name
    made = None if usable(folder) else _make_entry(folder, make, save, usable)
    if made is not None:
        with temporary_folder(made, save) as temporary:
            yield temporary
        return
    with suppress(OSError):  # a cache that others fill
        os.utime(folder)
    yield folder


def _make_entry(
    folder: Path, make: Callable[[], Made], save: Callable[[Made, Path], object], usable: Callable[[Path], bool]
) -> Made | None:
    """Makes an entry under its lock, unless another did meanwhile; returns what was made if it cannot be written."""
    with ExitStack() as stack:
        work = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock")))
            if usable(folder):
                return None
            if folder.exists():
                _logger.warning("%s is damaged and is made anew.", folder)
                shutil.rmtree(folder)
            work = stack.enter_context(work_folder(folder.parent, folder.name))
        except OSError as error:
            _tell_unwritable(folder, error)
        made = make()
        if work is None:
            return made
        try:
            save(made, work)
            os.replace(work, folder)
        except OSError as error:
            _tell_unwritable(folder, error)
            return made
    return None


def _tell_unwritable(folder: Path, error: OSError) -> None:
    _logger.warning("%s cannot be written (%s): what is made now will be made again next time.", folder, error)


@contextmanager
def temporary_folder(made: Made, save: Callable[[Made, Path], object]) -> Iterator[Path]:
    """Gives a folder with what was made, which lasts as long as the context; arguments as for ``cached_folder``."""
    with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as folder:
        save(made, Path(folder))
        yield Path(folder)


def list_entries(root: Path) -> list[CacheEntry]:
    """The entries of a cache, the last used first. Folders without our mark are none."""
    entries = []
    for path in root.glob("[!.]*/"):
        with suppress(FileNotFoundError):  # another process clears meanwhile
            if _is_entry(path):
                size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
                entries.append(CacheEntry(path, size, path.stat().st_mtime))
    return sorted(entries, key=lambda entry: -entry.used)


def clear_entries(root: Path) -> int:
    """Removes the entries of a cache, but for those that a process is making; returns how many are gone."""
    removed = 0
    for entry in list_entries(root):
        with locked(root / f".{entry.path.name}.lock", wait=False) as held:
            if held:
                shutil.rmtree(entry.path, ignore_errors=True)
                removed += not entry.path.exists()
    return removed


def _is_entry(folder: Path) -> bool:
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(about["made_by"] == MARK)
    except (OSError, ValueError, LookupError, TypeError):
        return False
