"""Converts the depthwise convolutions of a model, fuses them back."""

import copy
import logging
from collections import Counter
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import CheckpointError, ConversionError, ProjectionError
from ..keys.banks import DEFAULT_BANK, Bank, get_bank
from ..keys.projection import check_keys_per_kernel, keys_needed
from ..layers import MasterKeyConv2d, Trainable, check_trainable
from .plan import ConversionPlan, Patterns, plan_conversion
from .wrapped import check_unwrapped, unwrapped

_logger = logging.getLogger(__name__)


def convert_to_masterkeys(
    model: nn.Module,
    bank: Bank = DEFAULT_BANK,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keys_per_kernel: int = 1,
    trainable: Trainable = "shift",
    min_r2: float | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replaces the depthwise convolutions of a model by MasterKeyConv2d, kernels projected on the nearest keys.

    Everything else survives as it is: other layers, hooks, training mode, requires_grad, dtype, device, and modules
    used in several places. One-shot conversion costs accuracy, of compact networks nearly all of it: read
    ``conversion_report(model)``, then calibrate or fine-tune. Layers converted before are left alone, so several calls
    can give different layers different settings; a call that finds nothing left to convert is refused.

    Args:
        model: Any module that holds depthwise ``nn.Conv2d`` or timm ``Conv2dSame``.
        bank: Anything ``get_bank`` takes.
        include: fnmatch pattern(s) on module names; only layers that match one are converted. In a ``features_only``
            model, names as in the whole model match too.
        exclude: fnmatch pattern(s) on module names; layers that match one are not converted.
        keys_per_kernel: Keys per kernel, from 1 to the size of the bank; fewer where fewer have a shape. All eight at
            3x3 cancel each other with large scales: fuse such a model before it is cast to half precision.
        min_r2: In [0, 1]. Each layer gets as many keys per kernel, from ``keys_per_kernel`` up, as its mean R^2 needs
            to reach this; a layer that does not reach it with all keys stays dense. How many do is logged.
        trainable: What of each kernel trains afterwards: "none", "shift" (as in the paper) or "affine"; "scales", for
            the ``scale-space-*`` banks, fits each kernel's sigmas too and trains them with the shift.
        inplace: Change ``model`` itself; else a deep copy is converted and ``model`` stays as it is.

    Returns:
        The converted model (``model`` itself if inplace; a model that is itself a convolution gives a new layer).

    Raises:
        BankError: No such bank.
        ProjectionError: NaN or Inf in a kernel (named by layer and channel), or keys_per_kernel out of range.
        ConversionError: Nothing to convert, a pattern that matches nothing, an unknown ``trainable``, scales to learn
            with another bank or several keys, no layer that reaches ``min_r2``, or a model that is wrapped or sharded
            already.
        In every case ``model`` is left as it was.

    Example:
        >>> model = convert_to_masterkeys(timm.create_model("convnext_tiny", pretrained=True))
        >>> print(conversion_report(model))
    """
    if min_r2 is not None and not 0 <= min_r2 <= 1:
        raise ConversionError(f"min_r2 is {min_r2!r}, expected a number from 0 to 1, or None.")
    return _convert(model, bank, include, exclude, keys_per_kernel, trainable, inplace, fit=True, min_r2=min_r2)


def initialize_masterkeys(
    model: nn.Module,
    bank: Bank = DEFAULT_BANK,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    keys_per_kernel: int = 1,
    trainable: Trainable = "shift",
    inplace: bool = False,
) -> nn.Module:
    """As ``convert_to_masterkeys``, for training from scratch: keys are drawn, the model's kernels are not fitted.

    Keys are drawn uniformly from torch's generator, scaled to the mean norm of each layer's own kernels, shift 0.
    Arguments, returns and errors as for ``convert_to_masterkeys``.

    Example:
        >>> torch.manual_seed(0)
        >>> model = initialize_masterkeys(timm.create_model("convnext_atto", num_classes=10))
    """
    return _convert(model, bank, include, exclude, keys_per_kernel, trainable, inplace, fit=False)


def fuse_masterkeys(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replaces every MasterKeyConv2d by the ordinary convolution with its kernels; outputs are equal bit for bit.

    Args:
        model: A converted model; out of a wrapper it is taken, unless in place.
        inplace: Change ``model`` itself; else a deep copy is fused and ``model`` stays as it is.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, is sharded, or wrapped and to be changed in place.

    Example:
        >>> dense = fuse_masterkeys(model)
        >>> torch.onnx.export(dense, (x,), "model.onnx")
    """
    if not inplace:
        model = unwrapped(model)
    check_unwrapped(model)
    if not any(isinstance(module, MasterKeyConv2d) for module in model.modules()):
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: there is nothing to fuse.")
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is _check_before_loading:
                del module._load_state_dict_pre_hooks[key]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}
    return replace_layers(model, {name: layer.fuse() for name, layer in layers.items()})


def _convert(
    model: nn.Module,
    bank: Bank,
    include: Patterns,
    exclude: Patterns,
    keys_per_kernel: int,
    trainable: Trainable,
    inplace: bool,
    fit: bool,
    min_r2: float | None = None,
) -> nn.Module:
    check_unwrapped(model)
    bank = get_bank(bank)
    check_trainable(trainable)
    check_keys_per_kernel(keys_per_kernel, bank)
    plan = plan_conversion(model, bank, include=include, exclude=exclude)
    if not plan.converted:
        raise ConversionError(_nothing_to_convert(model, plan))
    if not inplace:
        model = copy.deepcopy(model)
    layers: dict[str, nn.Module] = {}
    best = 0.0
    for planned in tqdm(plan.converted, desc="masterkeys", unit="layer", delay=2, leave=False, disable=None):
        conv: Any = model.get_submodule(planned.name)
        try:
            count = keys_per_kernel
            if min_r2 is not None and trainable != "scales":
                count = keys_needed(conv.weight, bank, keys_per_kernel, min_r2)
            layer = MasterKeyConv2d.from_conv(conv, bank, count, trainable, fit=fit)
        except ProjectionError as error:
            raise ProjectionError(f"{planned.name or type(conv).__name__}: {error}") from None
        if min_r2 is None or _mean_r2(layer) >= min_r2:
            layers[planned.name] = layer
        else:
            best = max(best, _mean_r2(layer))
    if not layers:
        raise ConversionError(
            f"None of {len(plan.converted)} layers reaches a mean R2 of {min_r2} with bank {bank.name}, the best "
            f"{best:.3f}. Ask for less, or take another bank."
        )
    _logger.info("Converted %d depthwise convolutions to bank %s.", len(layers), bank.name)
    if len(layers) < len(plan.converted):
        left = [planned.name for planned in plan.converted if planned.name not in layers]
        _logger.warning(
            "%d layers do not reach a mean R2 of %s and stay dense: %s.", len(left), min_r2, ", ".join(left)
        )
    return replace_layers(model, layers)


def _mean_r2(layer: MasterKeyConv2d) -> float:
    """Over the kernels that have a shape; 1 if none has."""
    shaped = layer.r2[layer.scale.view(layer.out_channels, -1).ne(0).any(1) | layer.r2.ne(1)]
    return float(shaped.double().mean()) if len(shaped) else 1.0


def replace_layers(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Puts layers in the places of the named modules, in every place where one is used. In place.

    Loading a checkpoint that does not fit the converted layers is refused from then on before anything is loaded.

    Args:
        model: Any module.
        layers: New modules by the name of the module they replace.

    Returns:
        The model, or the new layer if the model itself is replaced.
    """
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            if not name:
                return new[id(module)]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[id(module)])
    hooked = any(getattr(h, "hook", None) is _check_before_loading for h in model._load_state_dict_pre_hooks.values())
    if not hooked and any(isinstance(layer, MasterKeyConv2d) for layer in layers.values()):
        model.register_load_state_dict_pre_hook(_check_before_loading)
    return model


def _check_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Refuses a checkpoint that does not fit before any layer, converted or not, has been touched."""
    modules = module.named_modules(remove_duplicate=False)
    layers = [(name, layer) for name, layer in modules if isinstance(layer, MasterKeyConv2d)]
    problems = [p for name, layer in layers for p in layer.check_state_dict(state_dict, f"{prefix}{name}.")]
    if problems:
        more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            "The checkpoint does not fit the converted layers; into this model nothing was loaded.\n"
            + "\n".join(problems[:5])
            + more
        )


def _nothing_to_convert(model: nn.Module, plan: ConversionPlan) -> str:
    found = Counter(layer.reason for layer in plan.layers)
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.most_common(4)) or "no convolution at all"
    return (
        f"{type(model).__name__} has nothing to convert. Looked for Conv2d with groups == in_channels > 1 and a kernel "
        f"larger than 1x1; found {reasons}. plan_conversion(model) lists them all; fuse_masterkeys(model) undoes a "
        "conversion."
    )
