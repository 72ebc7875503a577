"""Loads saved models: finds their files in a folder or on the Hub, and converts a dense model as saved."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg
from torch import nn

from ..conversion.record import restore_record
from ..errors import CheckpointError
from ..files import file_sha256
from ..layers import Trainable
from .weights import COMPACT_NAME, FUSED_NAME, SECTION, check_version, read_compact, restore_layers


@dataclass(frozen=True)
class SavedModel:
    """A saved model on this machine: its folder, and the section ``masterkeys`` of its ``config.json``."""

    folder: Path
    section: Mapping[str, Any]

    @property
    def fused(self) -> Path:
        """The file of the fused weights."""
        return self.folder / FUSED_NAME

    def check(self, *names: str) -> None:
        """Raises CheckpointError unless the named files exist and have the SHA-256 that ``config.json`` lists."""
        for name in names:
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{name} is missing in '{self.folder}', though config.json there lists it. Get it again, or save "
                    "the model again."
                )
            try:
                expected = self.section["files"][name]
            except (LookupError, TypeError) as error:
                raise CheckpointError(f"'{self.folder / 'config.json'}' is damaged ({error!r}).") from None
            if file_sha256(path) != expected:
                cached = path.is_symlink()  # in the Hub's cache, which would give the same file again
                again = f"Remove '{path.resolve()}' and load again" if cached else "Get all of them again"
                raise CheckpointError(
                    f"'{path}' is not the file that config.json lists (its SHA-256 differs): damaged, altered, or "
                    f"the files are not of one conversion. {again}, or save the model again."
                )


def find_saved(cfg: PretrainedCfg, cache_dir: Any = None, weights: bool = True) -> SavedModel | None:
    """The saved model of a ``pretrained_cfg``, downloaded and checked; None if its weights are of no converted model.

    Args:
        cfg: With ``source`` "local-dir" and ``file``, or "hf-hub" and ``hf_hub_id``, as timm has just read it.
        cache_dir: The Hub's cache.
        weights: Whether the fused weights are needed too.

    Raises:
        CheckpointError: A file that is missing, damaged, or of another conversion; or the Hub does not answer.
    """
    local = cfg.source == "local-dir"
    folder = Path(str(cfg.file)) if local else _cached_folder(str(cfg.hf_hub_id), cache_dir)
    saved = read_saved(folder)
    if saved is None:
        return None
    names = (COMPACT_NAME, FUSED_NAME) if weights else (COMPACT_NAME,)
    if not local:
        _download(str(cfg.hf_hub_id).partition("@")[0], names, folder, cache_dir)
    saved.check(*names)
    return saved


def read_saved(folder: Path) -> SavedModel | None:
    """The saved model in a folder, not checked; None if there is none. Errors as for ``read_section``."""
    section = read_section(folder / "config.json")
    return None if section is None else SavedModel(folder, section)


def read_section(config: Path) -> Mapping[str, Any] | None:
    """The ``masterkeys`` section of a config.json, None if there is none; CheckpointError if it cannot be read."""
    try:
        section = json.loads(config.read_text(encoding="utf-8")).get(SECTION)
        if section is not None:
            check_version(config, section)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"'{config}' is damaged ({error!r}). Get it again, or save the model again.") from None
    return section


def _cached_folder(hub_id: str, cache_dir: Any) -> Path:
    """The cached snapshot of a repository, at the revision of the ``config.json`` that timm has just read."""
    repo_id, _, revision = hub_id.partition("@")
    path = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache_dir, revision=revision or None)
    if not isinstance(path, str):
        raise CheckpointError(f"config.json of {hub_id} is not in the cache. Load the model by its name.")
    return Path(path).parent


def _download(repo_id: str, names: Iterable[str], folder: Path, cache_dir: Any) -> None:
    """Downloads files at the snapshot's commit, so that all are of one commit; cached files are not requested again."""
    for name in names:
        try:
            hf_hub_download(repo_id, name, revision=folder.name, cache_dir=cache_dir)
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"Cannot get {name} of {repo_id}: the Hub does not answer and the cache does not have it. Try again "
                "online."
            ) from error
        except EntryNotFoundError:
            pass  # ``SavedModel.check`` raises


def convert_as_saved(
    model: nn.Module, saved: SavedModel, trainable: Trainable | None = None, *, random: bool = False
) -> nn.Module:
    """Gives a dense model with the fused weights the layers and the record of the saved one. In place.

    ``trainable`` and ``random`` are as for ``restore_layers``; with ``random`` there is no record.
    """
    compact = read_compact(saved.folder / COMPACT_NAME)
    restore_layers(model, compact, trainable, random)
    if not random:
        banks = {settings.bank for settings in compact.layers.values()}
        try:
            restore_record(model, saved.section, banks, trainable)
        except (LookupError, TypeError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"'{saved.folder / 'config.json'}' is damaged ({error!r}).") from None
    return model
