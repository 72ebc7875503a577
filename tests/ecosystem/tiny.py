"""Tiny networks of other libraries that behave as trained ones do: outputs vary with the image, kernels matter."""

from functools import lru_cache

import torch
from torch import nn

import timm_masterkeys as mk


def lively(model, images):
    """The network with weights of a usual size and the statistics of some images, in eval mode.

    Its depthwise kernels are keys, so that conversion changes nothing, see ``damaged``.
    """
    keys = mk.get_bank()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of all images seen
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if hasattr(module, "gamma"):  # of ConvNeXt: near 0 before training, which hides the depthwise layers
                nn.init.ones_(module.gamma)
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                taps = keys.keys_for(module.kernel_size).float()
                module.weight.copy_(taps[torch.randint(len(taps), (len(module.weight), 1))])
        model.train()(images)
    return model.eval()


@torch.no_grad()
def damaged(model):
    """A converted network of which calibration has something to mend. In place."""
    for layer in layers(model):
        layer.scale.mul_(torch.empty_like(layer.scale).uniform_(0.3, 0.6))
        layer.shift.add_(0.1)
    return model


@lru_cache
def photographs(count=60, size=32):
    """Crops of the photographs that ship: noise would look all the same to a network."""
    return mk.builtin_images(nn.Identity(), count, mean=[0.5] * 3, std=[0.25] * 3, size=size)


def layers(model):
    """The converted layers."""
    return [module for module in model.modules() if isinstance(module, mk.MasterKeyConv2d)]


def mended(report, figure):
    """Whether calibration brought a figure that was not 0 near to 0."""
    return report.before[figure] > 1e-4 and report.after[figure] < 0.1 * report.before[figure]
