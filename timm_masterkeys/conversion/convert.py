"""Converts the depthwise convolutions of a model, and fuses them back."""

import logging
from collections import Counter
from typing import Literal

from torch import nn

from ..errors import ConversionError
from ..keys.banks import DEFAULT_BANK, Bank
from ..layers import Trainable
from .apply import apply, converted_layers, replace_layers, stop_checking
from .config import MasterKeysConfig, Patterns
from .copies import copy_model
from .plan import resolve
from .record import add_conversion, forget_record
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
    inplace: bool = False,
) -> nn.Module:
    """Replaces the depthwise convolutions of a model with MasterKeyConv2d, and projects their kernels on the keys.

    Everything else is kept: other layers, hooks, training mode, requires_grad, dtype, device, and modules used in
    several places. Conversion alone costs accuracy; compact networks lose nearly all of it. Read
    ``conversion_report(model)``, then calibrate or fine-tune. Converted layers are not changed, so several calls can
    give different layers different settings; a call that finds nothing to convert raises ConversionError.

    Args:
        model: Any module that holds depthwise ``nn.Conv2d`` or timm ``Conv2dSame``.
        bank: Anything ``get_bank`` takes.
        include: fnmatch pattern(s) on module names; only layers that match one are converted. In a ``features_only``
            model, patterns may also use the names of the whole model.
        exclude: fnmatch pattern(s) on module names; layers that match one are not converted.
        keys_per_kernel: Keys per kernel, from 1 to the size of the bank; fewer at kernel sizes that have fewer
            keys. All eight at 3x3 get large scales that cancel: fuse such a model before casting to half precision.
        trainable: What is trained of each kernel afterwards: "none", "shift" (as in the paper) or "affine"; "sigmas",
            for the ``scale-space-*`` banks, also fits each kernel's sigmas and trains them with the shift.
        inplace: Change ``model`` itself; else a deep copy is converted and ``model`` is not changed.

    Returns:
        The converted model: ``model`` itself if inplace, or the new layer if ``model`` is a convolution.

    Raises:
        BankError: No such bank.
        ProjectionError: NaN or Inf in a kernel (named by layer and channel), or keys_per_kernel out of range.
        ConversionError: Nothing to convert, a pattern that matches nothing, an unknown ``trainable``, sigmas to train
            with another bank or several keys, a model that is wrapped or sharded already, or that cannot be copied.
        In every case ``model`` is not changed.

    Example:
        >>> model = convert_to_masterkeys(timm.create_model("convnext_tiny", pretrained=True))
        >>> print(conversion_report(model))
    """
    config = MasterKeysConfig(bank, keys_per_kernel, trainable, include, exclude)
    return convert(model, config, "project", inplace)


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
    """Converts a model for training from scratch: keys are assigned at random, the model's kernels are not fitted.

    Keys are chosen uniformly by torch's generator and scaled to the mean norm of each layer's kernels; the shift is 0.
    Where ``torch.distributed`` is initialised, all ranks get the keys of rank 0, so all must create the model.
    Arguments, returns and errors as for ``convert_to_masterkeys``.

    Example:
        >>> torch.manual_seed(0)
        >>> model = initialize_masterkeys(timm.create_model("convnext_atto", num_classes=10))
    """
    config = MasterKeysConfig(bank, keys_per_kernel, trainable, include, exclude)
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
    if not inplace:
        model = copy_model(model)
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
    """Converts a model by a configuration; arguments as for ``resolve``, ``apply`` and ``convert_to_masterkeys``.

    Raises:
        ConversionError, ProjectionError: As for ``convert_to_masterkeys``.
    """
    check_unwrapped(model)
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
