"""The two weight files of a converted model: fused for stock timm, compact for the exact conversion.

A compact file is a safetensors file. Its tensors are ``<layer>.<entry>`` for each entry of each converted layer
(``keys``, ``key_index``, ``scale``, ``shift``, ``r2``, and ``log_sigma`` where kernels have sigmas) and
``banks.<digest>``, the keys of each bank at their own size (float64). Its metadata has one entry, ``timm_masterkeys``:
JSON with ``format_version``, ``banks`` (name, source, licence and resize by digest) and ``layers`` (settings by name,
see ``LayerSettings``).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..conversion.config import LayerSettings
from ..conversion.convert import fuse, new_layers, replace_layers
from ..conversion.copies import copy_model
from ..conversion.plan import converted_layers, flat_name, is_feature_extractor
from ..conversion.wrapped import check_unwrapped, check_whole, unwrapped
from ..errors import BankError, CheckpointError
from ..files import atomic_path, file_sha256
from ..keys.banks import KeyBank
from ..layers import MasterKeyConv2d, Trainable

FUSED_NAME = "model.safetensors"
COMPACT_NAME = "masterkeys.safetensors"
FORMAT_VERSION = 1
SECTION = "masterkeys"  # of config.json: the layers and the record

_METADATA = "timm_masterkeys"


@dataclass(frozen=True)
class Compact:
    """The contents of a compact file: settings and entries, both by layer name."""

    layers: Mapping[str, LayerSettings]
    entries: Mapping[str, Mapping[str, torch.Tensor]]


def describe_layers(layers: Mapping[str, MasterKeyConv2d]) -> dict[str, Any]:
    """The settings of converted layers as JSON data: the banks by digest, and the settings by layer name."""
    banks = sorted({layer.bank for layer in layers.values()}, key=lambda bank: (bank.name, bank.digest))
    return {
        "format_version": FORMAT_VERSION,
        "banks": {
            bank.digest: {"name": bank.name, "source": bank.source, "licence": bank.licence, "resize": bank.resize}
            for bank in banks
        },
        "layers": {name: LayerSettings.from_layer(layer).to_dict() for name, layer in layers.items()},
    }


def save_compact(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the exact compact form of the converted layers: banks, keys, key_index, scale, shift, r2. Atomic.

    Args:
        model: A converted model. Not changed.
        path: A ``.safetensors`` file.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, is sharded, or is an average of networks with different
            keys.
        CheckpointError: A layer has no values: it is on the meta device, or was created empty.
        OSError: The file cannot be written.

    Example:
        >>> save_compact(model, "masterkeys.safetensors")
    """
    model = unwrapped(model)
    check_whole(model)
    write_compact(converted_layers(model, required=True), path)


def write_compact(layers: Mapping[str, MasterKeyConv2d], path: str | os.PathLike[str]) -> None:
    """Writes the compact form of converted layers, given by name; errors as for ``save_compact``. Atomic."""
    tensors = {f"banks.{layer.bank.digest}": torch.from_numpy(layer.bank.keys.copy()) for layer in layers.values()}
    for name, layer in layers.items():
        layer.check_keys()
        layer.check_values(torch.empty(0, device="cpu"))
        entries = {entry: getattr(layer, entry) for entry in layer.compact_entries} | {"key_index": layer.key_rows()}
        tensors |= {f"{name}.{entry}": v.detach().cpu().contiguous().clone() for entry, v in entries.items()}
    with atomic_path(path) as tmp:  # one metadata entry, as safetensors writes several in random order
        save_file(tensors, tmp, {_METADATA: json.dumps(describe_layers(layers))})


def fused_copy(model: nn.Module) -> nn.Module:
    """A fused copy of a converted model with contiguous tensors, as safetensors requires."""
    dense = fuse(copy_model(model))
    for tensor in (*dense.parameters(), *dense.buffers()):
        tensor.data = tensor.data.contiguous()
    return dense


def files_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of the two weight files in a folder, by name; ``SavedModel.check`` compares them."""
    return {name: file_sha256(folder / name) for name in (FUSED_NAME, COMPACT_NAME)}


def load_compact(model: nn.Module, path: str | os.PathLike[str], trainable: Trainable | None = None) -> None:
    """Converts the layers of a dense model that a compact file lists, bit for bit as they were saved. In place.

    Args:
        model: A dense model with the fused weights saved with the file; its ``features_only`` form is accepted too.
        path: A file written by ``save_compact``.
        trainable: Overrides the saved ``trainable``.

    Raises:
        CheckpointError: Another kind of file, a newer format, layers the model lacks, or kernels that disagree with the
            model's own. The model is not changed.
        ConversionError: A ``trainable`` that the file's layers do not have, or a wrapped or sharded model.

    Example:
        >>> load_compact(dense_model, "masterkeys.safetensors")
    """
    check_unwrapped(model)
    compact = read_compact(path)
    try:
        layers = _new_layers(model, compact, trainable)
        coarsest = max((e["scale"].dtype for e in compact.entries.values()), key=lambda t: torch.finfo(t).eps)
        for name, layer in layers.items():
            if not _agree(layer, model.get_submodule(name).weight.detach(), coarsest):  # type: ignore[operator]
                raise CheckpointError(
                    f"It disagrees with the model's weights of {name}: the two are not of one conversion. Get both "
                    "again."
                )
    except CheckpointError as error:
        raise CheckpointError(f"'{path}' does not fit. {error}") from None
    replace_layers(model, layers)


def restore_layers(
    model: nn.Module, compact: Compact, trainable: Trainable | None = None, random: bool = False
) -> None:
    """Puts converted layers with the entries of a compact file in the place of a model's convolutions. In place.

    All that loads saved layers ends here or in ``load_compact``, which also compares the dense kernels. With ``random``
    only the settings are used, and keys are assigned at random, for training from scratch.
    """
    replace_layers(model, _new_layers(model, compact, trainable, random))


def _new_layers(
    model: nn.Module, compact: Compact, trainable: Trainable | None, random: bool = False
) -> dict[str, MasterKeyConv2d]:
    """The new layers of a compact file, by their names in this model."""
    names = names_in(model, compact.layers)
    layers = {new_name: compact.layers[name] for name, new_name in names.items()}
    if trainable:
        layers = {new_name: replace(settings, trainable=trainable) for new_name, settings in layers.items()}
    entries = {new_name: compact.entries[name] for name, new_name in names.items()}
    return new_layers(model, layers, "random" if random else entries)


def read_compact(path: str | os.PathLike[str]) -> Compact:
    """Reads a compact file; CheckpointError if it is another kind of file, of a newer format, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read '{path}': {error}. Expected a file written by save_compact.") from error
    if _METADATA not in metadata:
        raise CheckpointError(f"'{path}' is no compact masterkeys file. Expected one written by save_compact.")
    try:
        section = json.loads(metadata[_METADATA])
        check_version(path, section)
        banks = {digest: _read_bank(digest, bank, tensors) for digest, bank in section["banks"].items()}
        layers = {name: LayerSettings.from_dict(data, banks) for name, data in section["layers"].items()}
    except (CheckpointError, BankError) as error:
        raise CheckpointError(f"'{path}': {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged ({type(error).__name__}: {error}). Get the file again.") from None
    if not layers:
        raise CheckpointError(f"'{path}' lists no layer. Expected a file written by save_compact.")
    entries: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors.items():
        layer, _, entry = name.rpartition(".")
        if layer in entries:
            if entry != "key_index" and not tensor.is_floating_point():
                raise CheckpointError(f"'{path}' is damaged: {name} is {tensor.dtype}. Get the file again.")
            entries[layer][entry] = tensor
    return Compact(layers, entries)


def check_version(path: str | os.PathLike[str], section: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless this version can read the ``format_version`` of a section."""
    version = section.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {version}, this one reads up to {FORMAT_VERSION}. Upgrade timm_masterkeys."
        )


def names_in(model: nn.Module, layers: Mapping[str, LayerSettings]) -> dict[str, str]:
    """The names of a saved model's layers in this model, by saved name.

    A ``features_only`` model has other names, and may lack stages. CheckpointError if any other model lacks a layer, or
    if a layer is converted already.
    """
    features = is_feature_extractor(model)
    rename = flat_name if features else str  # of other models, enc and body.enc are two layers
    convs = {rename(name): name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    names = {name: convs[rename(name)] for name in layers if rename(name) in convs}
    missing = [name for name in layers if name not in names]
    if missing and not features:
        raise CheckpointError(f"The model has no layer {missing[0]}, which was converted. Use the model it came with.")
    for name in names.values():
        if isinstance(model.get_submodule(name), MasterKeyConv2d):
            raise CheckpointError(f"{name} is converted already: compact files go with the dense model.")
    return names


def _read_bank(digest: str, data: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> KeyBank:
    keys = tensors.pop(f"banks.{digest}", None)
    if keys is None:
        raise CheckpointError(f"lacks the keys of bank '{data['name']}'. Get the file again.")
    bank = KeyBank(data["name"], keys.numpy(), data["source"], data["licence"], data["resize"])
    if bank.digest != digest:
        raise CheckpointError(f"bank '{bank.name}' does not match its digest. Get the file again.")
    return bank


def _agree(layer: MasterKeyConv2d, weight: torch.Tensor, saved: torch.dtype) -> bool:
    """Whether a dense weight equals the kernels of a layer, up to rounding to the dtypes of both and to ``saved``."""
    if weight.is_meta:
        return True
    kernels = layer.compose_weight().detach().double().cpu().flatten(1)
    scale = layer.scale.detach().double().cpu().view(len(kernels), -1)
    magnitude = 8 * scale.abs().sum(1, keepdim=True) + kernels.abs()  # bounds every term, as keys have norm 1
    tolerance = sum(
        8 * dtype.eps * (magnitude + dtype.tiny) for dtype in map(torch.finfo, (saved, layer.scale.dtype, weight.dtype))
    )
    return bool(((weight.double().cpu().flatten(1) - kernels).abs() <= tolerance).all())
