"""The cache on disk: the first process that needs a folder makes it, and later ones use it."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..files import locked, work_folder
from ..hub.weights import COMPACT_NAME, FUSED_NAME

_logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TIMM_MASTERKEYS_CACHE"
MARK = "timm_masterkeys cache entry"  # value of "made_by" in the config.json of every entry


@dataclass(frozen=True)
class CacheEntry:
    """A calibrated network in the cache."""

    path: Path
    size: int  # bytes
    used: float  # when it was last loaded, in seconds since 1970


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder ``timm_masterkeys`` in which calibrated networks are kept.

    Its parent is the folder that the environment variable ``TIMM_MASTERKEYS_CACHE`` names, else ``cache_dir`` (as given
    to ``create_model``), else the Hub's folder for other libraries (``HF_HOME/assets``).
    """
    parent = os.environ.get(CACHE_VARIABLE) or cache_dir or constants.HF_ASSETS_CACHE
    return Path(parent).expanduser() / "timm_masterkeys"


@contextmanager
def cached_folder(
    folder: Path | None,
    make: Callable[[], Any],
    save: Callable[[Any, Path], object],
    usable: Callable[[Path], bool],
) -> Iterator[Path]:
    """Yields a folder of the cache. One process makes it if it is missing or damaged; the others wait.

    A folder appears whole or not at all. If it cannot be written, or ``folder`` is None, a temporary folder is yielded,
    which is removed after the context.

    Args:
        folder: An entry of the cache; its parents are created if missing. None for no entry.
        make: Makes the value to save.
        save: Writes the value into an empty folder.
        usable: Whether a folder exists and its files are as they were saved.

    Raises:
        Whatever ``make`` raises.
    """
    made = make() if folder is None else _make_entry(folder, make, save, usable)
    if folder is None or made is not None:
        with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as temporary:
            save(made, Path(temporary))
            yield Path(temporary)
        return
    with suppress(OSError):  # a read-only cache
        os.utime(folder)
    yield folder


def _make_entry(
    folder: Path, make: Callable[[], Any], save: Callable[[Any, Path], object], usable: Callable[[Path], bool]
) -> Any:
    """Makes an entry under its lock if it is missing; returns what ``make`` gave if it cannot be saved, else None."""
    if usable(folder):
        return None
    with ExitStack() as stack:
        temporary = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock")))
            if usable(folder):  # another process has made it meanwhile
                return None
            if folder.exists():
                _check_files(folder)
                _logger.warning("%s is damaged and is made anew.", folder)
                shutil.rmtree(folder)
            temporary = stack.enter_context(work_folder(folder.parent, folder.name))
        except OSError as error:
            _warn_unwritable(folder, error)
        made = make()
        if temporary is None:
            return made
        try:
            save(made, temporary)
            os.replace(temporary, folder)
        except OSError as error:
            _warn_unwritable(folder, error)
            return made
    return None


def _warn_unwritable(folder: Path, error: OSError) -> None:
    _logger.warning("%s cannot be written (%s): what is made now will be made again next time.", folder, error)


def list_entries(root: Path) -> list[CacheEntry]:
    """The entries of a cache, most recently used first; folders without ``MARK`` are ignored."""
    entries = []
    for path in root.glob("[!.]*/"):
        with suppress(FileNotFoundError):  # another process clears meanwhile
            if _is_entry(path):
                size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
                entries.append(CacheEntry(path, size, path.stat().st_mtime))
    return sorted(entries, key=lambda entry: -entry.used)


def clear_entries(root: Path) -> int:
    """Removes the entries of a cache, except those that a process is making; returns the number removed."""
    removed = 0
    for entry in list_entries(root):
        with locked(root / f".{entry.path.name}.lock", wait=False) as held:
            if held:
                with suppress(OSError), work_folder(root, entry.path.name) as trash:
                    os.replace(entry.path, trash / entry.path.name)  # atomic, for processes about to read it
                removed += not entry.path.exists()
    return removed


def _check_files(folder: Path) -> None:
    """Raises OSError if a folder holds files that no entry has, so that it is not removed."""
    foreign = {path.name for path in folder.iterdir()} - {"config.json", FUSED_NAME, COMPACT_NAME}
    if foreign:
        raise FileExistsError(f"it holds {min(foreign)}, which is no file of a cache entry")


def _is_entry(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["made_by"] == MARK)
    except (OSError, ValueError, LookupError, TypeError):
        return False
