"""The entry point of all ``.mk8`` names: from a call of ``timm.create_model`` to a network."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import nn

from ..conversion.config import LayerSettings
from ..conversion.convert import convert
from ..conversion.plan import resolve
from ..conversion.record import Record, set_source, write_record
from ..conversion.report import conversion_report
from ..errors import CheckpointError, ConversionError
from ..hub.load import SavedModel, convert_as_saved, find_saved
from ..hub.weights import FUSED_NAME, Compact, names_in, restore_layers
from ..layers import MasterKeyConv2d, SigmaKeyConv2d
from . import compat
from .calibrated import calibrated_entry
from .call import Call, read_call

_logger = logging.getLogger(__name__)


def create(arch: str, stock: compat.Entrypoint, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """Builds the network that a call asks for. The first of these that applies:

    1. A saved model, in a folder or on the Hub.
    2. Random keys, without ``pretrained``.
    3. A checkpoint of a converted network.
    4. Dense weights and images to calibrate with: the calibrated network, from the cache.
    5. Dense weights alone, projected.

    Args:
        arch: The architecture.
        stock: timm's own function that builds it.
        pretrained: As for ``timm.create_model``.
        kwargs: The arguments that ``timm.create_model`` passes on, with the conversion's settings (``mk_...``).

    Raises:
        MasterKeysError: Invalid settings, or weights that cannot be loaded.
    """
    call = read_call(arch, stock, pretrained, kwargs)
    if call.cfg.source in ("hf-hub", "local-dir"):
        saved = find_saved(call.cfg, call.cache_dir, weights=pretrained)
        if saved is not None:
            return _load_saved(call, saved, pretrained)
    if not pretrained:
        _refuse_agreement(call)
        call.warn_unused("there are no weights to calibrate without pretrained=True")
        return convert(call.build(False), call.config, "random", inplace=True, flat_names=call.flat_names)
    call.config  # noqa: B018  # raises for invalid settings, before weights are read
    state = _read_weights(call)
    if state and (entries := _compact_entries(state)):
        return _load_checkpoint(call, state, entries)
    if call.has_dense_weights and (images := call.images()):
        return _load_calibrated(call, state, images)
    return _convert_only(call)


def _load_saved(call: Call, saved: SavedModel, pretrained: bool) -> nn.Module:
    """The network as it was saved; without ``pretrained`` with the saved settings and random keys."""
    fixed = sorted(f"mk_{name}" for name in call.settings.keys() - {"trainable"})
    if fixed:
        raise ConversionError(
            f"{', '.join(fixed)} cannot change a saved conversion. Drop them, or convert the source weights anew."
        )
    call.warn_unused("these weights are of a converted model, and loaded as they were saved")
    if pretrained:
        return _load(call, saved)
    return convert_as_saved(call.build(False), saved, call.settings.get("trainable"), random=True)


def _load_calibrated(call: Call, state: Mapping[str, Any] | None, images: str) -> nn.Module:
    """The network with calibrated weights."""
    while True:  # another process may clear the cache between making and loading an entry; then it is made again
        with calibrated_entry(call, state, images) as entry:
            try:
                return _load(call, entry)
            except Exception:  # safetensors raises a RuntimeError for a file that has just gone
                if entry.folder.exists():
                    raise


def _load(call: Call, saved: SavedModel) -> nn.Module:
    """The network with saved weights: timm loads the fused weights, then the layers get the saved entries."""
    return convert_as_saved(call.build(True, file=str(saved.fused)), saved, call.settings.get("trainable"))


def _convert_only(call: Call) -> nn.Module:
    """The network with dense weights projected on the keys, not calibrated; logs a warning."""
    _refuse_agreement(call)
    call.warn_unused("only weights that timm has under a name, or in a file or state dict, are calibrated")
    model = convert(call.build(True), call.config, "project", inplace=True, flat_names=call.flat_names)
    set_source(model, call.dense_source)
    if not any(parameter.is_meta for parameter in model.parameters()):
        report = conversion_report(model)
        _logger.warning(
            "%s: %s kernels of %d layers projected on bank %s, mean R2 %.2f, and NOT calibrated, which "
            "costs accuracy: calibrate_masterkeys(model, dense_model, images), or fine-tune.",
            call.name,
            f"{report.total.channels:,}",
            len(report.layers),
            report.bank,
            report.total.mean_r2,
        )
    return model


def _refuse_agreement(call: Call) -> None:
    if call.config.agreement is not None:
        raise ConversionError(
            "mk_agreement chooses keys by calibrations: it needs pretrained=True, weights that are still dense, and "
            "images (no mk_calibrate=False)."
        )


def _read_weights(call: Call) -> Mapping[str, Any] | None:
    """A look into weights that are not timm's own: are they of a converted network, which shapes have stem and head?

    Returns their state dict; None where timm alone reads them.
    Of a dense safetensors file it has the shapes only: its tensors are on the meta device.
    """
    cfg = call.cfg
    if call.as_registered and not cfg.file:  # a cfg that the user registered may name a file
        return None  # timm's own
    if cfg.state_dict and not cfg.source:
        return _inner_state_dict(cfg.state_dict)
    if cfg.url and not (cfg.file or cfg.hf_hub_id or cfg.source or cfg.custom_load):
        options = {"model_dir": call.cache_dir, "map_location": "cpu", "weights_only": True}
        return _inner_state_dict(torch.hub.load_state_dict_from_url(str(cfg.url), **options))
    if cfg.source == "hf-hub":
        repo_id, _, revision = str(cfg.hf_hub_id).partition("@")
        try:
            path = Path(hf_hub_download(repo_id, FUSED_NAME, revision=revision or None, cache_dir=call.cache_dir))
        except EntryNotFoundError:  # the weights may have another format
            return None
    else:
        path = Path(cfg.file or "", FUSED_NAME if cfg.source == "local-dir" else "")
    if cfg.custom_load or not path.is_file():
        return None  # timm reads it, or raises
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if not any(name.endswith(".key_index") for name in names):  # dense weights: timm reads the values
                    return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
        return load_state_dict(str(path))
    except SafetensorError as error:
        raise CheckpointError(f"Cannot read '{path}': {error}. Get the file again.") from error


def _inner_state_dict(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The innermost state dict of a checkpoint."""
    inner = next((state[name] for name in ("state_dict", "model") if isinstance(state.get(name), Mapping)), None)
    return state if inner is None else _inner_state_dict(inner)


def _compact_entries(state: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The entries of the converted layers in a state dict, by layer name."""
    names = [name.removesuffix(".key_index") for name in state if name.endswith(".key_index")]
    entries = SigmaKeyConv2d.compact_entries
    return {name: {e: state[f"{name}.{e}"] for e in entries if f"{name}.{e}" in state} for name in names}


def _load_checkpoint(call: Call, state: Mapping[str, Any], entries: Mapping[str, dict[str, torch.Tensor]]) -> nn.Module:
    """The network with a checkpoint of a converted network; timm's own loader loads all but the converted layers."""
    _refuse_agreement(call)
    call.warn_unused("these weights are of a converted model, and loaded as they are")
    entry_names = {f"{name}.{entry}" for name, tensors in entries.items() for entry in tensors}
    rest = {name: value for name, value in state.items() if name not in entry_names}
    layers = {name: _layer_settings(call, name, tensors) for name, tensors in entries.items()}
    for name, tensors in entries.items():  # placeholders of the kernels, for timm's loader
        rest[f"{name}.weight"] = tensors["scale"].new_zeros(len(tensors["key_index"]), 1, *tensors["keys"].shape[1:])
    model = call.build(True, state_dict=rest)
    planned = resolve(call.config, model, flat_names=call.flat_names).settings.keys()
    saved = set(names_in(model, layers).values())
    if saved - planned or (planned - saved and (call.config.include or call.config.exclude)):
        raise CheckpointError(
            f"The weights are of a model converted in other layers than this one would be, as {min(saved ^ planned)}. "
            "Create it with the settings the checkpoint was made with (mk_include, mk_exclude)."
        )
    restore_layers(model, Compact(layers, entries))
    write_record(model, Record((call.config,), call.dense_source))
    return model


def _layer_settings(call: Call, name: str, entries: Mapping[str, torch.Tensor]) -> LayerSettings:
    """The settings of a layer in a checkpoint; those that the checkpoint does not determine are the call's."""
    missing = [entry for entry in MasterKeyConv2d.compact_entries if entry not in entries]
    if missing:
        raise CheckpointError(f"The checkpoint lacks {', '.join(missing)} of {name}: the entries belong together.")
    keys = call.config.keys_per_kernel if "keys_per_kernel" in call.settings else entries["key_index"].shape[-1]
    sigmas = "log_sigma" in entries or call.config.trainable == "sigmas"
    return LayerSettings(call.config.bank, keys, call.config.trainable, sigmas)
