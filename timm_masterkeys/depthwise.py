"""A depthwise convolution with kernels affine in frozen keys, and a backward pass without their weight gradient."""

from typing import Any

import torch
import torch.nn.functional as F

Pair = tuple[int, int]


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
    So the full weight gradient, most of a depthwise backward pass, is never computed; and where neither scale nor shift
    needs a gradient, the input is not kept. Differentiable twice. Under autocast it runs in autocast's type, as conv2d.

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
        (N, C, H', W'), bit for bit that of ``F.conv2d(input, weight, bias, stride, padding, dilation, groups)``.
    """
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    output: torch.Tensor = _AffineDepthwise.apply(
        input, weight, bias, scale, shift, keys, key_index, stride, padding, dilation, groups
    )
    return output


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
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, weight, _, scale, shift, keys, key_index, *ctx.geometry = inputs
        ctx.input_shape = input.shape
        ctx.memory_format = torch.channels_last if input.stride(1) == 1 < input.stride(3) else torch.contiguous_format
        ctx.types = scale.dtype, shift.dtype
        keep = scale.requires_grad or shift.requires_grad
        ctx.save_for_backward(input if keep else None, weight, keys, key_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, keys, key_index = ctx.saved_tensors
        geometry = ctx.geometry
        grad_input = grad_bias = grad_scale = grad_shift = None
        if ctx.needs_input_grad[0]:
            # Only shape and memory layout of the input matter here; an empty one is never touched.
            like = input
            if like is None:
                form = {"dtype": grad.dtype, "device": grad.device, "memory_format": ctx.memory_format}
                like = torch.empty(ctx.input_shape, **form)
            grad_input = _input_gradient(grad, like, weight, geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        if ctx.needs_input_grad[3]:
            columns = [_correlation(grad, input, keys[column], geometry) for column in key_index.unbind(1)]
            grad_scale = torch.stack(columns, 1).flatten().to(ctx.types[0])
        if ctx.needs_input_grad[4]:
            ones = torch.ones_like(keys[:1]).expand(input.shape[1], -1, -1)
            grad_shift = _correlation(grad, input, ones, geometry).to(ctx.types[1])
        return grad_input, None, grad_bias, grad_scale, grad_shift, *[None] * 6


def _input_gradient(grad: torch.Tensor, like: torch.Tensor, weight: torch.Tensor, geometry: Any) -> torch.Tensor:
    """The gradient of a convolution's input alone. Asked for the bias as well, CPUs compute the weight's too."""
    stride, padding, dilation, groups = geometry
    only_input = [True, False, False]
    arguments = (None, stride, padding, dilation, False, (0, 0), groups, only_input)
    gradient: torch.Tensor = torch.ops.aten.convolution_backward(grad, like, weight, *arguments)[0]
    return gradient


def _correlation(grad: torch.Tensor, input: torch.Tensor, kernels: torch.Tensor, geometry: Any) -> torch.Tensor:
    """Per output channel, the sum of ``grad`` times ``input`` filtered with ``kernels`` ((C or groups), kh, kw)."""
    filtered = F.conv2d(input, kernels.unsqueeze(1).to(input.dtype), None, *geometry)
    multiplier = grad.shape[1] // filtered.shape[1]
    if multiplier > 1:
        filtered = filtered.repeat_interleave(multiplier, 1)
    return (grad * filtered).sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))
