"""The networks of ``.mk8`` names with ``pretrained=True``: converted and calibrated once, then kept in the cache.

An entry of the cache replaces the dense weights it was made from. A call loads it as it would load those: with the
call's head, input channels and preprocessing. So an entry depends only on what its key covers.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.images import BUILTIN
from ..calibration.pipeline import convert_and_calibrate
from ..conversion.config import MasterKeysConfig
from ..conversion.record import set_source
from ..conversion.torch_settings import undisturbed
from ..errors import CheckpointError
from ..files import tensors_sha256
from ..hub.load import SavedModel
from .cache import cache_folder, cached_network
from .cache_key import MISSING, cache_key, weights_sha256
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
    config, shape = _shared_config(call), _weights_shape(call, state)
    digest, downloaded = weights_sha256(call), None
    if digest == MISSING:  # building the network downloads the weights
        downloaded = _build_dense(call, shape)
        digest = weights_sha256(call) or tensors_sha256(downloaded.state_dict())
    key = cache_key(call, config, shape, digest, images)
    folder = None if key is None else _entry_folder(call, key)
    if folder is None:
        _logger.warning(
            "%s: its code or its arguments cannot be compared with those of other calls: it is not kept in the cache. "
            "save_pretrained(model, folder) keeps it.",
            call.name,
        )

    def make() -> nn.Module:
        dense = _build_dense(call, shape) if downloaded is None else downloaded
        if downloaded is None and weights_sha256(call) != digest:  # another process has replaced the file
            raise CheckpointError(f"The weights of {call.name} changed while they were loaded. Load them again.")
        model = _convert_and_log(call, config, dense, images, kept=folder is not None)
        set_source(model, replace(call.dense_source, sha256=digest))
        return model

    with cached_network(folder, key, make) as saved:
        yield saved


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
    registry_cfg: Any = call.registry_cfg
    classes = cfg.num_classes if cfg.num_classes >= 0 else registry_cfg.num_classes
    return channels, classes + (cfg.label_offset or 0)


def _first(name: Any) -> str:
    return name if isinstance(name, str) else next(iter(name or ()), "")


def _entry_folder(call: Call, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(call.cache_dir) / re.sub(r"[^\w.-]", "_", f"{call.name}-{digest}")


def _build_dense(call: Call, shape: tuple[int, int]) -> nn.Module:
    """The dense network with the head and the input channels of the weights."""
    channels, classes = shape
    size = (channels, *call.cfg.input_size[1:])
    cfg = replace(call.cfg, input_size=size, num_classes=classes, label_offset=None)
    weights_call = replace(call, cfg=cfg, kwargs={**call.arguments, "cache_dir": call.cache_dir})
    with undisturbed():
        return weights_call.build(True).eval()


def _convert_and_log(call: Call, config: MasterKeysConfig, dense: nn.Module, images: str, kept: bool) -> nn.Module:
    """The calibrated network of a dense one; tells what it does, as it takes long."""
    _logger.warning(
        "%s: calibrating with %s%s (mk_calibrate=False turns it off).",
        call.name,
        "photographs that ship with timm_masterkeys" if images == BUILTIN else images,
        ", once; it is kept in the cache afterwards" if kept else "",
    )
    with undisturbed():
        model, report = convert_and_calibrate(dense, config, images, call.flat_names)
    _logger.warning("%s: calibrated %s.", call.name, report.summary())
    return model
