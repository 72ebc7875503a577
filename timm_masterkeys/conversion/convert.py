"""Converts the depthwise convolutions of a model, and fuses them back.

Only ``make_layer`` makes a MasterKeyConv2d of a convolution, and only ``replace_layers`` replaces a model's layers.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from ..errors import CheckpointError, ConversionError, ProjectionError
from ..keys.banks import DEFAULT_BANK, BankLike
from ..layers import MasterKeyConv2d, SigmaKeyConv2d, Trainable
from .config import LayerSettings, MasterKeysConfig, Patterns
from .copies import copy_model
from .plan import converted_layers, resolve
from .record import add_conversion, check_attribute, forget_record
from .wrapped import check_unwrapped, unwrapped

_logger = logging.getLogger(__name__)

Entries = Mapping[str, torch.Tensor]  # of one layer, by name: key_index, scale, shift, ...


def convert_to_masterkeys(
    model: nn.Module,
    bank: BankLike = DEFAULT_BANK,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keys_per_kernel: int = 1,
    trainable: Trainable = "shift",
    inplace: bool = False,
) -> nn.Module:
    """Replaces the depthwise convolutions of a model with MasterKeyConv2d, and projects their kernels on the keys.

    Everything else is kept: other layers, hooks, training mode, requires_grad, dtype, device, and modules used in
    several places. Conversion alone costs accuracy; compact networks lose nearly all of it. Read
    ``conversion_report(model)``, then calibrate or fine-tune. Layers that an earlier call converted stay as they are,
    so several calls can give different layers different settings. A call that finds nothing to convert raises
    ConversionError.

    Args:
        model: Any module that holds depthwise ``nn.Conv2d`` or timm ``Conv2dSame``.
        bank: Anything ``get_bank`` takes.
        include: fnmatch pattern(s) on module names; only layers that match one are converted. In a ``features_only``
            model, patterns may also use the names of the whole model.
        exclude: fnmatch pattern(s) on module names; layers that match one are not converted.
        keys_per_kernel: Keys per kernel, from 1 to the size of the bank; fewer at kernel sizes that have fewer
            keys. All eight at 3x3 get large scales that cancel, which half precision rounds badly: fuse before casting.
        trainable: What is trained of each kernel afterwards: "none", "shift" (as in the paper) or "affine"; "sigmas",
            for the ``scale-space-*`` banks, also fits each kernel's sigmas and trains them with the shift.
        inplace: Change ``model`` itself; else a deep copy is converted and ``model`` is not changed.

    Returns:
        The converted model: ``model`` itself if inplace, or the new layer if ``model`` is a convolution.

    Raises:
        BankError: No such bank.
        ProjectionError: NaN or Inf in a kernel (named by layer and channel), or keys_per_kernel out of range.
        ConversionError: Nothing to convert, a pattern that matches nothing, an unknown ``trainable``, sigmas to train
            with another bank or several keys, a model that is wrapped or sharded already, that cannot be copied, or has
            an attribute ``masterkeys`` of its own.
        Whatever is raised, ``model`` is not changed: all layers are made before the first is replaced.

    Example:
        >>> model = convert_to_masterkeys(timm.create_model("convnext_tiny", pretrained=True))
        >>> print(conversion_report(model))
    """
    config = MasterKeysConfig(
        bank, keys_per_kernel=keys_per_kernel, trainable=trainable, include=include, exclude=exclude
    )
    return convert(model, config, "project", inplace)


def initialize_masterkeys(
    model: nn.Module,
    bank: BankLike = DEFAULT_BANK,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keys_per_kernel: int = 1,
    trainable: Trainable = "shift",
    inplace: bool = False,
) -> nn.Module:
    """Converts a model for training from scratch: keys are assigned at random, the model's kernels are not fitted.

    Keys are chosen uniformly by torch's generator and scaled to the mean norm of each layer's kernels; the shift is 0.
    Where ``torch.distributed`` is initialised, all ranks get the keys of rank 0, so all must create the model.
    Arguments, returns and errors as for ``convert_to_masterkeys``.

    Example:
        >>> torch.manual_seed(0)
        >>> model = initialize_masterkeys(timm.create_model("convnext_atto", num_classes=10))
    """
    config = MasterKeysConfig(
        bank, keys_per_kernel=keys_per_kernel, trainable=trainable, include=include, exclude=exclude
    )
    return convert(model, config, "random", inplace)


def fuse_masterkeys(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replaces every MasterKeyConv2d with an ordinary convolution of the same kernels; outputs are equal bit for bit.

    Args:
        model: A converted model. A wrapped one is unwrapped first, unless ``inplace``.
        inplace: Change ``model`` itself; else a deep copy is fused and ``model`` is not changed.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, is sharded, is wrapped (if ``inplace``), or cannot be
            copied.

    Example:
        >>> dense = fuse_masterkeys(model)
        >>> torch.onnx.export(dense, (x,), "model.onnx")
    """
    if not inplace:
        model = unwrapped(model)
    check_unwrapped(model)
    converted_layers(model, required=True)
    return fuse(model if inplace else copy_model(model))


def fuse(model: nn.Module) -> nn.Module:
    """Fuses a model that is neither wrapped nor sharded, without a check. In place."""
    stop_checking(model)
    for module in model.modules():
        forget_record(module)
    return replace_layers(model, {name: layer.fuse() for name, layer in converted_layers(model).items()})


def convert(
    model: nn.Module,
    config: MasterKeysConfig,
    weights: Literal["project", "random"],
    inplace: bool = False,
    *,
    flat_names: bool = False,
) -> nn.Module:
    """Converts a model by a configuration, in three steps.

    ``resolve`` decides for each convolution whether it is converted, or why not; ``apply`` puts a MasterKeyConv2d in
    the place of each that is; ``add_conversion`` notes the configuration in the model's record.

    ``weights`` is as for ``apply``, ``flat_names`` as for ``resolve``, ``inplace`` as for ``convert_to_masterkeys``.
    ``config.agreement`` is noted, not reached: ``convert_to_agreement`` chooses the keys.

    Raises:
        ConversionError, ProjectionError: As for ``convert_to_masterkeys``.
    """
    check_unwrapped(model)
    check_attribute(model)
    plan = resolve(config, model, flat_names=flat_names)
    if not plan.converted:
        reason_counts = Counter(layer.reason for layer in plan.layers)
        reasons = ", ".join(f"{count} {reason}" for reason, count in reason_counts.most_common(4)) or "none"
        raise ConversionError(
            f"{type(model).__name__} has nothing to convert. Looked for Conv2d with groups == in_channels > 1 and a "
            f"kernel larger than 1x1; its convolutions: {reasons}. plan_conversion(model) lists them all. "
            "Layers converted before stay as they are: for other settings, convert the dense model."
        )
    if not inplace:
        model = copy_model(model)
    model = apply(model, plan.settings, weights)
    add_conversion(model, config, plan.settings.keys())
    _logger.info("Converted %d depthwise convolutions to bank %s.", len(plan.converted), config.bank.name)
    return model


def apply(
    model: nn.Module,
    settings: Mapping[str, LayerSettings],
    weights: Literal["project", "random"] = "project",
) -> nn.Module:
    """Replaces depthwise convolutions of a model with MasterKeyConv2d. In place; if one layer fails, none is replaced.

    Args:
        model: Any module.
        settings: Settings by layer name.
        weights: "project" fits the keys to the model's kernels. "random" is random initialisation; in a distributed run
            all ranks get the keys of rank 0, so all must create the model.

    Returns:
        The model, or the new layer if the model itself is the convolution.

    Raises:
        ProjectionError: NaN or Inf in a kernel; the message names the layer and the channel.
    """
    return replace_layers(model, new_layers(model, settings, weights))


def new_layers(
    model: nn.Module,
    settings: Mapping[str, LayerSettings],
    weights: Literal["project", "random"] | Mapping[str, Entries] = "project",
) -> dict[str, MasterKeyConv2d]:
    """The new layers by name; as for ``apply``, but ``weights`` may also be the entries of each layer by its name.

    CheckpointError for entries that do not fit their layer.
    """
    new: dict[str, MasterKeyConv2d] = {}
    for name, layer_settings in tqdm(
        settings.items(), desc="convert", unit="layer", delay=2, leave=False, disable=None
    ):
        conv: Any = model.get_submodule(name)
        try:
            new[name] = make_layer(conv, layer_settings, weights if isinstance(weights, str) else weights[name])
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
    """The MasterKeyConv2d for a depthwise convolution, which is not changed; errors as for ``apply``.

    ``weights`` is "project", "random", or the entries of this layer. With sigmas it is a SigmaKeyConv2d.
    """
    kind = SigmaKeyConv2d if settings.sigmas else MasterKeyConv2d
    arguments = settings.bank, settings.keys_per_kernel, settings.trainable
    if isinstance(weights, str):
        return kind.from_conv(conv, *arguments, fit=weights == "project")
    layer = kind.unfilled_from_conv(conv, *arguments)
    entries = {name: weights[name] for name in layer.compact_entries if name in weights}
    missing = [name for name in layer.compact_entries if name not in entries]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} is missing.")
    try:
        layer.load_state_dict(entries, strict=False)  # the bias is missing: it is the convolution's
    except RuntimeError as error:  # its first line only names the class
        raise CheckpointError(" ".join(str(error).split("\n\t")[1:]).removeprefix("layer ") or str(error)) from None
    return layer


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
