"""A depthwise convolution with kernels affine in frozen keys, and a backward pass without their weight gradient."""

import inspect
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from operator import index
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual

_logger = logging.getLogger(__name__)

Pair = tuple[int, int]

CACHED = 2 << 20  # bytes of input worked on at a time
# Taps a side up to which the whole weight gradient gives the shift's; above, it is summed from windows of the input
# (examples/benchmark_shift_gradient.py compares them).
WHOLE_UP_TO = 3


class Case(NamedTuple):
    """What a GPU kernel is to do, as far as its speed depends on it."""

    operation: str  # "conv", a convolution or its input gradient; or "sums", the gradients of shift and scales
    kernel_size: Pair
    stride: Pair
    dilation: Pair
    multiplier: int  # output channels to each of the input
    channels_last: bool
    dtype: torch.dtype
    scales: int = 0  # keys per kernel with a scale that trains


# Where a GPU kernel was measured to be faster at every size that examples/benchmark_train.py tries: nowhere yet.
MEASURED: frozenset[Case] = frozenset()
# "1" takes the GPU kernels wherever they run, "conv" or "sums" that one alone, "0" none, "" where MEASURED says so.
# Global, as torch.compile compiles anew where it has changed. (Before PyTorch 2.7 what is compiled takes none.)
TRITON = os.environ.get("TIMM_MASTERKEYS_TRITON", "")
_runs: dict[str, bool] = {}  # the GPU kernels, by kind of device
_registering = threading.Lock()
_TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")  # an older PyTorch only says that it compiles


def affine_depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keys: torch.Tensor,
    key_index: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """``F.conv2d`` with composed kernels whose backward gives the gradients of scale and shift directly.

    With ``W[c] = sum_j a[c, j] * x[key_index[c, j]] + b[c]``, dL/db[c] is the sum over the output of dL/dy times the
    sum of the input over the kernel's window, and dL/da[c, j] that of dL/dy times the input filtered with the key.
    So the full weight gradient, most of a depthwise backward pass, is not computed where it is not the cheapest way
    (it is for kernels of up to 3x3, and for scales of few taps or more than two keys); and where neither scale nor
    shift needs a gradient, the input is not kept. Differentiable twice, and in forward mode. Under autocast it runs in
    autocast's type, as conv2d.

    Args:
        input: (N, groups, H, W).
        weight: (C, 1, kh, kw), composed from the arguments below; gets no first-order gradient of its own.
        bias: (C,) or None.
        scale: (C * r,).
        shift: (C,).
        keys: (K, kh, kw).
        key_index: (C, r).
        stride: (height, width).
        padding: (height, width) zeros on both sides.
        dilation: (height, width).
        groups: Input channels.

    Returns:
        (N, C, H', W'), that of ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``: bit for bit,
        unless a GPU kernel is taken (``takes_gpu_kernel``), which adds up in another order.
    """
    input, weight, bias = autocast(input, weight, bias)
    if _has_tangents(input, weight, bias):  # the composed kernels carry those of scale and shift
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output: torch.Tensor = _AffineDepthwise.apply(
        input, weight, bias, scale, shift, keys, key_index, stride, padding, dilation, groups
    )
    return output


def autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments of a convolution in the type that autocast gives it, where it is on."""
    device = input.device.type
    if input.is_meta or not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input, weight, bias  # torch refuses to answer for "meta"
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """``F.conv2d``, by the GPU kernel where that is taken; PyTorch says what is wrong with its arguments."""
    if takes_gpu_kernel("conv", input, layout(input), weight, (stride, padding, dilation, groups)):
        sizes = *input.shape[1:], *output_shape(input, weight, stride, padding, dilation)[2:]
        types = {t.dtype for t in (input, weight, bias) if t is not None}
        if input.shape[1] == groups and len(types) == 1 and min(sizes) > 0 and not _has_tangents(input, weight, bias):
            return depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _has_tangents(*tensors: torch.Tensor | None) -> bool:
    """Whether there is forward-mode differentiation, which no compiler does."""
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and unpack_dual(t).tangent is not None for t in tensors)


def layout(tensor: torch.Tensor) -> torch.memory_format:
    """Whether neighbours in memory are channels (``torch.channels_last``) or columns (``torch.contiguous_format``)."""
    return torch.channels_last if tensor.stride(1) == 1 < tensor.stride(3) else torch.contiguous_format


class _AffineDepthwise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        shift: torch.Tensor,
        keys: torch.Tensor,
        key_index: torch.Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> torch.Tensor:
        return convolve(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, scale, shift, keys, key_index, *ctx.geometry = inputs
        ctx.input_shape = input.shape
        ctx.memory_format = layout(input)
        ctx.types = scale.dtype, shift.dtype
        keep = scale.requires_grad or shift.requires_grad
        ctx.save_for_backward(input if keep else None, weight, keys, key_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, keys, key_index = ctx.saved_tensors
        geometry = ctx.geometry
        needs_input, _, needs_bias, needs_scale, needs_shift, *_ = ctx.needs_input_grad
        grad_input = grad_bias = grad_scale = grad_shift = None
        size = keys.shape[1], keys.shape[2]
        scales = key_index.shape[1] if needs_scale else 0
        form = ctx.memory_format
        gpu_sums = (needs_scale or needs_shift) and takes_gpu_kernel("sums", grad, form, weight, geometry, scales)
        conv = needs_input and takes_gpu_kernel("conv", grad, form, weight, geometry)
        full = _full_padding(weight, geometry) if conv else None
        if full is not None:
            grad, turned = grad.contiguous(memory_format=form), weight.flip(2, 3)
            grad_input, needs_input = depthwise_conv2d(grad, turned, None, (1, 1), full, geometry[2]), False
        # Where the whole weight gradient costs less than filtering the input, scale and shift come from it.
        if not gpu_sums and (
            (needs_shift and max(size) <= WHOLE_UP_TO)
            or (needs_scale and (keys[0].numel() < 16 or key_index.shape[1] > 2))
        ):
            mask = [needs_input, True, needs_bias]
            gradients = _convolution_backward(grad, input, weight, geometry, mask)
            grad_input, grad_weight, grad_bias = gradients[0] if needs_input else grad_input, *gradients[1:]
            taps = grad_weight.flatten(1).to(keys.dtype)
            if needs_scale:
                columns = [(taps * keys[i].flatten(1)).sum(1) for i in key_index.unbind(1)]
                grad_scale = torch.stack(columns, 1).flatten()
            grad_shift = taps.sum(1) if needs_shift else None
        else:
            if needs_input:
                like = input
                if like is None:  # only its shape and memory layout matter here: it is never touched
                    form = {"dtype": grad.dtype, "device": grad.device, "memory_format": ctx.memory_format}
                    like = torch.empty(ctx.input_shape, **form)
                grad_input = _input_gradient(grad, like, ctx.memory_format, weight, geometry)
            if needs_bias:
                grad_bias = grad.sum((0, 2, 3))
            if gpu_sums:
                sums = affine_sums(grad, input, keys, key_index[:, :scales], *geometry[:3])
                grad_shift = sums[:, 0] if needs_shift else None
                grad_scale = sums[:, 1:].flatten() if needs_scale else None
            elif needs_scale:
                grad_scale = torch.stack(_key_responses(grad, input, keys, key_index, geometry), 1).flatten()
            if needs_shift and not gpu_sums:
                grad_shift = _correlation(grad, input, partial(_window_sums, size, ctx.memory_format, geometry))
        types = ctx.types
        grad_scale = grad_scale if grad_scale is None else grad_scale.to(types[0])
        grad_shift = grad_shift if grad_shift is None else grad_shift.to(types[1])
        return grad_input, None, grad_bias, grad_scale, grad_shift, *[None] * 6


# PyTorch asks for it at every call; computing it anew costs more than all else around the convolution.
_AffineDepthwise.forward.__signature__ = inspect.signature(_AffineDepthwise.forward)  # type: ignore[attr-defined]


def any_gpu_kernel(operation: str) -> bool:
    """Whether an operation may be left to a GPU kernel at all: cheap, as it is asked at every call."""
    return TRITON in ("1", operation) or (TRITON == "" and len(MEASURED) > 0)


def takes_gpu_kernel(
    operation: str,
    input: torch.Tensor,
    memory_format: torch.memory_format,
    weight: torch.Tensor,
    geometry: Any,
    scales: int = 0,
) -> bool:
    """Whether an operation is left to the GPU kernel; ``input`` may be any tensor of the same type and device."""
    if not any_gpu_kernel(operation) or (torch.compiler.is_compiling() and not _TELLS_EXPORTS):
        return False
    stride, _, dilation, groups = geometry
    channels, _, height, width = map(index, weight.shape)  # constants where it is compiled for sizes that change
    rest = channels // groups, memory_format is torch.channels_last, input.dtype, index(scales)
    return _case_takes_gpu_kernel(input.device.type, operation, height, width, tuple(stride), tuple(dilation), *rest)


def _case_takes_gpu_kernel(device: str, operation: str, height: int, width: int, *rest: Any) -> bool:
    """As ``takes_gpu_kernel``, by what ``Case`` holds; decided once where it is compiled.

    vmap and its like get the plain way, and so does what is exported, which runs where this package is not.
    """
    if TRITON == "" and Case(operation, (height, width), *rest) not in MEASURED:
        return False
    if torch._C._are_functorch_transforms_active() or (_TELLS_EXPORTS and torch.compiler.is_exporting()):
        return False
    return gpu_kernels_run(device)


torch.compiler.assume_constant_result(_case_takes_gpu_kernel)


def gpu_kernels_run(device: str) -> bool:
    """Registers the GPU kernels for a kind of device, once, if Triton is installed and, another thing, runs there."""
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
    except (ImportError, RuntimeError, OSError) as error:  # not installed; no driver; one that Triton does not know
        _logger.warning("Triton does not run here, so depthwise layers take no GPU kernels: %s", error)
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
    """The gradients of shift and scales, (C, 1 + r), from an output gradient (N, C, H', W') and an input.

    Per output channel the sum of the gradient times the input summed over the window, then, key by key, times the input
    filtered with the key; in float32, or float64. ``key_index`` is (C, r); with r = 0, the shifts' gradient alone.
    """
    geometry, size = (stride, padding, dilation, input.shape[1]), (keys.shape[1], keys.shape[2])
    sums = _correlation(grad, input, partial(_window_sums, size, torch.contiguous_format, geometry))
    return torch.stack([sums, *_key_responses(grad, input, keys, key_index, geometry)], 1)


affine_sums = torch.library.custom_op(  # what has a GPU kernel; see ``gpu_kernels_run``
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
    """The sums are linear in either: a convolution with the kernels of which ``cotangent`` is shift and scales."""
    grad, input, keys, key_index = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation, input.shape[1])
    kernels = cotangent[:, 0, None, None] + (cotangent[:, 1:, None, None] * keys[key_index]).sum(1)
    weight = kernels.unsqueeze(1).to(input.dtype)
    grad_input = _convolution_backward(grad, input, weight, geometry, [True, False, False])[0]
    return F.conv2d(input, weight, None, *geometry), grad_input, *[None] * 5


affine_sums.register_autograd(_sums_backward, setup_context=_setup_sums)


def plain_depthwise_conv2d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> torch.Tensor:
    """``F.conv2d`` of (N, C, H, W) with one or more kernels (1, kh, kw) a channel; all of one type."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])


depthwise_conv2d = torch.library.custom_op(
    "timm_masterkeys::depthwise_conv2d",
    plain_depthwise_conv2d,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor",
)


def output_shape(input: torch.Tensor, weight: torch.Tensor, *geometry: Pair) -> tuple[int, int, int, int]:
    """That of a depthwise convolution with a stride, padding and dilation."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *geometry, strict=True)
    )
    return input.shape[0], weight.shape[0], height, width


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
    return *_convolution_backward(grad, input, weight, geometry, mask), None, None, None


depthwise_conv2d.register_autograd(_conv_backward, setup_context=_setup_conv)


def _convolution_backward(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, geometry: Any, mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input, weight and bias, those the mask asks for."""
    stride, padding, dilation, groups = geometry
    arguments = ([weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    gradients = torch.ops.aten.convolution_backward(grad, input, weight, *arguments)
    return gradients


def _input_gradient(
    grad: torch.Tensor, like: torch.Tensor, memory_format: torch.memory_format, weight: torch.Tensor, geometry: Any
) -> torch.Tensor:
    """The gradient of a convolution's input, which is like ``like``. (An old torch.compile lets nobody ask it here.)"""
    full, (_, _, dilation, groups) = _full_padding(weight, geometry), geometry
    contiguous = memory_format is torch.contiguous_format
    if full is not None and contiguous and grad.device.type == "cpu":  # faster as a convolution
        return F.conv2d(grad, weight.flip(2, 3), None, 1, full, dilation, groups)
    # Asked for the bias as well, CPUs would compute the weight's gradient too.
    return _convolution_backward(grad, like, weight, geometry, [True, False, False])[0]


def _full_padding(weight: torch.Tensor, geometry: Any) -> list[int] | None:
    """With which convolving the output gradient with turned kernels gives the input's; None where that is not so."""
    stride, padding, dilation, groups = geometry
    full = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return full if tuple(stride) == (1, 1) and weight.shape[0] == groups and min(full) >= 0 else None


def _correlation(
    grad: torch.Tensor, input: torch.Tensor, filtered: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Per output channel, the sum of ``grad`` times the filtered input; on CPU in parts that stay in its cache."""
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(grad, input)]
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        images = math.ceil(input.shape[0] / max(1, math.ceil(input.nbytes / CACHED)))
        parts = zip(grad.split(images), input.split(images), strict=True)
    total: Any = 0
    for grad_part, input_part in parts:
        part = filtered(input_part)
        if grad.shape[1] > part.shape[1]:
            part = part.repeat_interleave(grad.shape[1] // part.shape[1], 1)
        total = total + (grad_part * part).sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
    return total


def _key_responses(
    grad: torch.Tensor, input: torch.Tensor, keys: torch.Tensor, key_index: torch.Tensor, geometry: Any
) -> list[torch.Tensor]:
    """Per output channel the sums of ``grad`` times the input filtered with each of its keys, r times (C,)."""
    return [_correlation(grad, input, partial(_filter, keys[i], geometry)) for i in key_index.unbind(1)]


def _filter(kernels: torch.Tensor, geometry: Any, input: torch.Tensor) -> torch.Tensor:
    """The input filtered with one kernel (kh, kw) per output channel."""
    return F.conv2d(input, kernels.unsqueeze(1).to(input.dtype), None, *geometry)


def _window_sums(size: Pair, memory_format: torch.memory_format, geometry: Any, input: torch.Tensor) -> torch.Tensor:
    """The sums of the input over the kernel's window at every place of the output, (N, groups, H', W')."""
    stride, padding, dilation, groups = geometry
    pools = dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, size, strict=True))
    # In channels_last on CPU, summing columns, then rows, is faster than a convolution with ones; elsewhere slower.
    if pools and groups > 48 and input.device.type == "cpu" and memory_format is torch.channels_last:
        sums = F.avg_pool2d(input, (size[0], 1), (stride[0], 1), (padding[0], 0), divisor_override=1)
        return F.avg_pool2d(sums, (1, size[1]), (1, stride[1]), (0, padding[1]), divisor_override=1)
    return F.conv2d(input, input.new_ones(groups, 1, *size), None, *geometry)
