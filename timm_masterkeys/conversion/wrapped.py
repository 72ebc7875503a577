"""Models that are wrapped, averaged, sharded, quantised or compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import ConversionError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, (Distributed)DataParallel and averages of weights."""
    inner: Any = model
    while True:
        if isinstance(inner, _WRAPPERS):
            inner = inner.module
        elif isinstance(inner, ModelEma):
            inner = inner.ema
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def check_unwrapped(model: nn.Module) -> None:
    """Raises ConversionError if a model is wrapped or sharded: the wrapper would keep the replaced layers."""
    kind = type(model).__name__
    if unwrapped(model) is not model:
        raise ConversionError(
            f"Got a {kind}, which has taken hold of the layers as they are, expected the model in it. Convert or fuse "
            "that, then wrap, compile or average it anew."
        )
    check_whole(model)


def check_whole(model: nn.Module) -> None:
    """Raises ConversionError if a model is sharded."""
    if is_sharded(model):
        raise ConversionError(
            f"The parameters of this {type(model).__name__} are sharded, expected whole ones. Convert, fuse or save a "
            "model before it is sharded; a sharded one's full state dict can be loaded into one that is not."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has sharded the model's parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def quantised_entry(model: nn.Module) -> str:
    """Text that names the first entry of a model's state dict that is no ordinary tensor; empty if there is none."""
    for name, value in model.state_dict().items():
        if type(value) is not torch.Tensor or value.is_quantized:
            kind = type(value).__name__
            return f"{name} is a quantised tensor" if kind == "Tensor" else f"{name} is of type {kind}"
    return ""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Runs models in eval mode and not compiled, as compiled modules skip hooks; restores each module's state."""
    before = [(m, m.training, m._compiled_call_impl) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        for module, _, compiled in before:
            if compiled is not None:
                module._compiled_call_impl = None
        yield
    finally:
        for module, training, compiled in before:
            module.training = training
            if compiled is not None:
                module._compiled_call_impl = compiled
