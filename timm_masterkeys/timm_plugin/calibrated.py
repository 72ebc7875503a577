"""The networks of ``.mk8`` names with ``pretrained=True``: converted and calibrated once, then kept in the cache.

An entry of the cache replaces the dense weights it was made from. A call loads it as it would load those: with the
call's head, input channels and preprocessing. So an entry depends only on what its key covers.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..calibration.images import BUILTIN
from ..calibration.pipeline import convert_and_calibrate
from ..conversion.config import MasterKeysConfig
from ..conversion.plan import converted_layers
from ..conversion.record import read_record, set_source
from ..errors import CheckpointError
from ..files import os_errors, tensors_sha256
from ..hub.load import SavedModel, read_saved
from ..hub.weights import COMPACT_NAME, FUSED_NAME, SECTION, describe_layers, files_sha256, fused_copy, write_compact
from .cache import MARK, cache_folder, cached_folder
from .cache_key import cache_key, weights_sha256
from .call import Call

_logger = logging.getLogger(__name__)


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
    config, shape = _shared_config(call), _weights_shape(call, state)  # checked before anything is downloaded
    digest, downloaded = weights_sha256(call), None
    if digest == "":  # the weights are not here yet: building the network downloads them
        downloaded = _build(call, shape)
        digest = weights_sha256(call) or tensors_sha256(downloaded.state_dict())
    key = cache_key(call, config, shape, digest, images)
    folder = None if key is None else _entry_folder(call, key)
    if folder is None:
        _logger.warning(
            "%s: its code or its arguments cannot be compared with those of other calls: it is not kept in the cache. "
            "save_pretrained(model, folder) keeps it.",
            call.name,
        )

    def calibrate() -> nn.Module:
        dense = _build(call, shape) if downloaded is None else downloaded
        if downloaded is None and weights_sha256(call) != digest:
            raise CheckpointError(f"The weights of {call.name} changed while they were loaded. Load them again.")
        model = _calibrate(call, config, dense, images, kept=folder is not None)
        set_source(model, replace(call.dense_source, sha256=digest))
        return model

    with cached_folder(folder, calibrate, partial(_save, key), _usable) as saved:
        yield read_saved(saved) or SavedModel(saved, {})  # empty if another process has just cleared the cache


def _shared_config(call: Call) -> MasterKeysConfig:
    """The configuration of an entry. Loading sets ``trainable``, except "sigmas", as these are fitted."""
    trainable = call.config.trainable
    return replace(call.config, trainable=trainable if trainable == "sigmas" else "shift")


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


def _entry_folder(call: Call, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(call.cache_dir) / re.sub(r"[^\w.-]", "_", f"{call.name}-{digest}")


def _build(call: Call, shape: tuple[int, int]) -> nn.Module:
    """The dense network with the head and the input channels of the weights."""
    channels, classes = shape
    size = (channels, *call.cfg.input_size[1:])
    cfg = replace(call.cfg, input_size=size, num_classes=classes, label_offset=None)
    weights_call = replace(call, cfg=cfg, kwargs={**call.arguments, "cache_dir": call.cache_dir})
    with _undisturbed():
        return weights_call.build(True).eval()


def _calibrate(call: Call, config: MasterKeysConfig, dense: nn.Module, images: str, kept: bool) -> nn.Module:
    """The calibrated network of a dense one; tells what it does, as it takes long."""
    _logger.warning(
        "%s: calibrating with %s%s (mk_calibrate=False turns it off).",
        call.name,
        "photographs that ship with timm_masterkeys" if images == BUILTIN else images,
        ", once; it is kept in the cache afterwards" if kept else "",
    )
    with _undisturbed():
        model, report = convert_and_calibrate(dense, config, images, call.flat_names)
    _logger.warning("%s: calibrated %s.", call.name, report.summary())
    return model


def _save(key: Any, model: nn.Module, folder: Path) -> None:
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


def _usable(folder: Path) -> bool:
    """Whether the files of an entry exist and are as they were saved."""
    with suppress(CheckpointError, OSError):
        if saved := read_saved(folder):
            saved.check(COMPACT_NAME, FUSED_NAME)
            return saved.about.get("sha256") == _section_sha256(saved.about)
    return False


def _section_sha256(section: Mapping[str, Any]) -> str:
    """The SHA-256 of a section but for this digest: the figures in it are of an entry's weights."""
    return hashlib.sha256(json.dumps({**section, "sha256": ""}, sort_keys=True).encode()).hexdigest()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Runs its body in float32 on the CPU, whatever torch's settings; restores these and the random state."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    full_precision = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.device("cpu"), full_precision:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
