"""Chooses where depthwise layers use GPU kernels, and registers them. Triton is imported only when one runs."""

import inspect
import logging
import os
import threading
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .depthwise import (
    AffineDepthwise,
    Geometry,
    Pair,
    affine_gradients,
    convolution_backward,
    full_padding,
    has_tangents,
    key_sums,
    layout,
    output_shape,
    window_sums,
)

_logger = logging.getLogger(__name__)


class Case(NamedTuple):
    """All that the speed of a GPU kernel depends on, except the size of the input."""

    operation: str  # "conv", a convolution or its input gradient; or "sums", the gradients of shift and scales
    kernel_size: Pair
    stride: Pair
    dilation: Pair
    multiplier: int  # output channels per input channel
    channels_last: bool
    dtype: torch.dtype
    scales: int = 0  # keys per kernel, if the scales train


# The cases in which a GPU kernel was faster at every size that examples/benchmark_train.py measures: none yet.
MEASURED: frozenset[Case] = frozenset()
# "1" uses both GPU kernels wherever they run, "conv" or "sums" only that one, "0" none, "" the cases in MEASURED.
# A global, so that torch.compile compiles again when it changes. (Compiled code uses none before PyTorch 2.7.)
TRITON = os.environ.get("TIMM_MASTERKEYS_TRITON", "")
_runs: dict[str, bool] = {}  # whether GPU kernels run, by type of device
_registering = threading.Lock()
_TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")  # an older PyTorch cannot tell export from compilation


class _GpuAffineDepthwise(AffineDepthwise):
    """``AffineDepthwise`` with GPU kernels for those operations that use one."""

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:  # as for AffineDepthwise
        input, weight, bias, _, _, _, _, *geometry = inputs
        return convolve(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = input, weight, keys, key_index = ctx.saved_tensors
        needs_input, _, needs_bias, needs_scale, needs_shift, *_ = ctx.needs_input_grad
        case, scales = (ctx.memory_format, weight, ctx.geometry), key_index.shape[1] if needs_scale else 0
        sums_used = (needs_scale or needs_shift) and uses_gpu_kernel("sums", grad, *case, scales)
        conv_used = needs_input and uses_gpu_kernel("conv", grad, *case)
        full = full_padding(weight, ctx.geometry) if conv_used else None
        gpu_input = gpu_scale = gpu_shift = None
        if full is not None:
            grad = grad.contiguous(memory_format=ctx.memory_format)
            gpu_input = depthwise_conv2d(grad, weight.flip(2, 3), None, (1, 1), full, ctx.geometry[2])
        if sums_used:
            sums = affine_sums(grad, input, keys, key_index[:, :scales], *ctx.geometry[:3])
            gpu_scale = sums[:, 1:].flatten().to(ctx.types[0]) if needs_scale else None
            gpu_shift = sums[:, 0].to(ctx.types[1]) if needs_shift else None
        needs = needs_input and full is None, needs_bias, needs_scale and not sums_used, needs_shift and not sums_used
        grad_input, grad_bias, grad_scale, grad_shift = affine_gradients(ctx, saved, grad, *needs)
        grad_input = grad_input if full is None else gpu_input
        grad_scale, grad_shift = (gpu_scale, gpu_shift) if sums_used else (grad_scale, grad_shift)
        return grad_input, None, grad_bias, grad_scale, grad_shift, *[None] * 6


_GpuAffineDepthwise.forward.__signature__ = inspect.signature(AffineDepthwise.forward)  # type: ignore[attr-defined]


def affine_function() -> type[AffineDepthwise]:
    """The function for ``affine_depthwise_conv2d``: with GPU kernels if any may be used."""
    return _GpuAffineDepthwise if any_gpu_kernel("conv") or any_gpu_kernel("sums") else AffineDepthwise


def convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """``F.conv2d`` by the GPU kernel if it is used and takes the arguments; else by PyTorch, which checks them."""
    if uses_gpu_kernel("conv", input, layout(input), weight, (stride, padding, dilation, groups)):
        sizes = *input.shape[1:], *output_shape(input, weight, stride, padding, dilation)[2:]
        types = {t.dtype for t in (input, weight, bias) if t is not None}
        if input.shape[1] == groups and len(types) == 1 and min(sizes) > 0 and not has_tangents(input, weight, bias):
            return depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def any_gpu_kernel(operation: str) -> bool:
    """Whether an operation uses a GPU kernel in at least one case; fast, as every forward pass calls this."""
    return TRITON in ("1", operation) or (TRITON == "" and len(MEASURED) > 0)


def uses_gpu_kernel(
    operation: str,
    input: torch.Tensor,
    memory_format: torch.memory_format,
    weight: torch.Tensor,
    geometry: Geometry,
    scales: int = 0,
) -> bool:
    """Whether an operation uses its GPU kernel; of ``input`` only dtype and device count."""
    if not any_gpu_kernel(operation) or (torch.compiler.is_compiling() and not _TELLS_EXPORTS):
        return False
    stride, _, dilation, groups = geometry
    channels, _, height, width = map(index, weight.shape)  # constants, also when compiled for dynamic shapes
    rest = channels // groups, memory_format is torch.channels_last, input.dtype, index(scales)
    return _case_uses_gpu_kernel(input.device.type, operation, height, width, tuple(stride), tuple(dilation), *rest)


def _case_uses_gpu_kernel(device: str, operation: str, height: int, width: int, *rest: Any) -> bool:
    """``uses_gpu_kernel`` from the fields of ``Case``; a constant in compiled code.

    False within vmap and other functorch transforms, and in exported programs, which run without this package.
    """
    if TRITON == "" and Case(operation, (height, width), *rest) not in MEASURED:
        return False
    if torch._C._are_functorch_transforms_active() or (_TELLS_EXPORTS and torch.compiler.is_exporting()):
        return False
    return gpu_kernels_run(device)


torch.compiler.assume_constant_result(_case_uses_gpu_kernel)


def gpu_kernels_run(device: str) -> bool:
    """Whether Triton runs on a type of device; the first call registers the GPU kernels for it."""
    with _registering:  # autograd has a thread for each GPU
        if device not in _runs:
            _runs[device] = _registered(device)
        return _runs[device]


def _registered(device: str) -> bool:
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    try:
        from . import gpu_kernels

        gpu_kernels.check_driver(device)
    except (ImportError, RuntimeError, OSError) as error:  # no Triton, no driver, or an unknown one
        _logger.warning("Triton does not run here, so depthwise layers use no GPU kernels: %s", error)
        return False
    affine_sums.register_kernel(device, gpu_kernels.affine_sums)
    depthwise_conv2d.register_kernel(device, gpu_kernels.depthwise_conv2d)
    return True


def plain_sums(
    grad: torch.Tensor,
    input: torch.Tensor,
    keys: torch.Tensor,
    key_index: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> torch.Tensor:
    geometry, size = (stride, padding, dilation, input.shape[1]), (keys.shape[1], keys.shape[2])
    shift = window_sums(grad, input, size, torch.contiguous_format, geometry)
    return torch.stack([shift, *key_sums(grad, input, keys, key_index, geometry)], 1)


# The gradients of shift and scales, (C, 1 + r) in float32 or float64, from an output gradient (N, C, H', W') and an
# input. For each output channel: the sum of the gradient times the input summed over the window, then the sums of the
# gradient times the input filtered with each key. ``key_index`` is (C, r); with r = 0 only the shifts' gradient.
affine_sums = torch.library.custom_op(
    "timm_masterkeys::affine_sums",
    plain_sums,
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor keys, Tensor key_index, int[] stride, int[] padding, int[] dilation)"
    " -> Tensor",
)


@affine_sums.register_fake
def _(grad: torch.Tensor, _: torch.Tensor, keys: torch.Tensor, key_index: torch.Tensor, *geometry: Any) -> torch.Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty(grad.shape[1], 1 + key_index.shape[1], dtype=dtype)


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _sums_backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients by convolutions with kernels composed from ``cotangent``, as the sums are linear in each tensor."""
    grad, input, keys, key_index = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation, input.shape[1])
    kernels = cotangent[:, 0, None, None] + (cotangent[:, 1:, None, None] * keys[key_index]).sum(1)
    weight = kernels.unsqueeze(1).to(input.dtype)
    grad_input = convolution_backward(grad, input, weight, geometry, [True, False, False])[0]
    return F.conv2d(input, weight, None, *geometry), grad_input, *[None] * 5


affine_sums.register_autograd(_sums_backward, setup_context=_setup_sums)


def _plain_depthwise_conv2d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> torch.Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])


# ``F.conv2d`` of (N, C, H, W) with one or more kernels (1, kh, kw) per channel; all tensors of one type.
depthwise_conv2d = torch.library.custom_op(
    "timm_masterkeys::depthwise_conv2d",
    _plain_depthwise_conv2d,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor",
)


@depthwise_conv2d.register_fake
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Pair) -> torch.Tensor:
    shape, form = output_shape(input, weight, *geometry), layout(input)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=form)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)


def _conv_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    geometry, mask = (*ctx.geometry, input.shape[1]), list(ctx.needs_input_grad[:3])
    return *convolution_backward(grad, input, weight, geometry, mask), None, None, None


depthwise_conv2d.register_autograd(_conv_backward, setup_context=_setup_conv)
