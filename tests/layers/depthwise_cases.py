"""Depthwise layers of every geometry, and the same output through autograd's own convolution."""

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.func import functional_call

from timm_masterkeys import MasterKeyConv2d

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

GEOMETRIES = {  # kernel, stride, padding, dilation, multiplier, bias
    "3x3": (3, 1, 1, 1, 1, True),
    "stride": (3, 2, 1, 1, 1, False),
    "SAME": (3, 2, "SAME", 1, 1, True),
    "dilation, multiplier": (3, 1, 2, 2, 2, True),
    "strip": ((1, 5), 1, (0, 2), 1, 1, True),
    "2x2, stride 2": (2, 2, 0, 1, 1, True),
    "even, string": (2, 1, "same", 1, 1, True),
    "4x4, string, multiplier": (4, 1, "same", 1, 2, False),
    "valid": (3, 1, "valid", 1, 1, True),
    "7x7": (7, 1, 3, 1, 1, True),
}


def make(geometry, keys_per_kernel=1, trainable="shift", channels=2, dtype=torch.float64, padding_mode="zeros"):
    kernel, stride, padding, dilation, multiplier, bias = GEOMETRIES[geometry]
    torch.manual_seed(0)
    same = padding == "SAME"
    conv = (Conv2dSame if same else nn.Conv2d)(
        channels,
        channels * multiplier,
        kernel,
        stride,
        0 if same else padding,
        dilation,
        channels,
        bias,
    )
    conv.padding_mode = padding_mode
    return MasterKeyConv2d.from_conv(conv.to(dtype), keys_per_kernel=keys_per_kernel, trainable=trainable)


def as_function(layer):
    """The layer as a function of its input and parameters, for gradcheck."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *values: functional_call(layer, dict(zip(names, values, strict=True)), (x,))


def plain(layer, x):
    """The same output through autograd's own convolution."""
    padding = layer.padding
    if layer.same_padding:
        x, padding = pad_same(x, layer.kernel_size, layer.stride, layer.dilation), 0
    return F.conv2d(x, layer.compose_weight(), layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def gradients(layer, x, run=None):
    """By ``run`` (the layer) and by autograd through an ordinary convolution, for one random output gradient."""
    run, inputs = layer if run is None else run, [x, *layer.parameters()]
    out, expected = run(x), plain(layer, x)
    weights = torch.randn_like(expected)
    return [torch.autograd.grad((result * weights).sum(), inputs) for result in (out, expected)]


def assert_gradients(layer, x, tolerance, run=None):
    for a, b in zip(*gradients(layer, x, run), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
