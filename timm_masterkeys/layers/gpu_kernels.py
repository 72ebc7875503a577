"""GPU kernels: a depthwise convolution, and similarly the gradients of shift and scale.

It imports Triton, so it is imported only when a GPU kernel runs (``gpu_operators.gpu_kernels_run``). Tested in Triton's
interpreter and compiled for several GPUs, but not measured on one; used only if ``TIMM_MASTERKEYS_TRITON`` is set.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .depthwise import layout, output_shape

Pair = tuple[int, int]

# The places, columns of places, and channels that a program works on at a time; the key is whether channels_last.
# Neighbouring threads read neighbouring columns of one channel, or in channels_last neighbouring channels.
CONVOLUTION = {  # a place is four rows of the output
    False: {"places": 256, "columns": 64, "channels": 1},
    True: {"places": 8, "columns": 8, "channels": 64},
}
WINDOWS = {  # a place is one element of the input
    False: {"places": 512, "columns": 64, "channels": 1},
    True: {"places": 32, "columns": 8, "channels": 32},
}
WIDE = 2**31  # elements; offsets of a tensor with more take 64 bits


def check_driver(device: str) -> None:
    """Raises Triton's own error if Triton cannot run on a type of device, as without a driver."""
    if device == "cuda":
        triton.runtime.driver.active.get_current_device()


@triton.jit
def _load(at, there, position, size, stride, TOTAL: tl.constexpr):
    """The elements at a position along one axis, (places, channels); 0 outside the axis."""
    inside = there & ((position >= 0) & (position < size))[:, None]
    return tl.load(at + (position * stride)[:, None], mask=inside, other=0.0).to(TOTAL)


@triton.jit
def _store(at, values, there, position, size, stride):
    """Writes values (places, channels) to the elements that ``_load`` reads."""
    inside = there & (position < size)[:, None]
    tl.store(at + (position * stride)[:, None], values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _times(at, values, there, position, size, stride, TOTAL: tl.constexpr):
    """Values times the elements that ``_load`` reads; 0 outside, where the values may not be finite."""
    inside = there & (position < size)[:, None]
    return tl.where(inside, values * _load(at, there, position, size, stride, TOTAL), 0.0)


@triton.jit
def _store_rows(at, y0, y1, y2, y3, there, row, height, stride):
    _store(at, y0, there, row, height, stride)
    _store(at, y1, there, row + 1, height, stride)
    _store(at, y2, there, row + 2, height, stride)
    _store(at, y3, there, row + 3, height, stride)


@triton.jit
def _sum_rows(at, y0, y1, y2, y3, there, row, height, stride, TOTAL: tl.constexpr):
    """The sums (channels,) of four rows times the elements that ``_store_rows`` would overwrite."""
    y0 = _times(at, y0, there, row, height, stride, TOTAL)
    y1 = _times(at, y1, there, row + 1, height, stride, TOTAL)
    y2 = _times(at, y2, there, row + 2, height, stride, TOTAL)
    y3 = _times(at, y3, there, row + 3, height, stride, TOTAL)
    return tl.sum((y0 + y1) + (y2 + y3), 0)


@triton.jit
def _convolve(
    input,
    taps,  # (kh * kw, channels)
    bias,  # (channels,)
    output,  # written; with SUMS the output gradient, read
    sums,  # (chunks, channels)
    images,
    channels,
    in_height,
    in_width,
    height,
    width,
    xn,
    xc,
    xh,
    xw,
    yn,
    yc,
    yh,
    yw,
    SUMS: tl.constexpr,
    BIAS: tl.constexpr,
    IN: tl.constexpr,  # channels per channel of the input
    OUT: tl.constexpr,  # channels per channel of the output gradient
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,  # bands of four
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOTAL: tl.constexpr,  # the dtype of the sums
    INDEX: tl.constexpr,  # the dtype of offsets
):
    """One program: some channels, images, rows and columns of the output.

    A place is four consecutive rows of the output. For each column of the kernel the input slides past them: an element
    loaded once is multiplied by up to four taps in registers, so kh + 3 loads give 4 * kh products. With a stride or
    dilation between rows each product needs its own load.
    """
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    column_blocks = tl.cdiv(width, COLUMNS)
    row_blocks = tl.cdiv(height, 4 * ROWS)
    chunk = program // channel_blocks
    tile = chunk // column_blocks
    place = tl.arange(0, IMAGES * ROWS * COLUMNS)
    channel = (program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    column = (chunk % column_blocks * COLUMNS + place % COLUMNS).to(INDEX)
    row = (tile % row_blocks * (4 * ROWS) + place // COLUMNS % ROWS * 4).to(INDEX)
    image = (tile // row_blocks * IMAGES + place // (ROWS * COLUMNS)).to(INDEX)
    exists = channel < channels
    there = (image < images)[:, None] & exists[None, :]
    input_at = input + (image * xn)[:, None] + (channel // IN * xc)[None, :]
    y0 = tl.zeros([IMAGES * ROWS * COLUMNS, CHANNELS], TOTAL)
    if BIAS:
        y0 += tl.load(bias + channel, mask=exists, other=0.0).to(TOTAL)[None, :]
    y1 = y0
    y2 = y0
    y3 = y0
    for k in range(KW):
        top = row * SY - PY
        across = column * SX + (k * DX - PX)
        at = input_at + (across * xw)[:, None]
        inside = there & ((across >= 0) & (across < in_width))[:, None]
        if SY * DY == 1:
            x0 = _load(at, inside, top, in_height, xh, TOTAL)
            x1 = _load(at, inside, top + 1, in_height, xh, TOTAL)
            x2 = _load(at, inside, top + 2, in_height, xh, TOTAL)
        for i in tl.static_range(KH):
            if SY * DY > 1:
                x0 = _load(at, inside, top + i * DY, in_height, xh, TOTAL)
                x1 = _load(at, inside, top + (i * DY + SY), in_height, xh, TOTAL)
                x2 = _load(at, inside, top + (i * DY + 2 * SY), in_height, xh, TOTAL)
            x3 = _load(at, inside, top + (i * DY + 3 * SY), in_height, xh, TOTAL)
            tap = tl.load(taps + (i * KW + k) * channels + channel, mask=exists, other=0.0).to(TOTAL)[None, :]
            y0 += tap * x0
            y1 += tap * x1
            y2 += tap * x2
            y3 += tap * x3
            if SY * DY == 1:
                x0 = x1
                x1 = x2
                x2 = x3
    output_at = output + (image * yn)[:, None] + (channel // OUT * yc)[None, :] + (column * yw)[:, None]
    inside = there & (column < width)[:, None]
    if SUMS:
        total = _sum_rows(output_at, y0, y1, y2, y3, inside, row, height, yh, TOTAL)
        tl.store(sums + chunk * channels + channel, total, mask=exists)
    else:
        _store_rows(output_at, y0, y1, y2, y3, inside, row, height, yh)


@triton.jit
def _load_grad(at, there, shifted, height, gh, SY: tl.constexpr, TOTAL: tl.constexpr):
    """The output gradient at the row ``shifted / SY``; 0 where the stride does not divide ``shifted``."""
    if SY > 1:
        there = there & (shifted % SY == 0)[:, None]
    return _load(at, there, shifted // SY, height, gh, TOTAL)


@triton.jit
def _window_sums(
    grad,
    input,
    sums,  # (chunks, channels)
    images,
    channels,
    in_height,
    in_width,
    height,
    width,
    gn,
    gc,
    gh,
    gw,
    xn,
    xc,
    xh,
    xw,
    rows,  # of the input that a program goes down
    IN: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOTAL: tl.constexpr,
    INDEX: tl.constexpr,
):
    """One program: some channels, images and rows of the input, all columns.

    In the sum over taps (i, k) of grad[y - i, x] * input[y, x + k], y is a row of the *input*. So a tap's row shifts
    only the gradient, and its column only the input: the sum is a product of two sums, from kh + kw loads per place.
    """
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image_blocks = tl.cdiv(images, IMAGES)
    chunk = program // channel_blocks
    place = tl.arange(0, IMAGES * ROWS * COLUMNS)
    channel = (program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    image = (chunk % image_blocks * IMAGES + place // (ROWS * COLUMNS)).to(INDEX)
    down = (place // COLUMNS % ROWS).to(INDEX)
    along = (place % COLUMNS).to(INDEX)
    first_row = chunk // image_blocks * rows
    last_row = tl.minimum(first_row + rows, in_height)
    exists = channel < channels
    there = (image < images)[:, None] & exists[None, :]
    grad_at = grad + (image * gn)[:, None] + (channel * gc)[None, :]
    input_at = input + (image * xn)[:, None] + (channel // IN * xc)[None, :]
    total = tl.zeros([IMAGES * ROWS * COLUMNS, CHANNELS], TOTAL)
    for top in range(first_row, last_row, ROWS):
        for left in range(0, width, COLUMNS):
            row = top + down
            column = left + along
            grad_column = grad_at + (column * gw)[:, None]
            grad_there = there & (column < width)[:, None]
            input_row = input_at + (row * xh)[:, None]
            input_there = there & (row < last_row)[:, None]
            row += PY
            column = column * SX - PX
            grad_sum = _load_grad(grad_column, grad_there, row, height, gh, SY, TOTAL)
            for i in tl.static_range(1, KH):
                grad_sum += _load_grad(grad_column, grad_there, row - i * DY, height, gh, SY, TOTAL)
            input_sum = _load(input_row, input_there, column, in_width, xw, TOTAL)
            for k in tl.static_range(1, KW):
                input_sum += _load(input_row, input_there, column + k * DX, in_width, xw, TOTAL)
            total += input_sum * grad_sum
    tl.store(sums + chunk * channels + channel, tl.sum(total, 0), mask=exists)


def depthwise_conv2d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> torch.Tensor:
    """``gpu_operators.depthwise_conv2d``, summed in float32 or float64."""
    shape = output_shape(input, weight, stride, padding, dilation)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout(input))
    if output.numel():
        _launch_convolution(input, weight, bias, output, (stride, padding, dilation))
    return output


def affine_sums(
    grad: torch.Tensor,
    input: torch.Tensor,
    keys: torch.Tensor,
    key_index: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> torch.Tensor:
    """``gpu_operators.affine_sums``. Deterministic: nothing is added atomically."""
    (images, channels, *_), in_height = grad.shape, input.shape[2]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if not grad.numel():
        return grad.new_zeros(channels, 1 + key_index.shape[1], dtype=dtype)
    form = layout(input)
    if form is not layout(grad):  # a copy costs less than reads across the layout
        grad = grad.contiguous(memory_format=form)
    # The rows of a block divide the height; a program goes down several blocks.
    sizes = _blocks(grad.shape, in_height & -in_height, WINDOWS[form is torch.channels_last])
    rows = max(32, 8 * sizes["ROWS"])
    chunks = triton.cdiv(images, sizes["IMAGES"]) * triton.cdiv(in_height, rows)
    shift = grad.new_empty(chunks, channels, dtype=dtype)
    with torch.cuda.device_of(input):
        _window_sums[(chunks * triton.cdiv(channels, sizes["CHANNELS"]),)](
            grad,
            input,
            shift,
            images,
            channels,
            *input.shape[2:],
            *grad.shape[2:],
            *grad.stride(),
            *input.stride(),
            rows,
            channels // input.shape[1],
            *keys.shape[1:],
            *stride,
            *padding,
            *dilation,
            **sizes,
            **_types(dtype, grad, input),
        )
    if not key_index.shape[1]:
        return shift.sum(0)[:, None]
    scales = _launch_convolution(input, keys[key_index.flatten()], None, grad, (stride, padding, dilation), sums=True)
    return torch.cat([shift.sum(0)[:, None], scales.sum(0).view(channels, -1)], 1)


def _launch_convolution(
    input: torch.Tensor,
    kernels: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    geometry: tuple[Pair, Pair, Pair],
    sums: bool = False,
) -> torch.Tensor:
    """Writes the convolution to ``output``; with ``sums`` returns its products with ``output``, a gradient, summed.

    The sums are (chunks, C * r). The kernels are (C * r, [1,] kh, kw), r for each channel of the output.
    """
    images, _, height, width = output.shape
    channels, dtype = len(kernels), torch.promote_types(input.dtype, torch.float32)
    bands = triton.cdiv(height, 4)
    form = CONVOLUTION[layout(input) is torch.channels_last]
    sizes = _blocks(output.shape, triton.next_power_of_2(bands), form)
    counts = (images, bands, width)
    chunks = math.prod(triton.cdiv(n, sizes[s]) for n, s in zip(counts, ("IMAGES", "ROWS", "COLUMNS"), strict=True))
    partial = output.new_empty(chunks, channels if sums else 0, dtype=dtype)
    with torch.cuda.device_of(input):
        _convolve[(chunks * triton.cdiv(channels, sizes["CHANNELS"]),)](
            input,
            kernels.flatten(1).t().contiguous(),
            kernels if bias is None else bias.contiguous(),  # without a bias this is not read
            output,
            partial,
            images,
            channels,
            *input.shape[2:],
            height,
            width,
            *input.stride(),
            *output.stride(),
            sums,
            bias is not None,
            channels // input.shape[1],
            channels // output.shape[1],
            *kernels.shape[-2:],
            *(n for pair in geometry for n in pair),
            **sizes,
            **_types(dtype, input, output),
        )
    return partial


def _blocks(output: torch.Size, rows: int, block: dict[str, int]) -> dict[str, int]:
    """The block sizes of a program: its places are columns first, then at most ``rows`` (a power of 2), then images."""
    columns = min(triton.next_power_of_2(output[3]), block["columns"])
    rows = min(rows, block["places"] // columns)
    images = min(block["places"] // (columns * rows), triton.next_power_of_2(output[0]))
    return {"IMAGES": images, "ROWS": rows, "COLUMNS": columns, "CHANNELS": block["channels"]}


def _types(total: torch.dtype, *tensors: torch.Tensor) -> dict[str, Any]:
    """The dtypes of a GPU kernel's sums and of its offsets, which take 64 bits for large tensors."""
    spans = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return {
        "TOTAL": tl.float64 if total == torch.float64 else tl.float32,
        "INDEX": tl.int64 if max(spans) >= WIDE else tl.int32,
    }
