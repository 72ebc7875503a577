"""A depthwise convolution with kernels affine in frozen keys, and a backward pass without the weight gradient.

This is the operator in plain PyTorch; ``gpu_operators`` decides where GPU kernels replace parts of it.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]  # stride, padding, dilation, groups

CACHED = 2 << 20  # bytes of input worked on at a time
# Kernels of up to this many taps a side get the gradient of the shift from the whole weight gradient, larger ones from
# sums over windows of the input (examples/benchmark_shift_gradient.py compares them).
WHOLE_UP_TO = 3


class AffineDepthwise(torch.autograd.Function):
    """The convolution, and the gradients of input, bias, scale and shift; the weight gets none."""

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
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

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
        input, _, bias, scale, shift, *_ = ctx.needs_input_grad
        grad_input, *other_grads = affine_gradients(ctx, ctx.saved_tensors, grad, input, bias, scale, shift)
        return grad_input, None, *other_grads, *[None] * 6


# PyTorch reads the signature at every call. Computing it would cost more than anything else around the convolution.
AffineDepthwise.forward.__signature__ = inspect.signature(AffineDepthwise.forward)  # type: ignore[attr-defined]


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
    function: type[AffineDepthwise] = AffineDepthwise,
) -> torch.Tensor:
    """``F.conv2d`` with composed kernels whose backward gives the gradients of scale and shift directly.

    With ``W[c] = sum_j a[c, j] * x[key_index[c, j]] + b[c]``, dL/db[c] is the sum over the output of dL/dy times the
    sum of the input over the kernel's window. dL/da[c, j] is the sum of dL/dy times the input filtered with the key.
    The full weight gradient takes most of a depthwise backward pass. It is computed only where that is cheapest: for
    kernels of up to 3x3, and for scales with few taps or more than two keys. The input is kept only if scale or shift
    needs a gradient. Differentiable twice, and in forward mode. Under autocast it runs in autocast's dtype, as conv2d.

    Args:
        input: (N, groups, H, W).
        weight: (C, 1, kh, kw), composed from the arguments below; gets no first-order gradient.
        bias: (C,) or None.
        scale: (C * r,).
        shift: (C,).
        keys: (K, kh, kw).
        key_index: (C, r).
        stride: (height, width).
        padding: (height, width), zeros on either side.
        dilation: (height, width).
        groups: The number of input channels.
        function: ``AffineDepthwise``, or ``gpu_operators.affine_function()``.

    Returns:
        (N, C, H', W'), equal bit for bit to ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``; not
        where a GPU kernel is used, which sums in another order.
    """
    input, weight, bias = autocast(input, weight, bias)
    if has_tangents(input, weight, bias):  # the composed kernels carry the tangents of scale and shift
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output: torch.Tensor = function.apply(
        input, weight, bias, scale, shift, keys, key_index, stride, padding, dilation, groups
    )
    return output


def autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments of a convolution, cast as autocast casts them where it is enabled.

    Elsewhere a weight is cast to an input in half precision: FSDP's mixed precision casts parameters, but not the
    buffers from which the weight is composed.
    """
    device = input.device.type
    if input.is_meta or not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        half = input.dtype in (torch.float16, torch.bfloat16)
        return input, weight.to(input.dtype) if half else weight, bias  # torch has no autocast for "meta"
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def has_tangents(*tensors: torch.Tensor | None) -> bool:
    """Whether any tensor is differentiated in forward mode; never under torch.compile, which cannot do that.

    True within ``torch.func.jvp`` and what is made of it: a gradient in it, as for a Hessian, hides the tangents.
    """
    if torch.compiler.is_compiling():
        return False
    if any(transform.key().name == "Jvp" for transform in torch._C._functorch.get_interpreter_stack() or ()):
        return True
    return any(t is not None and unpack_dual(t).tangent is not None for t in tensors)


def layout(tensor: torch.Tensor) -> torch.memory_format:
    """``torch.channels_last`` if neighbours in memory are channels, ``torch.contiguous_format`` if they are columns."""
    return torch.channels_last if tensor.stride(1) == 1 < tensor.stride(3) else torch.contiguous_format


def output_shape(input: torch.Tensor, weight: torch.Tensor, *geometry: Pair) -> tuple[int, int, int, int]:
    """The shape of a depthwise convolution's output; geometry is stride, padding and dilation."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *geometry, strict=True)
    )
    return input.shape[0], weight.shape[0], height, width


def affine_gradients(
    ctx: Any,
    saved: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
    needs_input: bool,
    needs_bias: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of input, bias, scale and shift; None for those not needed.

    ``saved`` is ``ctx.saved_tensors``, which a backward pass may read only once under gradient checkpointing.
    """
    input, weight, keys, key_index = saved
    size, keys_per_kernel = (keys.shape[1], keys.shape[2]), key_index.shape[1]
    grad_input = grad_bias = grad_scale = grad_shift = None
    # Where the whole weight gradient costs less than filtering the input, scale and shift come from it.
    if (needs_shift and max(size) <= WHOLE_UP_TO) or (needs_scale and (size[0] * size[1] < 16 or keys_per_kernel > 2)):
        mask = [needs_input, True, needs_bias]
        grad_input, grad_weight, grad_bias = convolution_backward(grad, input, weight, ctx.geometry, mask)
        taps = grad_weight.reshape(len(weight), -1).to(keys.dtype)  # not flatten: grad(is_grads_batched=True) lacks it
        if needs_scale:
            grad_scale = torch.stack([(taps * keys[i].flatten(1)).sum(1) for i in key_index.unbind(1)], 1).reshape(-1)
        if needs_shift:
            grad_shift = taps.sum(1)
    else:
        if needs_input:
            grad_input = _input_gradient(ctx, input, weight, grad)
        if needs_bias:
            grad_bias = grad.sum((0, 2, 3))
        if needs_scale:
            grad_scale = torch.stack(key_sums(grad, input, keys, key_index, ctx.geometry), 1).reshape(-1)
        if needs_shift:
            grad_shift = window_sums(grad, input, size, ctx.memory_format, ctx.geometry)
    grad_scale = None if grad_scale is None else grad_scale.to(ctx.types[0])
    grad_shift = None if grad_shift is None else grad_shift.to(ctx.types[1])
    return grad_input, grad_bias, grad_scale, grad_shift


def convolution_backward(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input, weight and bias; None where the mask is False."""
    stride, padding, dilation, groups = geometry
    arguments = ([weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    gradients = torch.ops.aten.convolution_backward(grad, input, weight, *arguments)
    return gradients


def _input_gradient(ctx: Any, input: torch.Tensor | None, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    full, contiguous = full_padding(weight, ctx.geometry), ctx.memory_format is torch.contiguous_format
    if full is not None and contiguous and grad.device.type == "cpu":  # faster as a convolution
        return F.conv2d(grad, weight.flip(2, 3), None, 1, full, *ctx.geometry[2:])
    if input is None:  # only its shape and memory layout matter
        form = {"dtype": grad.dtype, "device": grad.device, "memory_format": ctx.memory_format}
        input = torch.empty(ctx.input_shape, **form)
    # With the bias in the mask, CPUs would compute the weight's gradient too.
    return convolution_backward(grad, input, weight, ctx.geometry, [True, False, False])[0]


def full_padding(weight: torch.Tensor, geometry: Geometry) -> list[int] | None:
    """The padding for the input gradient as a convolution of the output gradient with flipped kernels, or None."""
    stride, padding, dilation, groups = geometry
    full = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return full if tuple(stride) == (1, 1) and weight.shape[0] == groups and min(full) >= 0 else None


def key_sums(
    grad: torch.Tensor, input: torch.Tensor, keys: torch.Tensor, key_index: torch.Tensor, geometry: Geometry
) -> list[torch.Tensor]:
    """The gradients of the scales, r tensors (C,): sums of ``grad`` times the input filtered with each key."""

    def filtered(kernels: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return F.conv2d(part, kernels.unsqueeze(1).to(part.dtype), None, *geometry)

    return [_correlation(grad, input, partial(filtered, keys[i])) for i in key_index.unbind(1)]


def window_sums(
    grad: torch.Tensor, input: torch.Tensor, size: Pair, memory_format: torch.memory_format, geometry: Geometry
) -> torch.Tensor:
    """The gradient of the shifts (C,): sums of ``grad`` times the input summed over the kernel's window."""
    stride, padding, dilation, groups = geometry
    pools = dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, size, strict=True))
    # In channels_last on CPU, summing columns, then rows, is faster than a convolution with ones; elsewhere slower.
    pools = pools and groups > 48 and input.device.type == "cpu" and memory_format is torch.channels_last

    def summed(part: torch.Tensor) -> torch.Tensor:
        if not pools:
            return F.conv2d(part, part.new_ones(groups, 1, *size), None, *geometry)
        columns = F.avg_pool2d(part, (size[0], 1), (stride[0], 1), (padding[0], 0), divisor_override=1)
        return F.avg_pool2d(columns, (1, size[1]), (1, stride[1]), (0, padding[1]), divisor_override=1)

    return _correlation(grad, input, summed)


def _correlation(
    grad: torch.Tensor, input: torch.Tensor, filtered: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The sum of ``grad`` times the filtered input per output channel; on CPU in parts that fit into the cache."""
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
