"""Errors for code that uses a computed weight as a parameter: changes of it would be lost."""

import copy
from collections import defaultdict
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ConversionError

COMPUTED = (
    "The weight of a MasterKeyConv2d is computed from frozen keys: it cannot be a parameter or be changed in "
    "place (pruning, weight_norm, parametrizations, quantisation). fuse_masterkeys(model) gives ordinary convolutions "
    "for that; assign a plain tensor (layer.weight = tensor) to project other kernels on the keys."
)


class ComputedWeight(torch.Tensor):
    """A computed weight: an ordinary tensor, but setting its ``data`` is an error, as the change would be lost.

    Results computed from it, its copies and its pickles are plain tensors; ``nn.Parameter(weight)`` is a plain one.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return super().detach()

    @data.setter
    def data(self, value: torch.Tensor) -> NoReturn:
        raise ConversionError(COMPUTED)

    def detach(self) -> torch.Tensor:
        return super().detach().as_subclass(ComputedWeight)  # of this class, as nn.Parameter requires

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # nn.Parameter sets it on the tensor it returns
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.as_subclass(torch.Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def state_of(weight: torch.Tensor) -> tuple[int, int]:
    """A tensor's version and memory address: writing to it changes the version, setting ``.data`` the address."""
    try:
        return weight._version, weight.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # within vmap and grad, fake, on the meta device
        return weight._version, 0


def raise_no_weight() -> NoReturn:
    """Raises ConversionError; called where ``torch.nn.utils`` looks for the parameter "weight"."""
    raise ConversionError(COMPUTED)


class _Parameters(defaultdict[str, nn.Parameter | None]):
    """The parameters of a layer; reading or deleting one named "weight" raises ConversionError."""

    def __delitem__(self, name: str) -> None:
        if name == "weight":
            raise_no_weight()
        super().__delitem__(name)


def parameters_without_weight(conv: nn.Conv2d) -> dict[str, nn.Parameter | None]:
    """The parameters of a convolution except its weight, for a layer that computes it.

    torch.compile of torch 2.5 does not trace the class used here. There the old ``torch.nn.utils.weight_norm``, which
    deletes the parameter without reading it, raises a bare KeyError.
    """
    kind = defaultdict if torch.__version__ < "2.6" else _Parameters
    return kind(raise_no_weight, {name: value for name, value in conv._parameters.items() if name != "weight"})
