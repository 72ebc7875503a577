"""The only place where a convolution becomes a MasterKeyConv2d, and where the layers of a model are replaced."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from ..errors import CheckpointError, ConversionError, ProjectionError
from ..layers import MasterKeyConv2d, ScaledKeyConv2d
from .config import LayerSettings

_logger = logging.getLogger(__name__)

Entries = Mapping[str, torch.Tensor]  # of one layer, by name: key_index, scale, shift, ...


def apply(
    model: nn.Module,
    layers: Mapping[str, LayerSettings],
    weights: Literal["project", "random"] | Mapping[str, Entries] = "project",
) -> nn.Module:
    """Replaces depthwise convolutions of a model with MasterKeyConv2d. In place; if one layer fails, none is replaced.

    Args:
        model: Any module.
        layers: Settings by layer name.
        weights: "project" fits the keys to the model's kernels. "random" is random initialisation; in a distributed run
            all ranks get the keys of rank 0, so all must create the model. A mapping gives entries by layer name.

    Returns:
        The model, or the new layer if the model itself is the convolution.

    Raises:
        ProjectionError: NaN or Inf in a kernel; the message names the layer and the channel.
        CheckpointError: Entries that do not fit their layer.
    """
    return replace_layers(model, make_layers(model, layers, weights))


def make_layers(
    model: nn.Module,
    layers: Mapping[str, LayerSettings],
    weights: Literal["project", "random"] | Mapping[str, Entries] = "project",
) -> dict[str, MasterKeyConv2d]:
    """The new layers by name; arguments and errors as for ``apply``."""
    new: dict[str, MasterKeyConv2d] = {}
    for name, settings in tqdm(layers.items(), desc="convert", unit="layer", delay=2, leave=False, disable=None):
        conv: Any = model.get_submodule(name)
        try:
            new[name] = make_layer(conv, settings, weights if isinstance(weights, str) else weights[name])
        except ProjectionError as error:
            raise ProjectionError(f"{name or type(conv).__name__}: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"Layer {name}: {error}") from None
    if weights == "random":
        _broadcast_from_rank_0(new.values())
    return new


@torch.no_grad()
def _broadcast_from_rank_0(layers: Iterable[MasterKeyConv2d]) -> None:
    """Copies the entries of rank 0 to all ranks of a distributed run, in one message; not on the meta device.

    timm's train.py seeds each rank differently before it creates the model, so each rank assigns other keys.
    DistributedDataParallel does not always broadcast buffers.
    """
    entries = [getattr(layer, name) for layer in layers for name in layer.compact_entries if name != "keys"]
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not distributed or any(entry.is_meta for entry in entries):
        return
    message = [[entry.detach().cpu() for entry in entries]]
    dist.broadcast_object_list(message)
    for entry, rank_0_entry in zip(entries, message[0], strict=True):
        entry.copy_(rank_0_entry)


def make_layer(
    conv: nn.Conv2d, settings: LayerSettings, weights: Literal["project", "random"] | Entries = "project"
) -> MasterKeyConv2d:
    """The MasterKeyConv2d for a depthwise convolution, which is not changed; arguments and errors as for ``apply``."""
    kind = ScaledKeyConv2d if settings.sigmas else MasterKeyConv2d
    arguments = settings.bank, settings.keys_per_kernel, settings.trainable
    if isinstance(weights, str):
        return kind.from_conv(conv, *arguments, fit=weights == "project")
    layer = kind.empty_from_conv(conv, *arguments)
    entries = {name: weights[name] for name in layer.compact_entries if name in weights}
    missing = [name for name in layer.compact_entries if name not in entries]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} is missing.")
    try:
        layer.load_state_dict(entries, strict=False)  # the bias is missing: it is the convolution's
    except RuntimeError as error:  # its first line only names the class
        raise CheckpointError(" ".join(str(error).split("\n\t")[1:]).removeprefix("layer ") or str(error)) from None
    return layer


def converted_layers(model: nn.Module, required: bool = False) -> dict[str, MasterKeyConv2d]:
    """The converted layers of a model by name; ConversionError if ``required`` and there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}
    if required and not layers:
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    return layers


def describe(model: nn.Module) -> dict[str, LayerSettings]:
    """The settings of the converted layers of a model, by name."""
    return {
        name: LayerSettings(layer.bank, layer.keys_per_kernel, layer.trainable, layer.has_sigmas)
        for name, layer in converted_layers(model).items()
    }


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Replaces the named modules with the given layers, wherever they are used. In place.

    The model then checks each checkpoint before it loads it: one that does not fit the converted layers changes
    nothing. Returns the model, or the new layer if the model itself is replaced.
    """
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            if not name:
                return new[id(module)]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[id(module)])
    hooks = [getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values()]
    if _check_checkpoint not in hooks and any(isinstance(layer, MasterKeyConv2d) for layer in layers.values()):
        model.register_load_state_dict_pre_hook(_check_checkpoint)
    return model


def stop_checking(model: nn.Module) -> None:
    """Removes the checkpoint check that ``replace_layers`` added to a model and its parts. In place."""
    for module in model.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _check_checkpoint:
                del module._load_state_dict_pre_hooks[key]


def _check_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Raises CheckpointError if a checkpoint does not fit, before anything is loaded; warns of dense kernels."""
    modules = module.named_modules(remove_duplicate=False)
    layers = {f"{prefix}{name}.": layer for name, layer in modules if isinstance(layer, MasterKeyConv2d)}
    problems = [problem for name, layer in layers.items() for problem in layer.check_state_dict(state_dict, name)]
    if problems:
        shown = problems[:5] + [f"... and {len(problems) - 5} more"] * (len(problems) > 5)
        raise CheckpointError(
            "\n".join(["The checkpoint does not fit the converted layers. Nothing was loaded.", *shown])
        )
    dense = [name for name in layers if f"{name}weight" in state_dict]
    if dense:
        _logger.warning(
            "The checkpoint has dense kernels for %d converted layers, which are projected on the keys. That "
            "alone costs accuracy: calibrate_masterkeys(model, dense_model, images), or fine-tune.",
            len(dense),
        )
