"""Registers ``arch.mk8`` names for every timm architecture with depthwise convolutions."""

import difflib
import functools
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, register_notrace_module
from torch import nn

from ..conversion.plan import plan_conversion
from ..conversion.tags import TAG, dense_tag, is_masterkeys_tag, masterkeys_tag
from ..errors import ConversionError
from ..layers import MasterKeyConv2d
from . import compat
from .call import tag_of
from .create import create
from .published import is_pointed, list_architectures, published_source

_logger = logging.getLogger(__name__)


def register_names(architectures: str | Sequence[str] | None = None) -> None:
    """Registers ``<arch>.mk8`` and ``<arch>.mk8_<stock tag>`` with timm. Done on import; may be repeated.

    Stock names, tags, defaults and weights stay as they are. ``<arch>.mk8`` takes the stock default weights and
    ``<arch>.mk8_<tag>`` those of that tag, through timm's own loader, and converts them. Any other ``.mk8`` name raises
    ConversionError, with the names that exist or the reason why there are none. The cache keeps networks of timm's own
    code only, as a change of other code would not be noticed: those are calibrated at each call.

    Args:
        architectures: Name or names; ``list_architectures()`` if None. Names timm does not know are ignored.

    Example:
        >>> register_names("my_net")  # your own architecture, registered with timm
        >>> model = timm.create_model("my_net.mk8")
    """
    problem = compat.unsupported()
    if problem:
        _logger.warning("%s. No .mk8 names; convert_to_masterkeys(model) works all the same.", problem)
        return
    if architectures is None and (problem := compat.too_old()):
        _logger.warning("%s.", problem)
    register_notrace_module(MasterKeyConv2d)  # FX feature extraction calls it as one node
    names = [architectures] if isinstance(architectures, str) else architectures or list_architectures()
    known = compat.architectures()
    for arch in known.intersection(names):
        _register_tags(arch)
    wrapped = known if architectures is None else known.intersection(names)  # architectures without names say why
    for old, new in timm.models.get_deprecated_models().items():  # timm passes their tags on to the new name
        arch = (new or "").partition(".")[0]
        if arch in wrapped:
            compat.wrap_entrypoint(old, functools.partial(_with_masterkeys, arch))
    for arch in wrapped:
        compat.wrap_entrypoint(arch, functools.partial(_with_masterkeys, arch))


def dense_name(name: str) -> str:
    """The dense timm name of a ``.mk8`` name; other names are returned unchanged.

    Example:
        >>> dense_name("convnext_tiny.mk8_in12k"), dense_name("convnext_tiny.mk8")
        ('convnext_tiny.in12k', 'convnext_tiny')
    """
    arch, _, tag = name.partition(".")
    if not is_masterkeys_tag(tag) or tag not in compat.cfgs(arch):
        return name
    stock = "" if is_pointed(name) else dense_tag(tag)
    return f"{arch}.{stock}" if stock else arch


def _register_tags(arch: str) -> None:
    stock = {tag: cfg for tag, cfg in compat.cfgs(arch).items() if not is_masterkeys_tag(tag)}
    for tag, cfg in (stock or {"": PretrainedCfg(architecture=arch)}).items():
        converted_tag = masterkeys_tag(tag)
        if not is_pointed(f"{arch}.{converted_tag}"):
            compat.add_tag(arch, converted_tag, replace(cfg, tag=converted_tag))


def _with_masterkeys(arch: str, stock: compat.Entrypoint) -> compat.Entrypoint:
    """Wraps the function that builds ``arch``: networks with ``.mk8`` tags are converted."""

    @functools.wraps(stock)
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = kwargs.get("pretrained_cfg")
        if isinstance(cfg, str) and cfg.startswith(TAG):  # "mk8typo" too
            _check_tag(arch, cfg, stock)
        if is_masterkeys_tag(tag_of(cfg)):
            return create(arch, stock, pretrained, kwargs)
        return stock(pretrained=pretrained, **kwargs)

    return entrypoint


def _check_tag(arch: str, tag: str, stock: compat.Entrypoint) -> None:
    """Raises ConversionError, which names the tags that exist, unless the architecture has this ``.mk8`` tag."""
    if tag not in compat.cfgs(arch):
        published_source(f"{arch}.{tag}")  # reads the environment variable, which may add the tag
    if tag in compat.cfgs(arch):
        return
    tags = [known for known in compat.cfgs(arch) if is_masterkeys_tag(known)]
    if tags:
        nearest = difflib.get_close_matches(tag, tags, cutoff=0)
        expected = f"expected {' or '.join(f'{arch}.{known}' for known in nearest)}"
        if len(nearest) < len(tags):
            expected += f"; timm.list_models('{arch}.mk8*') lists all {len(tags)}"
    elif _has_depthwise(stock):
        expected = f"which has no .mk8 names yet: register_names('{arch}') adds them"
    else:
        expected = f"but {arch} has no depthwise convolutions, so there is nothing to convert and no such name"
    raise ConversionError(f"Got {arch}.{tag}, {expected}.")


def _has_depthwise(stock: compat.Entrypoint) -> bool:
    """Whether the network of an entry point has layers to convert; False if it needs arguments."""
    with suppress(Exception), torch.device("meta"):
        return bool(plan_conversion(stock()).converted)
    return False
