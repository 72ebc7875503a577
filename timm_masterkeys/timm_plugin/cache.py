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
from typing import Any

from huggingface_hub import constants

from ..files import locked, work_folder
from ..hub.files import COMPACT_NAME, FUSED_NAME

_logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TIMM_MASTERKEYS_CACHE"
MARK = "timm_masterkeys cache entry"  # an entry has it in its config.json, under the name "made_by"


@dataclass(frozen=True)
class CacheEntry:
    """A calibrated network in the cache."""

    path: Path
    size: int  # bytes
    used: float  # when it was last loaded, in seconds since 1970


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where calibrated networks are kept: a folder ``timm_masterkeys`` of our own.

    It is in the folder that the environment variable ``TIMM_MASTERKEYS_CACHE`` names, else in ``cache_dir``, as given
    to ``create_model``, else in the Hub's cache for other libraries (``HF_HOME/assets``).
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
    """Gives a folder, made first if it is missing or damaged; by one process, the others wait for it.

    A folder appears whole or not at all. Where it cannot be written, or there is to be none, what was made is in a
    temporary folder, which lasts as long as the context.

    Args:
        folder: An entry of the cache; its parents are made if missing. None keeps nothing.
        make: Does the work.
        save: Writes what was made into an empty folder.
        usable: Whether a folder's files are as they were saved.

    Raises:
        Whatever ``make`` raises.
    """
    made = make() if folder is None else _make_entry(folder, make, save, usable)
    if folder is None or made is not None:
        with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as temporary:
            save(made, Path(temporary))
            yield Path(temporary)
        return
    with suppress(OSError):  # a cache that others fill
        os.utime(folder)
    yield folder


def _make_entry(
    folder: Path, make: Callable[[], Any], save: Callable[[Any, Path], object], usable: Callable[[Path], bool]
) -> Any:
    """Makes an entry under its lock, unless it is there; returns what was made if it cannot be written, else None."""
    if usable(folder):
        return None
    with ExitStack() as stack:
        work = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock")))
            if usable(folder):  # another process has made it meanwhile
                return None
            if folder.exists():
                _check_own(folder)
                _logger.warning("%s is damaged and is made anew.", folder)
                shutil.rmtree(folder)
            work = stack.enter_context(work_folder(folder.parent, folder.name))
        except OSError as error:
            _warn_unwritable(folder, error)
        made = make()
        if work is None:
            return made
        try:
            save(made, work)
            os.replace(work, folder)
        except OSError as error:
            _warn_unwritable(folder, error)
            return made
    return None


def _warn_unwritable(folder: Path, error: OSError) -> None:
    _logger.warning("%s cannot be written (%s): what is made now will be made again next time.", folder, error)


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
                with suppress(OSError), work_folder(root, entry.path.name) as trash:
                    os.replace(entry.path, trash / entry.path.name)  # at once, for those that are about to read it
                removed += not entry.path.exists()
    return removed


def _check_own(folder: Path) -> None:
    """Raises OSError if a folder holds other files than an entry does: it is not removed."""
    others = {path.name for path in folder.iterdir()} - {"config.json", FUSED_NAME, COMPACT_NAME}
    if others:
        raise FileExistsError(f"it holds {min(others)}, which is no file of a cache entry")


def _is_entry(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["made_by"] == MARK)
    except (OSError, ValueError, LookupError, TypeError):
        return False
