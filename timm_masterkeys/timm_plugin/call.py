"""The arguments of a ``timm.create_model`` call for a ``.mk8`` name: of its weights, conversion and network."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, load_model_config_from_hf, resolve_pretrained_cfg

from ..calibration.images import calibration_images, is_off
from ..conversion.config import MasterKeysConfig
from ..conversion.record import Source
from ..errors import CheckpointError, ConversionError
from . import compat
from .published import published_source

_logger = logging.getLogger(__name__)

_SETTINGS = tuple(field.name for field in fields(MasterKeysConfig))
_LOCATION = ("source", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")  # of a cfg's weights

# Arguments that timm applies when it loads an entry of the cache, so they are not part of its key.
_WHEN_LOADING = frozenset(
    "num_classes in_chans global_pool drop_rate drop_path_rate drop_block_rate attn_drop_rate proj_drop_rate "
    "features_only feature_cls out_indices cache_dir device dtype".split()
)


@dataclass(frozen=True)
class Call:
    """The sorted arguments of a call."""

    arch: str
    stock: compat.Entrypoint  # timm's own function that builds the architecture
    cfg: PretrainedCfg  # with the call's overlay; its source is "hf-hub" or "local-dir" for an address, None for a name
    registry_cfg: PretrainedCfg | None  # timm's cfg of the name; None for a tag that only a saved model has
    as_registered: bool  # the weights are where ``registry_cfg`` says: no overlay, address or use_weights moved them
    settings: Mapping[str, Any]  # the call's settings of the conversion, by their names without ``mk_``
    calibrate: Any  # the call's ``mk_calibrate``; None if absent
    kwargs: Mapping[str, Any]  # the arguments of ``stock`` besides the cfg

    @cached_property
    def config(self) -> MasterKeysConfig:
        """The configuration of the conversion; MasterKeysError for invalid settings."""
        return MasterKeysConfig(**self.settings)

    @property
    def name(self) -> str:
        return f"{self.arch}.{self.cfg.tag}"

    @property
    def cache_dir(self) -> Any:
        """Where weights are downloaded to; None for the default."""
        return self.kwargs.get("cache_dir")

    @property
    def has_dense_weights(self) -> bool:
        """Whether there are weights to calibrate: timm's own, a file, or a state dict; not those of a saved model."""
        return bool(self.cfg.has_weights or self.cfg.state_dict) and not self.cfg.source

    @property
    def flat_names(self) -> bool:
        """Whether patterns may use the names of a ``features_only`` model."""
        return bool(self.kwargs.get("features_only"))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that define the dense weights, without those that apply when weights are loaded."""
        return {name: value for name, value in self.kwargs.items() if name not in _WHEN_LOADING}

    @property
    def dense_source(self) -> Source:
        """The source of the dense weights, as far as it is known."""
        if self.as_registered or self.cfg.source == "hf-hub":
            return Source.from_cfg(self.registry_cfg if self.as_registered else self.cfg)
        return Source(license=self.cfg.license if self.cfg.source == "local-dir" else None)

    def build(self, pretrained: bool, **location: Any) -> Any:
        """The dense network, by timm's own function.

        Args:
            pretrained: Load the weights.
            location: ``file=`` or ``state_dict=`` of the weights, in place of the cfg's.

        Raises:
            CheckpointError: A file that cannot be read.
        """
        cfg = replace(self.cfg, **{**dict.fromkeys(_LOCATION), "custom_load": False, **location} if location else {})
        try:
            model: Any = self.stock(pretrained=pretrained, pretrained_cfg=cfg, **self.kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"Cannot read the weights of {self.name}: {error}. Get the file again.") from error
        cfg_location = {name: getattr(self.cfg, name) for name in _LOCATION if name != "state_dict"}
        for module in model.modules():  # a features_only wrapper and its model have a cfg each
            module_cfg = getattr(module, "pretrained_cfg", None)
            if isinstance(module_cfg, dict):
                module_cfg.pop("state_dict", None)
                module_cfg.update(cfg_location)
                for name in [name for name, value in cfg_location.items() if value is None]:
                    del module_cfg[name]
        return model

    def images(self) -> str | None:
        """The calibration images, see ``calibration_images``; None on the meta device."""
        return None if torch.empty(0).is_meta else calibration_images(self.calibrate)

    def warn_unused(self, why: str) -> None:
        """Warns that the call's calibration images have no effect, if it gives any."""
        if self.calibrate is not None and not is_off(self.calibrate):
            _logger.warning("%s: mk_calibrate=%r has no effect: %s.", self.name, self.calibrate, why)


def read_call(arch: str, stock: compat.Entrypoint, pretrained: bool, given: Mapping[str, Any]) -> Call:
    """Sorts the arguments of a call, as for ``create.create``; the cfg may be a tag, a dict or a PretrainedCfg.

    Raises:
        MasterKeysError: An unknown setting, or a name that is pointed at weights of another architecture.
    """
    kwargs = dict(given)
    cfg, overlay = kwargs.pop("pretrained_cfg"), kwargs.pop("pretrained_cfg_overlay", None)
    name = f"{arch}.{tag_of(cfg)}"
    published = published_source(name) if pretrained else None
    resolved = resolve_pretrained_cfg(arch, cfg, overlay)
    registry_cfg = compat.cfgs(arch).get(tag_of(cfg) or "")  # None for a tag that only a saved model has
    as_registered = registry_cfg is not None and _location(resolved) == _location(registry_cfg)
    if published and as_registered:
        resolved, as_registered = _published_cfg(arch, published, resolved, registry_cfg, kwargs), False
    settings = {setting: kwargs.pop(f"mk_{setting}") for setting in _SETTINGS if f"mk_{setting}" in kwargs}
    calibrate = kwargs.pop("mk_calibrate", None)
    others = [argument for argument in kwargs if argument.startswith("mk_")]
    if others:
        known = ", ".join(f"mk_{setting}" for setting in (*_SETTINGS, "calibrate"))
        raise ConversionError(f"{name}: there is no {others[0]}; the settings of a .mk8 name are {known}.")
    if isinstance(kwargs.get("pretrained_model_args"), dict):  # a published model's own arguments
        arguments = kwargs["pretrained_model_args"].items()
        kwargs["pretrained_model_args"] = {n: value for n, value in arguments if not n.startswith("mk_")}
    return Call(arch, stock, resolved, registry_cfg, as_registered, settings, calibrate, kwargs)


def tag_of(cfg: Any) -> str | None:
    """The pretrained tag of a ``pretrained_cfg`` as a call gives it: a tag, a dict or a PretrainedCfg."""
    if isinstance(cfg, str):
        return cfg
    return cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)


def _location(cfg: PretrainedCfg) -> list[Any]:
    return [getattr(cfg, name) or None for name in _LOCATION]


def _published_cfg(
    arch: str, source: str, resolved: PretrainedCfg, registry_cfg: PretrainedCfg, kwargs: dict[str, Any]
) -> PretrainedCfg:
    """The cfg of published weights with the call's changes; adds their model arguments to ``kwargs``, as timm does."""
    cfg, architecture, model_args = load_model_config_from_hf(source, cache_dir=kwargs.get("cache_dir"))
    if architecture != arch:
        raise CheckpointError(
            f"{source} holds a {architecture}, but a name of {arch} was pointed at it with use_weights."
        )
    changed = {
        field.name: value
        for field in fields(PretrainedCfg)
        if (value := getattr(resolved, field.name)) != getattr(registry_cfg, field.name)
    }
    kwargs["pretrained_model_args"] = dict(model_args or {})
    for name, value in kwargs["pretrained_model_args"].items():
        kwargs.setdefault(name, value)
    return replace(PretrainedCfg(**cfg), **changed)
