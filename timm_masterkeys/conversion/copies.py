"""Copies of whole networks, also of those that keep what they computed."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConversionError

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """A deep copy of a model; ConversionError names what cannot be copied.

    Tensors that the model computed from its parameters and keeps, as tiny_vit its attention biases in eval mode, are
    copied without their gradient's way to the parameters.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(model)}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:  # whatever a class of the model raises
        raise ConversionError(
            f"{type(model).__name__} cannot be copied: {_uncopyable(model, memo)} {error}. Take that away until the "
            "call is done, or change the model itself (inplace=True)."
        ) from error


def _computed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors in attributes that autograd knows the origin of, which torch does not copy."""
    seen: set[int] = set()
    left: list[Any] = [vars(module) for module in model.modules()]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            left.extend(value)


def _uncopyable(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """The first attribute that cannot be copied; torch's own, as hooks, come last, as they may lead to another."""
    attributes = [(name, module, item) for name, module in model.named_modules() for item in vars(module).items()]
    for name, module, (attribute, value) in sorted(attributes, key=lambda found: found[2][0].startswith("_")):
        if attribute != "_modules":
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                where = f"module '{name}'" if name else "the model itself"
                return f"attribute '{attribute}' of {where} ({type(module).__name__}) is a {type(value).__name__}:"
    return ""
