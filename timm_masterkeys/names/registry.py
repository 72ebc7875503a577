"""``arch.mk8`` names for every timm architecture with depthwise convolutions."""

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, load_model_config_from_hf, resolve_pretrained_cfg
from torch import nn

from ..errors import CheckpointError, ConversionError
from ..keys.banks import DEFAULT_BANK, get_bank
from ..layers import MasterKeyConv2d, Trainable
from ..models import _timm
from ..models.checkpoint import DENSE_NAME, check_dense, restore_masterkeys
from ..models.plan import plan_conversion
from ..models.provenance import SOURCE_NOTE, TAG, is_masterkeys_tag, set_known
from ..models.report import conversion_report
from ..models.surgery import convert_to_masterkeys, initialize_masterkeys, replace_layers
from .pretrained import NotRepairedError, calibration_images, load_repaired

_logger = logging.getLogger(__name__)

WEIGHTS_VARIABLE = "TIMM_MASTERKEYS_WEIGHTS"

_published: dict[str, str] = {}  # names pointed at published weights
_malformed: dict[str, str] = {}  # names that WEIGHTS_VARIABLE means to point at some, and what is wrong
_ANY = "*"  # in _malformed: whatever name a list that cannot be read holds
_creating: ContextVar[dict[str, Any] | None] = ContextVar(
    "the settings of the .mk8 model timm is building", default=None
)

_SOURCE_FIELDS = ("source", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "num_classes")  # of a cfg
_SETTINGS = ("bank", "keys_per_kernel", "trainable", "include", "exclude", "agreement")


def list_architectures() -> list[str]:
    """The timm architectures that hold depthwise convolutions and so have ``.mk8`` names; from a shipped table."""
    return resources.files(__package__).joinpath("data/architectures.txt").read_text().split()


def register_names(architectures: str | Sequence[str] | None = None) -> None:
    """Registers ``<arch>.mk8`` and ``<arch>.mk8_<stock tag>`` with timm. Done on import; again, it changes nothing.

    Stock names, tags, defaults and weights stay as they are. ``<arch>.mk8`` takes the stock default weights and
    ``<arch>.mk8_<tag>`` those of that tag, through timm's own loader, and converts them.

    Args:
        architectures: Name or names; ``list_architectures()`` if None. Names timm does not know are passed over.
    """
    problem = _timm.unsupported()
    if problem:
        _logger.warning("%s. No .mk8 names; convert_to_masterkeys(model) works all the same.", problem)
        return
    if architectures is None and (problem := _timm.too_old()):
        _logger.warning("%s.", problem)
    _timm.keep_whole_in_fx(MasterKeyConv2d)
    _timm.before_loading(_take_compact)
    known = _timm.architectures()
    registered = (
        list_architectures()
        if architectures is None
        else [architectures]
        if isinstance(architectures, str)
        else architectures
    )
    for arch in registered:
        if arch in known:
            stock = {tag: cfg for tag, cfg in _timm.cfgs(arch).items() if not is_masterkeys_tag(tag)}
            for tag, cfg in (stock or {"": PretrainedCfg(architecture=arch)}).items():
                note = SOURCE_NOTE + (cfg.hf_hub_id or (f"{arch}.{cfg.tag}" if cfg.tag else arch))
                own = f"{TAG}_{tag}" if tag else TAG
                if f"{arch}.{own}" not in _published:
                    _timm.add_tag(arch, own, replace(cfg, tag=own, notes=(*(cfg.notes or ()), note)))
            _timm.wrap_entrypoint(arch, functools.partial(_masterkeys_entrypoint, arch))
    for old, new in timm.models.get_deprecated_models().items():  # timm passes their tags on to the new name
        arch = (new or "").partition(".")[0]
        if arch in registered:
            _timm.wrap_entrypoint(old, functools.partial(_masterkeys_entrypoint, arch))
    _use_variable(os.environ.get(WEIGHTS_VARIABLE, ""))


def use_weights(name: str | os.PathLike[str], source: str = "") -> None:
    """Points a ``.mk8`` name, or all names of a list, at published weights: a team's own, repaired or fine-tuned.

    ``pretrained=True`` then loads them, with the classes, preprocessing and arguments they were published with. The
    environment variable ``TIMM_MASTERKEYS_WEIGHTS`` does the same on import: ``name=source`` pairs and paths of lists,
    parted by blanks. A pair that is none is told on import, and an error when weights of the name it meant are asked
    for; so is a list that cannot be read, for every ``.mk8`` name that nothing else points at weights.

    Args:
        name: ``<arch>.mk8``, or ``<arch>.mk8_<anything>`` for a new name. Or, without a source, the path of a list such
            as ``timm-masterkeys zoo`` writes: ``name=source`` a line; empty lines and those with # are passed over.
        source: ``org/name`` or ``org/name@revision`` on the Hub, published by ``push_to_hub``.

    Raises:
        ConversionError: Not such a name, an architecture without depthwise convolutions, no such source, or a list that
            cannot be read or holds one of these; none of its names is then pointed anywhere.

    Example:
        >>> use_weights("convnext_tiny.mk8_ours", "org/convnext_tiny.mk8@4f2a91c")
        >>> model = timm.create_model("convnext_tiny.mk8_ours", pretrained=True)
        >>> use_weights("zoo/names.txt")
    """
    if source or not os.path.isfile(name):
        pairs = [(os.fspath(name), source)]
    else:
        pairs = [_pair(line) for line in _read_list(name)]
    for pair in pairs:
        _check_pair(*pair)
    for own, published in pairs:
        arch, _, tag = own.partition(".")
        stock = timm.get_pretrained_cfg(arch) or PretrainedCfg(architecture=arch)
        cfg = replace(stock, url=None, hf_hub_id=published, hf_hub_filename=DENSE_NAME, tag=tag, license=None)
        _timm.add_tag(arch, tag, cfg)
        _published[own] = published
        _malformed.pop(own, None)


def _use_variable(value: str) -> None:
    """Does what WEIGHTS_VARIABLE asks for; what cannot be done is told, and noted for the names it is about."""
    for part in [value] if os.path.isfile(value) else value.split():
        try:
            pairs = _read_list(part) if os.path.isfile(part) or part.endswith(".txt") else [part]
        except ConversionError as error:
            _logger.warning("%s: '%s' is left out. %s", WEIGHTS_VARIABLE, part, error)
            _malformed.setdefault(_ANY, f"{WEIGHTS_VARIABLE} holds '{part}': {error}")
            continue
        for pair in pairs:
            try:
                use_weights(*_pair(pair))
            except ConversionError as error:
                _logger.warning("%s: '%s' is left out. %s", WEIGHTS_VARIABLE, pair, error)
                for name in re.findall(r"(?<![\w./-])\w+\.mk8\w*", pair):
                    _malformed.setdefault(name, f"{WEIGHTS_VARIABLE} holds '{pair}': {error}")


def _read_list(path: str | os.PathLike[str]) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"The list of names '{path}' cannot be read: {error}.") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _pair(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    return name, source


def _check_pair(name: str, source: str) -> None:
    arch, _, tag = name.partition(".")
    if not is_masterkeys_tag(tag) or arch not in list_architectures():
        raise ConversionError(
            f"Got the name '{name}', expected '<arch>.mk8' or '<arch>.mk8_<name>', the architecture one of "
            "list_architectures(); or the path of a list of them."
        )
    repo_id, _, revision = source.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or ("@" in source and not revision):
        raise ConversionError(f"Got the source '{source}' for {name}, expected 'org/name' or 'org/name@revision'.")


def stock_name(name: str, pretrained: bool) -> str:
    """The dense timm name that a ``.mk8`` name stands for; others, and those of published weights, as they are.

    Raises:
        ConversionError: ``TIMM_MASTERKEYS_WEIGHTS`` means to point the name at weights, but is malformed.
    """
    if pretrained and name in _malformed:
        raise ConversionError(_malformed[name])
    arch, _, tag = name.partition(".")
    if not is_masterkeys_tag(tag) or tag not in _timm.cfgs(arch) or (pretrained and name in _published):
        return name
    stock = "" if name in _published else tag.removeprefix(TAG).removeprefix("_")
    return f"{arch}.{stock}" if stock else arch


def _masterkeys_entrypoint(arch: str, stock: _timm.Entrypoint) -> _timm.Entrypoint:
    """The function that builds ``arch``: the stock one, and a conversion if the tag asks for it."""

    @functools.wraps(stock)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = kwargs.get("pretrained_cfg")
        given = cfg if isinstance(cfg, dict) else {"tag": cfg} if isinstance(cfg, str) else vars(cfg) if cfg else {}
        tag = given.get("tag")
        if not is_masterkeys_tag(tag):
            dense = stock(pretrained=pretrained, **kwargs)
            if pretrained and _loaded_its_cfg(dense):
                set_known(dense)
            return dense
        if pretrained and f"{arch}.{tag}" in _malformed:
            raise ConversionError(_malformed[f"{arch}.{tag}"])
        if pretrained and isinstance(cfg, str) and _ANY in _malformed and f"{arch}.{cfg}" not in _published:
            raise ConversionError(_malformed[_ANY])
        if pretrained and isinstance(cfg, str) and f"{arch}.{cfg}" in _published:
            _take_published(arch, _published[f"{arch}.{cfg}"], kwargs)
        elif isinstance(cfg, str):
            kwargs["pretrained_cfg"] = timm.get_pretrained_cfg(f"{arch}.{cfg}")
        settings = {name: kwargs.pop(f"mk_{name}") for name in _SETTINGS if f"mk_{name}" in kwargs}
        asked = kwargs.pop("mk_calibrate", None)
        if {"agreement", "keys_per_kernel"} <= settings.keys():
            raise ConversionError("mk_agreement chooses the keys of each layer: drop mk_keys_per_kernel.")
        if isinstance(kwargs.get("pretrained_model_args"), dict):  # a published model's own arguments
            kwargs["pretrained_model_args"] = {
                name: value for name, value in kwargs["pretrained_model_args"].items() if not name.startswith("mk_")
            }
        if pretrained:
            images = None if torch.empty(0).is_meta else calibration_images(asked)
            source = resolve_pretrained_cfg(arch, kwargs["pretrained_cfg"], kwargs.get("pretrained_cfg_overlay"))
            if images and not source.source and (source.has_weights or source.state_dict):
                try:
                    return _repaired(f"{arch}.{tag}", stock, create, source, settings, images, kwargs)
                except NotRepairedError:
                    pass  # weights of a converted network, or a machine too small
            elif given.get("source") == "local-dir":
                check_dense(given["file"])
        if "agreement" in settings:
            raise ConversionError(
                "mk_agreement chooses keys by a repair of stock weights: it needs pretrained=True, a name without "
                "published weights, and images (no mk_calibrate=False)."
            )
        model: Any = _build(f"{arch}.{tag}", stock, settings, pretrained, kwargs)
        if any(isinstance(module, MasterKeyConv2d) for module in model.modules()):
            return model  # from a checkpoint of a converted model
        if model.pretrained_cfg.get("source") in ("hf-hub", "local-dir") and restore_masterkeys(
            model, model.pretrained_cfg, settings, kwargs.get("cache_dir"), values=pretrained
        ):
            return model
        if not pretrained:
            return initialize_masterkeys(model, **{"bank": DEFAULT_BANK, **settings}, inplace=True)
        convert_to_masterkeys(model, **{"bank": DEFAULT_BANK, **settings}, inplace=True)
        if not any(parameter.is_meta for parameter in model.parameters()):
            _logger.warning("%s", _summary(f"{arch}.{tag}", model))
        return model

    return create


def _build(
    name: str, stock: _timm.Entrypoint, settings: dict[str, Any], pretrained: bool, kwargs: dict[str, Any]
) -> Any:
    """The stock network; converted, if its weights are a checkpoint of a converted one."""
    creating = _creating.set(settings)
    try:
        model: Any = stock(pretrained=pretrained, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"Cannot read the weights of {name}: {error}. Get the file again.") from error
    finally:
        _creating.reset(creating)
    if pretrained and _loaded_its_cfg(model):
        set_known(model)
    for module in model.modules():  # a features_only wrapper and the model in it have a cfg each
        if isinstance(getattr(module, "pretrained_cfg", None), dict):
            module.pretrained_cfg.pop("state_dict", None)
    return model


def _repaired(
    name: str,
    stock: _timm.Entrypoint,
    create: _timm.Entrypoint,
    source: PretrainedCfg,
    settings: dict[str, Any],
    images: str,
    kwargs: dict[str, Any],
) -> nn.Module:
    """The repaired network of stock weights, loaded from the cache by the path that published weights take."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    whole = {"pretrained_cfg": kwargs["pretrained_cfg"], "pretrained_cfg_overlay": overlay}

    def build() -> nn.Module:
        dense = _build(name, stock, settings, True, {**whole, "cache_dir": kwargs.get("cache_dir")})
        if any(isinstance(module, MasterKeyConv2d) for module in dense.modules()):
            raise NotRepairedError
        return dense

    def load(folder: Path) -> nn.Module:
        own = {**kwargs, "pretrained_cfg_overlay": {k: v for k, v in overlay.items() if k not in _SOURCE_FIELDS}}
        _take_saved(folder, own)
        trainable = {"mk_trainable": settings["trainable"]} if "trainable" in settings else {}
        return create(pretrained=True, **own, **trainable)

    converting = {k: v for k, v in settings.items() if k != "trainable" or v == "scales"}
    return load_repaired(name, source, converting, images, build, load, kwargs.get("cache_dir"))


def _loaded_its_cfg(model: nn.Module) -> bool:
    """Whether the weights timm has loaded are those of the registry or of a config.json, not some of the caller's."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("source") in ("hf-hub", "local-dir"):
        return True
    registered = _timm.cfgs(cfg.get("architecture") or "").get(cfg.get("tag") or "")
    sources = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")
    return registered is not None and all(cfg.get(name) == getattr(registered, name) for name in sources)


def _take_compact(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Converts the layers that a checkpoint of a converted model has in compact form; timm then loads it as it is."""
    settings = _creating.get()
    indices = {n.removesuffix(".key_index"): value for n, value in state_dict.items() if n.endswith(".key_index")}
    if not indices or (settings is None and any(f"{name}.keys" not in state_dict for name in indices)):
        return
    if settings is None:
        raise CheckpointError(
            f"The weights are of a converted model (its layers have a key_index, as {min(indices)}), the name is a "
            "stock one: create '<arch>.mk8' instead, or save fuse_masterkeys(model)."
        )
    bank = get_bank(settings.get("bank", DEFAULT_BANK))
    patterns = {name: settings[name] for name in ("include", "exclude") if name in settings}
    planned = [layer.name for layer in plan_conversion(model, bank, **patterns).converted]
    differing = indices.keys() - planned or (set(planned) - indices.keys() if patterns else ())
    if differing:
        raise CheckpointError(
            f"The weights are of a model converted in other layers than this one would be: {sorted(differing)[0]}, for "
            "one. Create it with the settings the checkpoint was made with (mk_include, mk_exclude)."
        )
    layers: dict[str, nn.Module] = {}
    for name, index in indices.items():
        trainable: Trainable = settings.get("trainable", "shift")
        made_with: Trainable = "scales" if f"{name}.log_sigma" in state_dict else trainable
        conv: Any = model.get_submodule(name)
        layer = MasterKeyConv2d.from_conv(
            conv, bank, settings.get("keys_per_kernel", index.shape[-1]), made_with, fit=False
        )
        layer.set_trainable(trainable, requires_grad=conv.weight.requires_grad)
        layers[name] = layer
    replace_layers(model, layers)


def _take_published(arch: str, source: str, kwargs: dict[str, Any]) -> None:
    """Puts cfg and arguments of published weights among the keyword arguments, as timm does for hf-hub: names."""
    cfg, architecture, model_args = load_model_config_from_hf(source, cache_dir=kwargs.get("cache_dir"))
    if architecture != arch:
        raise CheckpointError(
            f"{source} holds a {architecture}, but a name of {arch} was pointed at it with use_weights."
        )
    _take_config({**cfg, "hf_hub_filename": DENSE_NAME}, model_args, kwargs)


def _take_saved(folder: Path, kwargs: dict[str, Any]) -> None:
    """The same for a saved folder, as timm does for local-dir: names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cfg = {**config["pretrained_cfg"], "num_classes": config["num_classes"]}
        model_args = config.get("model_args", {})
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' is damaged ({error!r}).") from error
    _take_config({**cfg, "source": "local-dir", "file": str(folder)}, model_args, kwargs)


def _take_config(cfg: dict[str, Any], model_args: dict[str, Any], kwargs: dict[str, Any]) -> None:
    kwargs["pretrained_cfg"] = cfg
    kwargs["pretrained_model_args"] = dict(model_args)
    for name, value in model_args.items():
        kwargs.setdefault(name, value)


def _summary(name: str, model: nn.Module) -> str:
    report = conversion_report(model)
    return (
        f"{name}: {report.total.channels:,} kernels of {len(report.layers)} layers put on bank {report.bank}, mean R2 "
        f"{report.total.mean_r2:.2f}. One-shot conversion costs accuracy: repair it with "
        "calibrate_masterkeys(model, dense_model, images) or fine-tune; conversion_report(model) shows each layer."
    )
