"""A convolution with a computed weight: reading and assigning it, the forward pass, and the geometry."""

import warnings
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from torch import nn

from ..errors import ConversionError
from .depthwise import autocast
from .gpu_operators import any_gpu_kernel, convolve
from .weight_guards import COMPUTED, ComputedWeight, state_of

# Named here, as torch.jit.script fails on a mypy comment in a forward.
_is_scripting: Any = torch.jit.is_scripting  # type: ignore[attr-defined]
_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]


class ComputedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with kernels computed by ``compose_weight()``; its weight cannot be used as a parameter.

    Attributes:
        weight: (out_channels, 1, kh, kw), computed at each access. Assigning a tensor of this shape projects it.
            Writing in place into the tensor read here does not change the layer; the next forward pass warns of it.
        same_padding: Whether it pads as timm's ``Conv2dSame``.
    """

    __jit_unused_properties__: ClassVar = ["weight", "parametrizations"]
    __jit_ignored_attributes__: ClassVar = ["parametrizations"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.__jit_unused_properties__:  # torch.jit looks at a class's own properties only
            setattr(cls, name, getattr(ComputedConv2d, name))

    same_padding: bool
    _read: tuple[torch.Tensor, tuple[int, int]] | None  # the weight last read, see _warn_if_written

    def compose_weight(self) -> torch.Tensor:
        """The kernels (out_channels, 1, kh, kw), differentiable in the parameters they are computed from."""
        raise NotImplementedError

    def project_weight(self, weight: torch.Tensor) -> None:
        """Sets the layer's kernels to those nearest to ``weight`` that it can compute. In place."""
        raise NotImplementedError

    def keep_kernels(self, weight: torch.Tensor) -> bool:
        """Drops all kernels but those in ``weight``; returns False, unchanged, if some are not the layer's."""
        raise NotImplementedError

    def check_values(self, input: torch.Tensor | None = None) -> None:
        """Raises CheckpointError if the kernels have no values, unless ``input`` has none either."""

    def _grad_forward(self, input: torch.Tensor) -> torch.Tensor:
        """The convolution with gradients, of an input already padded if ``same_padding``."""
        return self._conv_forward(*autocast(input, self.compose_weight(), self.bias))

    @property
    def weight(self) -> torch.Tensor:  # computed; nn.Conv2d has a parameter here
        if torch.compiler.is_compiling():
            return self.compose_weight()
        self.check_values()
        try:
            weight = self.compose_weight()
        except IndexError:  # key indices from uninitialised memory
            self.train(self.training)
            self.check_values()
            raise
        self._warn_if_written()
        if not weight.is_inference():  # those have no version, and cannot be written to outside inference mode
            weight = weight.as_subclass(ComputedWeight)
            self._read = weight, state_of(weight)
        return weight

    @weight.setter
    def weight(self, weight: torch.Tensor) -> None:
        self.project_weight(weight)

    def _warn_if_written(self) -> None:
        """Warns if the tensor last read as ``weight`` was written to, which does not change the layer."""
        read, self._read = self._read, None
        if read is not None and state_of(read[0]) != read[1]:
            warnings.warn(
                "The weight of a MasterKeyConv2d was written to in place. It is computed, so the layer is unchanged: "
                "assign the whole tensor (layer.weight = tensor) to project it on the keys, or call "
                "layer.reset_parameters() for another random initialisation.",
                stacklevel=3,
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module, but a weight, or a name that ``torch.nn.utils`` derives from it, raises ConversionError.

        Only the kernels that Torch-Pruning keeps are accepted, after it has lowered ``out_channels``.
        """
        if name == "weight" and param is not None and self.keep_kernels(param):
            return
        if name.partition("_")[0] == "weight":
            raise ConversionError(COMPUTED)
        super().register_parameter(name, param)

    @property
    def parametrizations(self) -> NoReturn:
        """``torch.nn.utils.parametrize`` and ``torch.ao.quantization`` look for this first."""
        raise ConversionError(COMPUTED)

    def __dir__(self) -> list[str]:
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "parametrizations"]  # for code that reads every attribute

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.same_padding:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        if _is_scripting() or _is_tracing():
            return self._conv_forward(input, self.compose_weight(), self.bias)
        return self._fast_forward(input)

    @torch.jit.unused
    def _fast_forward(self, input: torch.Tensor) -> torch.Tensor:
        traced: Any = input
        proxy = isinstance(traced, torch.fx.Proxy)  # from an FX tracer that looks inside the layer
        if not torch.compiler.is_compiling():
            if self._read is not None:  # only when not compiling: no guard on the tensor read
                self._warn_if_written()
            if not proxy:
                self.check_values(input)
        if proxy and type(traced.tracer).__module__.startswith("torch.ao.quantization"):
            raise ConversionError(COMPUTED)
        if proxy or input.ndim != 4:  # 3: an image without a batch
            return self._conv_forward(input, self.compose_weight(), self.bias)
        return self._grad_forward(input) if torch.is_grad_enabled() else self._no_grad_forward(input)

    def _no_grad_forward(self, input: torch.Tensor) -> torch.Tensor:
        input, weight, bias = autocast(input, self.compose_weight(), self.bias)
        if not any_gpu_kernel("conv"):  # used where measured faster, or by TIMM_MASTERKEYS_TRITON
            return self._conv_forward(input, weight, bias)
        input, padding = self._padded(input)
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]

    def windows(self, input: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The part of the input under the kernel, at some positions of the output.

        Args:
            input: (N, in_channels, H, W).
            positions: (P,) int64, indices into the H' * W' positions of the output, row by row.

        Returns:
            (N, P, kh * kw, in_channels); ``weight.flatten(1) @ windows`` are the kernels' responses at the positions.
        """
        if self.same_padding:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        input, (high, wide) = self._padded(input)
        input = F.pad(input, (wide, wide, high, high))
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        width = (input.shape[3] - spans[1] - 1) // self.stride[1] + 1
        corners = positions // width * self.stride[0], positions % width * self.stride[1]
        rows, columns = (
            corner[:, None] + d * torch.arange(k, device=positions.device)
            for corner, d, k in zip(corners, self.dilation, self.kernel_size, strict=True)
        )
        return input.permute(0, 2, 3, 1)[:, rows[:, :, None], columns[:, None, :]].flatten(2, 3)

    def _padded(self, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The input, padded except for symmetric zeros, and the number of zeros (height, width) still to add."""
        if self.padding_mode != "zeros":
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if not isinstance(self.padding, str):
            return input, self.padding  # type: ignore[return-value]
        if self.padding == "valid":
            return input, (0, 0)
        height, width = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        if height % 2 or width % 2:  # "same" with an even kernel: the odd tap goes below and to the right
            input = F.pad(input, (0, width % 2, 0, height % 2))
        return input, (height // 2, width // 2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}
