"""Convolutions of every geometry, and comparisons of layers, for the tests of layers."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from timm_masterkeys import MasterKeyConv2d, SigmaKeyConv2d, get_bank

BANK = get_bank("babaiee2025")
COMPACT = {"keys", "key_index", "scale", "shift", "r2"}

# name -> (class, channel multiplier, arguments of the convolution)
GEOMETRY = {
    "3x3": (nn.Conv2d, 1, {"kernel_size": 3, "padding": 1}),
    "5x5 stride 2": (nn.Conv2d, 1, {"kernel_size": 5, "padding": 2, "stride": 2}),
    "7x7 unpadded": (nn.Conv2d, 1, {"kernel_size": 7}),
    "9x9": (nn.Conv2d, 1, {"kernel_size": 9, "padding": 4}),
    "11x11": (nn.Conv2d, 1, {"kernel_size": 11, "padding": 5}),
    "13x13": (nn.Conv2d, 1, {"kernel_size": 13, "padding": 6}),
    "1x7": (nn.Conv2d, 1, {"kernel_size": (1, 7), "padding": (0, 3)}),
    "7x1": (nn.Conv2d, 1, {"kernel_size": (7, 1), "padding": (3, 0), "stride": (2, 1)}),
    "1x11": (nn.Conv2d, 1, {"kernel_size": (1, 11), "padding": (0, 5)}),
    "2x2": (nn.Conv2d, 1, {"kernel_size": 2, "stride": 2}),
    "4x4": (nn.Conv2d, 1, {"kernel_size": 4, "padding": (1, 2)}),
    "dilated": (nn.Conv2d, 1, {"kernel_size": 5, "dilation": 2, "padding": 4}),
    "dilated, stride 2": (nn.Conv2d, 1, {"kernel_size": 3, "dilation": 2, "padding": 2, "stride": 2}),
    "multiplier 2": (nn.Conv2d, 2, {"kernel_size": 7, "padding": 3}),
    "multiplier 2, stride 2": (nn.Conv2d, 2, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "same": (nn.Conv2d, 1, {"kernel_size": 7, "padding": "same"}),
    "same, even": (nn.Conv2d, 1, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, 1, {"kernel_size": 5, "padding": "valid", "stride": 2}),
    "reflect": (nn.Conv2d, 1, {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"}),
    "circular": (nn.Conv2d, 1, {"kernel_size": 5, "padding": (2, 1), "padding_mode": "circular"}),
    "circular same": (nn.Conv2d, 1, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "Conv2dSame": (Conv2dSame, 1, {"kernel_size": 3, "stride": 2}),
    "Conv2dSame 5x5 dilated": (Conv2dSame, 1, {"kernel_size": 5, "dilation": 2}),
    "Conv2dSame multiplier 2": (Conv2dSame, 2, {"kernel_size": 5, "stride": (2, 1)}),
    "Conv2dSame 2x2": (Conv2dSame, 1, {"kernel_size": 2}),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRY)


def make_conv(geometry, channels=8, bias=True, dtype=None):
    cls, multiplier, kwargs = GEOMETRY[geometry]
    return cls(channels, channels * multiplier, groups=channels, bias=bias, dtype=dtype, **kwargs)


def dense(layer, conv):
    """The oracle: the original class of convolution with the composed kernels."""
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(layer.weight.detach())
    return conv


def formula(layer, scale, shift):
    """The kernels, written down independently of the layer."""
    scale = scale.view(layer.out_channels, layer.keys_per_kernel, 1, 1)
    kernels = (scale * layer.keys[layer.key_rows()]).sum(1) + shift.view(-1, 1, 1)
    return kernels.unsqueeze(1)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(state, other):
    return state.keys() == other.keys() and all(
        state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in state
    )


def assert_fitted(layer, projection):
    assert torch.equal(layer.key_rows(), projection.key_index)
    assert torch.equal(layer.scale, projection.scale.flatten())
    assert torch.equal(layer.shift, projection.shift)
    assert torch.equal(layer.r2, projection.r2) and layer.r2.dtype == torch.float32


def kind_and_bank(trainable):
    return (SigmaKeyConv2d, "scale-space-b") if trainable == "sigmas" else (MasterKeyConv2d, BANK)


TRAINED = {"none": set(), "shift": {"shift"}, "affine": {"scale", "shift"}}
trainables = pytest.mark.parametrize("trainable", TRAINED)
