"""Whether a model's weights still are, or come from, those its pretrained cfg speaks of: their licence is inherited."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers import MasterKeyConv2d

TAG = "mk8"
SOURCE_NOTE = "masterkeys: converted from "  # among the notes of a cfg


def is_masterkeys_tag(tag: str | None) -> bool:
    """Whether a pretrained tag is one of this package's: ``mk8`` or ``mk8_...``."""
    return tag is not None and (tag == TAG or tag.startswith(f"{TAG}_"))


class _Known:
    """Stands among a model's load_state_dict hooks as long as its provenance is known: loading other weights ends it.

    Training, converting and calibrating keep it. So does a checkpoint of the converted model itself, as of a resumed
    run: it has the same key for every kernel, and keys never train. And one that leaves the depthwise kernels alone, as
    that of a head. In a pickle of the model a function that does nothing takes its place, as stock models must load
    where this package is not.
    """

    def __init__(self, known: bool = True) -> None:
        self.known = known

    def __call__(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        convs = {f"{prefix}{n}.": m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
        layers = {name: conv for name, conv in convs.items() if isinstance(conv, MasterKeyConv2d)}
        if any(layer.check_state_dict(state_dict, name) for name, layer in layers.items()):
            return  # it will be refused
        dense = any(f"{name}weight" in state_dict for name in layers or convs)
        given = {name: state_dict[f"{name}key_index"] for name in layers if f"{name}key_index" in state_dict}
        same = all(_same_keys(index, layers[name].key_index) for name, index in given.items())
        self.known = self.known and same and not dense

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Known":
        return _Known(self.known)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")


def set_known(model: nn.Module) -> None:
    """Notes that timm has just loaded the weights of the model's cfg."""
    model.register_load_state_dict_pre_hook(_Known())


def is_known(model: nn.Module) -> bool:
    """Whether the weights are, or come from, those of the model's cfg."""
    return any(hook.known for hook in _hooks(model))


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """For giving a model its own earlier state back."""
    known = is_known(model)
    yield
    for hook in _hooks(model):
        hook.known = known


def _hooks(model: nn.Module) -> list[_Known]:
    hooks = (getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, _Known)]


def _same_keys(given: torch.Tensor, own: torch.Tensor) -> bool:
    return not (given.is_meta or own.is_meta) and torch.equal(given.cpu().round().long(), own.cpu().round().long())
