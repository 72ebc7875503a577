"""Deep copies of models, including models that keep computed tensors."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConversionError

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """A deep copy of a model; ConversionError names what cannot be copied.

    A model may keep tensors that it computed from its parameters, as tiny_vit keeps its attention biases in eval mode.
    They are copied detached from the parameters.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(model)}
    try:
        copied = copy.deepcopy(model, dict(memo))
    except Exception as error:  # whatever a class of the model raises
        raise ConversionError(
            f"{type(model).__name__} cannot be copied: {_uncopyable(model, memo)} {error}. Take that away until the "
            "call is done, or change the model itself (inplace=True)."
        ) from error
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if module.training != modes.get(name, module.training):  # torchvision's feature extractors are copied so
            module.train(modes[name])
    return copied


def _computed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors in the modules' attributes that are not leaves of autograd, which torch does not deep-copy."""
    visited: set[int] = set()
    pending: list[Any] = [vars(module) for module in model.modules()]
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)


def _uncopyable(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """Text that names an attribute that cannot be copied; torch's own come last, as hooks may refer to another one."""
    attributes = [(name, module, item) for name, module in model.named_modules() for item in vars(module).items()]
    for name, module, (attribute, value) in sorted(attributes, key=lambda entry: entry[2][0].startswith("_")):
        if attribute != "_modules":
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                where = f"module '{name}'" if name else "the model itself"
                return f"attribute '{attribute}' of {where} ({type(module).__name__}) is a {type(value).__name__}:"
    return ""
