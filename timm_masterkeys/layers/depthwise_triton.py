"""The gradients of scale and shift in one reduction over input and output gradient, as a Triton kernel.

Imports Triton, so it is imported where a kernel is about to run, never before (``depthwise._kernel_runs``). Tested in
Triton's interpreter only: no figure of it was measured, and nothing takes it unless ``TIMM_MASTERKEYS_TRITON=1``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

Pair = tuple[int, int]

# Places of the output and channels that a program works on at a time, columns of them, by layout. Neighbouring threads
# read neighbouring columns of one channel, or in channels_last neighbouring channels.
PLANES = {"places": 512, "columns": 64, "channels": 1}
CHANNELS_LAST = {"places": 32, "columns": 8, "channels": 32}
WIDE = 2**31  # elements from which offsets take 64 bits


def check_driver(device: str) -> None:
    """Raises whatever Triton does unless it can run on such a device: an installed one need not."""
    if device == "cuda":
        triton.runtime.driver.active.get_current_device()


@triton.jit
def _load(at, there, position, size, stride, TOTAL: tl.constexpr):
    """The elements at a position along one axis, (places, channels); 0 where the axis has none."""
    inside = there & ((position >= 0) & (position < size))[:, None]
    return tl.load(at + (position * stride)[:, None], mask=inside, other=0.0).to(TOTAL)


@triton.jit
def _load_grad(at, there, shifted, height, gh, SY: tl.constexpr, TOTAL: tl.constexpr):
    """The output gradient where the output's row times the stride is ``shifted``."""
    if SY > 1:
        there = there & (shifted % SY == 0)[:, None]
    return _load(at, there, shifted // SY, height, gh, TOTAL)


@triton.jit
def _sums(
    grad,
    input,
    keys,
    key_index,
    partial,
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
    MULTIPLIER: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    DY: tl.constexpr,
    DX: tl.constexpr,
    KEYS: tl.constexpr,  # per kernel
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOTAL: tl.constexpr,  # the type summed in
    INDEX: tl.constexpr,  # the type of offsets
):
    """One program: some channels, images and rows of the input, all columns.

    The sum over taps (i, k) of key[i, k] * grad[y - i, x] * input[y, x + k] is taken with y a row of the *input*: so a
    tap's row shifts only the gradient, its column only the input. For the shift, whose taps are all 1, the two sums
    come apart: kh + kw loads a place instead of kh * kw. What is loaded again, for another tap, row or key, was read
    shortly before by the same program, or at its borders by a neighbour.
    """
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    image_blocks = tl.cdiv(images, IMAGES)
    chunks = tl.num_programs(0) // channel_blocks
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
    input_at = input + (image * xn)[:, None] + (channel // MULTIPLIER * xc)[None, :]

    for part in tl.static_range(KEYS + 1):  # the shift, then key by key
        total = tl.zeros([IMAGES * ROWS * COLUMNS, CHANNELS], TOTAL)
        key = keys
        if part > 0:
            key = keys + tl.load(key_index + channel * KEYS + (part - 1), mask=exists, other=0) * (KH * KW)
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
                if part == 0:
                    given = _load_grad(grad_column, grad_there, row, height, gh, SY, TOTAL)
                    for i in tl.static_range(1, KH):
                        given += _load_grad(grad_column, grad_there, row - i * DY, height, gh, SY, TOTAL)
                    taken = _load(input_row, input_there, column, in_width, xw, TOTAL)
                    for k in tl.static_range(1, KW):
                        taken += _load(input_row, input_there, column + k * DX, in_width, xw, TOTAL)
                    total += taken * given
                else:
                    for k in range(KW):
                        given = tl.zeros([IMAGES * ROWS * COLUMNS, CHANNELS], TOTAL)
                        for i in tl.static_range(KH):
                            tap = tl.load(key + (i * KW + k), mask=exists, other=0.0).to(TOTAL)
                            shifted = _load_grad(grad_column, grad_there, row - i * DY, height, gh, SY, TOTAL)
                            given += tap[None, :] * shifted
                        total += given * _load(input_row, input_there, column + k * DX, in_width, xw, TOTAL)
        tl.store(partial + (channel * (KEYS + 1) + part) * chunks + chunk, tl.sum(total, 0), mask=exists)


def affine_sums(
    grad: torch.Tensor,
    input: torch.Tensor,
    keys: torch.Tensor,
    key_index: torch.Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> torch.Tensor:
    """What ``depthwise.affine_sums`` gives, from one launch. Equal from call to call: nothing is added atomically."""
    channels, in_channels = grad.shape[1], input.shape[1]
    total = torch.promote_types(grad.dtype, torch.float32)
    if not grad.numel():
        return grad.new_zeros(channels, 1 + key_index.shape[1], dtype=total)
    last = input.stride(1) == 1 < input.stride(3)
    if last != (grad.stride(1) == 1 < grad.stride(3)):  # read across its layout it would cost more than a copy
        grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    keys, key_index = keys.contiguous(), key_index.contiguous()
    sizes = _blocks(grad.shape, input.shape[2], CHANNELS_LAST if last else PLANES)
    rows = max(32, 8 * sizes["ROWS"])
    chunks = triton.cdiv(grad.shape[0], sizes["IMAGES"]) * triton.cdiv(input.shape[2], rows)
    partial = grad.new_empty(channels, 1 + key_index.shape[1], chunks, dtype=total)
    wide = any(
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= WIDE for t in (grad, input, partial)
    )
    with torch.cuda.device_of(input):
        _sums[(chunks * triton.cdiv(channels, sizes["CHANNELS"]),)](
            grad,
            input,
            keys,
            key_index,
            partial,
            input.shape[0],
            channels,
            *input.shape[2:],
            *grad.shape[2:],
            *grad.stride(),
            *input.stride(),
            rows,
            channels // in_channels,
            *keys.shape[1:],
            *stride,
            *padding,
            *dilation,
            key_index.shape[1],
            TOTAL=tl.float64 if total == torch.float64 else tl.float32,
            INDEX=tl.int64 if wide else tl.int32,
            **sizes,
        )
    return partial.sum(2)


def _blocks(output: torch.Size, in_height: int, block: dict[str, int]) -> dict[str, Any]:
    """How a program's places are spread: over columns first, then rows that divide the height, then images."""
    columns = min(triton.next_power_of_2(output[3]), block["columns"])
    rows = min(in_height & -in_height, block["places"] // columns)
    images = min(block["places"] // (columns * rows), triton.next_power_of_2(output[0]))
    return {"IMAGES": images, "ROWS": rows, "COLUMNS": columns, "CHANNELS": block["channels"]}
