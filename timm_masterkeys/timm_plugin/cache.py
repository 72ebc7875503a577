"""The cache on disk: the first process that needs a network makes its entry, and later ones use it."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from ..conversion.plan import converted_layers
from ..conversion.record import read_record
from ..errors import CheckpointError
from ..files import locked, os_errors, work_folder
from ..hub.load import SavedModel, read_saved
from ..hub.weights import COMPACT_NAME, FUSED_NAME, SECTION, describe_layers, files_sha256, fused_copy, write_compact

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
def cached_network(folder: Path | None, key: Any, make: Callable[[], nn.Module]) -> Iterator[SavedModel]:
    """Yields an entry of the cache as a saved model. One process makes it if it is missing or damaged; others wait.

    A folder appears whole or not at all. If it cannot be written, or ``folder`` is None, a temporary folder is yielded,
    which is removed after the context. The section of an entry that another process has just cleared is empty.

    Args:
        folder: The entry's folder; its parents are created if missing. None for no entry.
        key: Everything that the network depends on, as JSON data; written beside it.
        make: Makes the converted network.

    Raises:
        Whatever ``make`` raises.
    """
    unsaved = make() if folder is None else _make_entry(folder, key, make)
    if folder is None or unsaved is not None:
        with tempfile.TemporaryDirectory(prefix="timm_masterkeys-") as temporary:
            _save(unsaved, key, Path(temporary))
            yield read_saved(Path(temporary)) or SavedModel(Path(temporary), {})
        return
    with suppress(OSError):  # a read-only cache
        os.utime(folder)
    yield read_saved(folder) or SavedModel(folder, {})


def _make_entry(folder: Path, key: Any, make: Callable[[], nn.Module]) -> Any:
    """Makes an entry under its lock if it is missing or damaged; returns the network if it could not be saved."""
    if _is_whole(folder):
        return None
    with ExitStack() as stack:
        temporary = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock")))
            if _is_whole(folder):  # another process has made it meanwhile
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
            _save(made, key, temporary)
            os.replace(temporary, folder)
        except OSError as error:
            _warn_unwritable(folder, error)
            return made
    return None


def _save(model: nn.Module, key: Any, folder: Path) -> None:
    """Writes an entry: a saved model without a cfg, as each call has its own."""
    layers = converted_layers(model)
    section = {**describe_layers(layers), **read_record(model).to_dict()}
    with os_errors():
        save_file(fused_copy(model).state_dict(), folder / FUSED_NAME)
    write_compact(layers, folder / COMPACT_NAME)
    section["files"] = files_sha256(folder)
    section["sha256"] = _section_sha256(section)
    config = {"made_by": MARK, "key": key, SECTION: section}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether the files of an entry exist and are as they were saved."""
    with suppress(CheckpointError, OSError):
        if saved := read_saved(folder):
            saved.check(COMPACT_NAME, FUSED_NAME)
            return saved.section.get("sha256") == _section_sha256(saved.section)
    return False


def _section_sha256(section: Mapping[str, Any]) -> str:
    """The SHA-256 of a section but for this digest: the figures in it are of an entry's weights."""
    return hashlib.sha256(json.dumps({**section, "sha256": ""}, sort_keys=True).encode()).hexdigest()


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
