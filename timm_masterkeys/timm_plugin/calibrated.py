"""The networks of ``.mk8`` names with ``pretrained=True``: converted and calibrated once, then kept in the cache.

An entry of the cache replaces the dense weights it was made from. A call loads it as it would load those: with the
call's head, input channels and preprocessing. So an entry depends only on what its key covers.
"""

import hashlib
import json
import logging
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import nn

from ..calibration.agreement import KeyBudget, convert_to_agreement
from ..calibration.calibrate import CalibrationReport, calibrate_masterkeys
from ..calibration.images import BUILTIN, photographs_sha256
from ..conversion.apply import describe
from ..conversion.config import MasterKeysConfig
from ..conversion.convert import convert, fuse_masterkeys
from ..conversion.plan import resolve
from ..conversion.record import read_record, write_record
from ..errors import CheckpointError
from ..files import file_sha256, folder_sha256, os_errors, tensors_sha256
from ..hub.files import COMPACT_NAME, FUSED_NAME, describe_layers, save_compact
from ..hub.load import SECTION, SavedModel, read_section
from ..hub.save import contiguous
from .cache import MARK, cache_folder, cached_folder
from .call import Call

_logger = logging.getLogger(__name__)

CALIBRATION = 5  # increased whenever calibration gives other networks or records

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # how images are prepared
_SETTLED = 2  # seconds: the coarsest tick of a file system's clock, see ``_digest``
_READING = ("custom_load", "first_conv", "classifier")  # of a cfg: how timm reads the weights


@contextmanager
def calibrated_entry(call: Call, state: Mapping[str, Any] | None, images: str) -> Iterator[SavedModel]:
    """Yields the calibrated network of a call's dense weights as a saved model; makes it if it is not in the cache.

    Args:
        call: The call.
        state: The dense weights' state dict, if they are not timm's own.
        images: "builtin", or the path of a folder.

    Raises:
        MasterKeysError: As ``calibrate_masterkeys`` and ``convert_to_agreement``.
    """
    config = _shared_config(call)  # checked before anything is downloaded
    shape = _weights_shape(call, state)
    built: list[nn.Module] = []
    digest = _weights_sha256(call)
    if digest == "":  # building the network downloads them
        built.append(_undisturbed(partial(_build, call, shape)))
        digest = _weights_sha256(call) or tensors_sha256(built[0].state_dict())
    key = _key(call, config, shape, digest, images)
    folder = None
    if key is None:
        _logger.warning("%s: its arguments cannot be compared with those of other calls: it is not kept.", call.name)
    else:
        key_digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_folder(call.cache_dir) / re.sub(r"[^\w.-]", "_", f"{call.name}-{key_digest}")

    def calibrate() -> nn.Module:
        if built:
            dense = built.pop()
        else:
            dense = _build(call, shape)
            if _weights_sha256(call) != digest:
                raise CheckpointError(f"The weights of {call.name} changed while they were loaded. Load them again.")
        _logger.warning(
            "%s: calibrating with %s%s (mk_calibrate=False turns it off).",
            call.name,
            "photographs that ship with timm_masterkeys" if images == BUILTIN else images,
            ", once; it is kept in the cache afterwards" if folder else "",
        )
        model, report = convert_and_calibrate(dense, config, images, call.flat_names)
        _logger.warning("%s: calibrated %s.", call.name, report.summary())
        write_record(model, replace(read_record(model), source=replace(call.source, sha256=digest)))
        return model

    with cached_folder(folder, partial(_undisturbed, calibrate), partial(_save, key), _usable) as saved:
        section = read_section(saved / "config.json")  # None if another process has just cleared the cache
        yield SavedModel(saved, section or {})


def convert_and_calibrate(
    dense: nn.Module, config: MasterKeysConfig, images: str, flat_names: bool = False, **options: Any
) -> tuple[nn.Module, CalibrationReport | KeyBudget]:
    """Converts and calibrates a copy of a dense network; returns the copy and its figures.

    Args:
        dense: A timm model.
        config: The conversion.
        images: "builtin", or the path of a folder.
        flat_names: As for ``convert``.
        **options: As for ``calibrate_masterkeys`` and ``convert_to_agreement``, such as ``max_images``.

    Raises:
        MasterKeysError: As ``calibrate_masterkeys`` and ``convert_to_agreement``.
    """
    if config.agreement is not None:
        if flat_names and (config.include or config.exclude):  # patterns replaced by names of the dense model
            names = tuple(layer.name for layer in resolve(config, dense, flat_names=True).converted)
            config = replace(config, include=names, exclude=())
        settings: Any = {
            name: getattr(config, name) for name in ("agreement", "bank", "include", "exclude", "trainable")
        }
        return convert_to_agreement(dense, images=images, **settings, **options)
    model = convert(dense, config, "project", flat_names=flat_names)
    return model, calibrate_masterkeys(model, dense, images, **options)


def _key(
    call: Call, config: MasterKeysConfig, shape: tuple[int, int], digest: str | None, images: str
) -> dict[str, Any] | None:
    """Everything that an entry depends on, as JSON data.

    None if a value cannot be compared with those of other calls, or if missing weights may be random.
    """
    if digest is None or not call.kwargs.get("pretrained_strict", True):
        return None
    try:
        return {
            "calibration": CALIBRATION,
            "versions": [timm.__version__, torch.__version__],
            "architecture": call.arch,
            "arguments": _as_json(call.arguments),
            "weights": digest,
            "in_chans, num_classes": shape,
            "reading": _as_json([getattr(call.cfg, name) for name in _READING]),
            "preprocessing": _as_json([getattr(call.cfg, name) for name in _PREPROCESSING]),
            "source": _as_json(call.source.__dict__),
            "images": photographs_sha256() if images == BUILTIN else folder_sha256(images, changed=True),
            "origin": images if images == BUILTIN else os.path.basename(images),
            "conversion": config.to_dict(),
            "bank": [config.bank.source, config.bank.licence],
            "flat_names": call.flat_names and bool(config.include or config.exclude),
        }
    except TypeError:
        return None


def _shared_config(call: Call) -> MasterKeysConfig:
    """The configuration of an entry. Loading sets ``trainable``, except "sigmas", as these are fitted."""
    trainable = call.config.trainable
    return replace(call.config, trainable=trainable if trainable == "sigmas" else "shift")


def _as_json(value: Any) -> Any:
    """An argument as JSON data, classes and functions of torch and timm by their names.

    Raises:
        TypeError: A value that cannot be compared with those of other calls.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": [[_as_json(name), _as_json(item)] for name, item in value.items()]}
    if isinstance(value, partial):
        return {"partial": [_as_json(part) for part in (value.func, value.args, value.keywords)]}
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    if module.partition(".")[0] in ("torch", "timm") and name:
        resolved: Any = sys.modules.get(module)
        for part in name.split("."):
            resolved = getattr(resolved, part, None)
        if resolved is value:  # else the name belongs to another object
            return {"name": f"{module}.{name}"}
    raise TypeError(f"{value!r} cannot be compared with the arguments of other calls")


def _weights_shape(call: Call, state: Mapping[str, Any] | None) -> tuple[int, int]:
    """Input channels and classes of the dense weights, before the call's own are applied."""
    cfg, state = call.cfg, state or {}
    stem, head = (state.get(f"{_first(name)}.weight") for name in (cfg.first_conv, cfg.classifier))
    channels = cfg.input_size[0] if stem is None else stem.shape[1]
    if head is not None:
        return channels, len(head)
    if stem is not None:  # names are timm's, but there is no head
        return channels, 0
    own_cfg: Any = call.own_cfg
    classes = cfg.num_classes if cfg.num_classes >= 0 else own_cfg.num_classes
    return channels, classes + (cfg.label_offset or 0)


def _first(name: Any) -> str:
    return name if isinstance(name, str) else next(iter(name or ()), "")


def _build(call: Call, shape: tuple[int, int]) -> nn.Module:
    """The dense network with the head and the input channels of the weights."""
    channels, classes = shape
    size = (channels, *call.cfg.input_size[1:])
    cfg = replace(call.cfg, input_size=size, num_classes=classes, label_offset=None)
    weights_call = replace(call, cfg=cfg, kwargs={**call.arguments, "cache_dir": call.cache_dir})
    return weights_call.build(True).eval()


def _save(key: Any, model: nn.Module, folder: Path) -> None:
    """Writes an entry: a saved model without a cfg, as each call has its own."""
    dense = contiguous(fuse_masterkeys(model))
    with os_errors():
        save_file(dense.state_dict(), folder / FUSED_NAME)
    save_compact(model, folder / COMPACT_NAME)
    section = {**describe_layers(describe(model)), **read_record(model).to_dict()}
    section["crc32"] = {**_checksums(folder), "section": _crc32(section)}
    config = {"made_by": MARK, "key": key, SECTION: section}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _usable(folder: Path) -> bool:
    """Whether the files of an entry exist and are as they were saved."""
    try:
        section = dict(read_section(folder / "config.json") or {})
        return section.pop("crc32") == {**_checksums(folder), "section": _crc32(section)}
    except (CheckpointError, OSError, LookupError, TypeError):
        return False


def _checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of an entry's weight files by name; it detects damage in a third of the time of SHA-256."""
    checksums = {}
    for name in (FUSED_NAME, COMPACT_NAME):
        checksums[name] = 0
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 18):
                checksums[name] = zlib.crc32(chunk, checksums[name])
    return checksums


def _crc32(section: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(section, sort_keys=True).encode())


def _undisturbed(work: Callable[[], nn.Module]) -> nn.Module:
    """Calls ``work`` in float32 on the CPU, whatever torch's settings; restores these and the random state."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    full_precision = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.device("cpu"), full_precision:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            return work()
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)


def _weights_sha256(call: Call) -> str | None:
    """The SHA-256 of the weights that timm would load; "" if they are not on this machine yet.

    None for a state dict with a value that has no digest.
    """
    cfg: PretrainedCfg = call.cfg
    if cfg.state_dict:
        try:
            return tensors_sha256(cfg.state_dict)
        except TypeError:
            return None
    if cfg.file:
        return _digest(cfg.file)
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        for filename in names:
            options: Any = {"cache_dir": call.cache_dir, "revision": revision or None}
            path = try_to_load_from_cache(repo_id, filename, **options)
            if isinstance(path, str):
                blob = os.path.basename(os.path.realpath(path))  # its name is the SHA-256 of a large file
                return blob if len(blob) == 64 else file_sha256(path)
        return ""
    if cfg.url:
        folder = call.cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints")
        return _digest(os.path.join(folder, os.path.basename(str(cfg.url))))
    return ""


def _digest(path: str) -> str:
    """The SHA-256 of a file, "" if it does not exist. A process hashes an unchanged file only once.

    Inode, size and times tell whether a file is unchanged, as in git's index. ``st_ctime_ns`` changes with each write,
    even if the modification time is set back; but not within a tick of the clock, so a recent file is always hashed.
    """
    if not os.path.isfile(path):
        return ""
    stat = os.stat(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED:
        return file_sha256(path)
    return _known_sha256(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=64)
def _known_sha256(path: str, *stat: int) -> str:
    return file_sha256(path)
