"""The key of a calibrated network in the cache: everything that the network depends on."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg

from ..calibration.images import BUILTIN, photographs_sha256
from ..conversion.config import MasterKeysConfig
from ..files import file_sha256, folder_sha256, tensors_sha256
from .call import Call

CALIBRATION = 7  # increased whenever calibration gives other networks or records, or entries have another format

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # how images are prepared
MISSING = ""  # in place of the digest of weights that are not on this machine yet
_READING = ("custom_load", "first_conv", "classifier")  # of a cfg: how timm reads the weights


def cache_key(
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
            "architecture": [call.arch, _as_json(call.stock)],  # of a network from outside timm the code may change
            "arguments": _as_json(call.arguments),
            "weights": digest,
            "in_chans, num_classes": shape,
            "reading": _as_json([getattr(call.cfg, name) for name in _READING]),
            "preprocessing": _as_json([getattr(call.cfg, name) for name in _PREPROCESSING]),
            "source": _as_json(call.dense_source.__dict__),
            "images": photographs_sha256() if images == BUILTIN else folder_sha256(images, changed=True),
            "origin": images if images == BUILTIN else os.path.basename(images),
            "conversion": config.to_dict(),
            "bank": [config.bank.source, config.bank.licence],
            "flat_names": call.flat_names and bool(config.include or config.exclude),
        }
    except TypeError:
        return None


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


def weights_sha256(call: Call) -> str | None:
    """The SHA-256 of the weights that timm would load; ``MISSING`` if they are not on this machine yet.

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
        return MISSING
    if cfg.url:
        folder = call.cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints")
        return _digest(os.path.join(folder, os.path.basename(str(cfg.url))))
    return MISSING


def _digest(path: str) -> str:
    return file_sha256(path) if os.path.isfile(path) else MISSING
