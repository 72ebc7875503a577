"""``arch.mk8`` names for every timm architecture with depthwise convolutions."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import nn

from . import _timm
from .banks import DEFAULT_BANK
from .checkpoint import restore_masterkeys
from .layers import MasterKeyConv2d
from .report import conversion_report
from .surgery import convert_to_masterkeys, initialize_masterkeys

_logger = logging.getLogger(__name__)

TAG = "mk8"

_SETTINGS = ("bank", "keys_per_kernel", "trainable", "include", "exclude")


def list_architectures() -> list[str]:
    """The timm architectures that hold depthwise convolutions and so have ``.mk8`` names; from a shipped table."""
    return resources.files(__package__).joinpath("data/architectures.txt").read_text().split()


def register_names(architectures: Sequence[str] | None = None) -> None:
    """Registers ``<arch>.mk8`` and ``<arch>.mk8_<stock tag>`` with timm. Done on import; doing it again changes nothing.

    Stock names, tags, defaults and weights stay as they are. ``<arch>.mk8`` takes the stock default weights and
    ``<arch>.mk8_<tag>`` those of that tag, through timm's own loader, and converts them.

    Args:
        architectures: Names to register; ``list_architectures()`` if None. Names timm does not know are passed over.
    """
    problem = _timm.unsupported()
    if problem:
        _logger.warning("%s. No .mk8 names; convert_to_masterkeys(model) works all the same.", problem)
        return
    _timm.keep_whole_in_fx(MasterKeyConv2d)
    known = _timm.architectures()
    for arch in list_architectures() if architectures is None else architectures:
        if arch in known:
            stock = {tag: cfg for tag, cfg in _timm.cfgs(arch).items() if not is_masterkeys_tag(tag)}
            for tag, cfg in (stock or {"": PretrainedCfg(architecture=arch)}).items():
                name = f"{arch}.{cfg.tag}" if cfg.tag else arch
                note = f"masterkeys: converted from the weights of {name}"
                own = f"{TAG}_{tag}" if tag else TAG
                _timm.add_tag(arch, own, replace(cfg, tag=own, notes=(*(cfg.notes or ()), note)))
            _timm.wrap_entrypoint(arch, _masterkeys_entrypoint)


def is_masterkeys_tag(tag: str | None) -> bool:
    """Whether a pretrained tag is one of this package's: ``mk8`` or ``mk8_...``."""
    return tag is not None and (tag == TAG or tag.startswith(f"{TAG}_"))


def _masterkeys_entrypoint(arch: str, stock: _timm.Entrypoint) -> _timm.Entrypoint:
    """The function that builds ``arch``: the stock one, and a conversion if the tag asks for it."""

    @functools.wraps(stock)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = kwargs.get("pretrained_cfg")
        tag = cfg if isinstance(cfg, str) else cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)
        if not is_masterkeys_tag(tag):
            return stock(pretrained=pretrained, **kwargs)
        if isinstance(cfg, str):
            kwargs["pretrained_cfg"] = timm.get_pretrained_cfg(f"{arch}.{cfg}")
        settings = {name: kwargs.pop(f"mk_{name}") for name in _SETTINGS if f"mk_{name}" in kwargs}
        if isinstance(kwargs.get("pretrained_model_args"), dict):  # a published model's own arguments
            kwargs["pretrained_model_args"] = {
                name: value for name, value in kwargs["pretrained_model_args"].items() if not name.startswith("mk_")
            }
        model = stock(pretrained=pretrained, **kwargs)
        model.pretrained_cfg.pop("state_dict", None)
        if not pretrained:
            return initialize_masterkeys(model, **{"bank": DEFAULT_BANK, **settings}, inplace=True)
        if model.pretrained_cfg.get("source") in ("hf-hub", "local-dir") and restore_masterkeys(
            model, model.pretrained_cfg, settings, kwargs.get("cache_dir")
        ):
            return model
        convert_to_masterkeys(model, **{"bank": DEFAULT_BANK, **settings}, inplace=True)
        _logger.warning("%s", _summary(f"{arch}.{tag}", model))
        return model

    return create


def _summary(name: str, model: nn.Module) -> str:
    report = conversion_report(model)
    return (
        f"{name}: {report.total.channels:,} kernels of {len(report.layers)} layers put on bank {report.bank}, mean R2 "
        f"{report.total.mean_r2:.2f}. One-shot conversion costs accuracy: calibrate or fine-tune before use; "
        "conversion_report(model) shows each layer."
    )
