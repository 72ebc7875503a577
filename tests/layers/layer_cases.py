"""Convolutions and layers of every geometry; their kernels, outputs and gradients computed in another way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.func import functional_call

from timm_masterkeys import MasterKeyConv2d, SigmaKeyConv2d, get_bank

BANK = get_bank("babaiee2025")
COMPACT = {"keys", "key_index", "scale", "shift", "r2"}

# name -> (class, channel multiplier, arguments of the convolution)
GEOMETRY = {
    "3x3": (nn.Conv2d, 1, {"kernel_size": 3, "padding": 1}),
    "3x3 stride 2": (nn.Conv2d, 1, {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}),
    "5x5 stride 2": (nn.Conv2d, 1, {"kernel_size": 5, "padding": 2, "stride": 2}),
    "7x7": (nn.Conv2d, 1, {"kernel_size": 7, "padding": 3}),
    "7x7 unpadded": (nn.Conv2d, 1, {"kernel_size": 7}),
    "9x9": (nn.Conv2d, 1, {"kernel_size": 9, "padding": 4}),
    "11x11": (nn.Conv2d, 1, {"kernel_size": 11, "padding": 5}),
    "13x13": (nn.Conv2d, 1, {"kernel_size": 13, "padding": 6}),
    "1x5": (nn.Conv2d, 1, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "1x7": (nn.Conv2d, 1, {"kernel_size": (1, 7), "padding": (0, 3)}),
    "7x1": (nn.Conv2d, 1, {"kernel_size": (7, 1), "padding": (3, 0), "stride": (2, 1)}),
    "1x11": (nn.Conv2d, 1, {"kernel_size": (1, 11), "padding": (0, 5)}),
    "2x2": (nn.Conv2d, 1, {"kernel_size": 2, "stride": 2}),
    "4x4": (nn.Conv2d, 1, {"kernel_size": 4, "padding": (1, 2)}),
    "dilated": (nn.Conv2d, 1, {"kernel_size": 5, "dilation": 2, "padding": 4}),
    "dilated, stride 2": (nn.Conv2d, 1, {"kernel_size": 3, "dilation": 2, "padding": 2, "stride": 2}),
    "dilated, multiplier 2": (nn.Conv2d, 2, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    "multiplier 2": (nn.Conv2d, 2, {"kernel_size": 7, "padding": 3}),
    "multiplier 2, stride 2": (nn.Conv2d, 2, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "same": (nn.Conv2d, 1, {"kernel_size": 7, "padding": "same"}),
    "same, 2x2": (nn.Conv2d, 1, {"kernel_size": 2, "padding": "same"}),
    "same, 4x4, multiplier 2": (nn.Conv2d, 2, {"kernel_size": 4, "padding": "same", "bias": False}),
    "same, even": (nn.Conv2d, 1, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, 1, {"kernel_size": 3, "padding": "valid"}),
    "valid, stride 2": (nn.Conv2d, 1, {"kernel_size": 5, "padding": "valid", "stride": 2}),
    "reflect": (nn.Conv2d, 1, {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, 1, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, 1, {"kernel_size": 5, "padding": (2, 1), "padding_mode": "circular"}),
    "circular same": (nn.Conv2d, 1, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "Conv2dSame": (Conv2dSame, 1, {"kernel_size": 3, "stride": 2}),
    "Conv2dSame 5x5 dilated": (Conv2dSame, 1, {"kernel_size": 5, "dilation": 2}),
    "Conv2dSame multiplier 2": (Conv2dSame, 2, {"kernel_size": 5, "stride": (2, 1)}),
    "Conv2dSame 2x2": (Conv2dSame, 1, {"kernel_size": 2}),
}
# Those for gradients: of small kernels, and one of the size that goes another way.
SMALL = ["3x3", "3x3 stride 2", "Conv2dSame", "dilated, multiplier 2", "1x5", "2x2", "same, 2x2"]
SMALL += ["same, 4x4, multiplier 2", "valid", "7x7"]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
geometries = pytest.mark.parametrize("geometry", GEOMETRY)


def make_conv(geometry, channels=8, bias=True, dtype=None):
    cls, multiplier, kwargs = GEOMETRY[geometry]
    return cls(channels, channels * multiplier, groups=channels, dtype=dtype, **{"bias": bias, **kwargs})


def make(geometry, keys_per_kernel=1, trainable="shift", channels=2, dtype=torch.float64):
    torch.manual_seed(0)
    conv = make_conv(geometry, channels, dtype=dtype)
    return MasterKeyConv2d.from_conv(conv, keys_per_kernel=keys_per_kernel, trainable=trainable)


def dense(layer, conv):
    """The oracle: the original class of convolution with the composed kernels."""
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(layer.weight.detach())
    return conv


def assert_fitted(layer, projection):
    assert torch.equal(layer.key_rows(), projection.key_index)
    assert torch.equal(layer.scale, projection.scale.flatten())
    assert torch.equal(layer.shift, projection.shift)
    assert torch.equal(layer.r2, projection.r2) and layer.r2.dtype == torch.float32


def kind_and_bank(trainable):
    return (SigmaKeyConv2d, "scale-space-b") if trainable == "sigmas" else (MasterKeyConv2d, BANK)


TRAINED = {"none": set(), "shift": {"shift"}, "affine": {"scale", "shift"}}


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


def assert_vmapped_gradients(layer, x):
    """Of the shift, for a stack of batches at once, against one after the other."""
    f = as_function(layer)
    gradient = torch.func.grad(lambda x, bias, shift: f(x, bias, shift).square().sum(), argnums=2)
    got = torch.func.vmap(gradient, (0, None, None))(x, layer.bias, layer.shift)
    expected = [torch.autograd.grad(plain(layer, one).square().sum(), layer.shift)[0] for one in x]
    torch.testing.assert_close(got, torch.stack(expected))
