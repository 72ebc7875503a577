"""open_clip: a CLIP with a ConvNeXt as its image tower."""

import pytest
import torch
from tiny import damaged, layers, lively, mended, photographs
from torch import nn

import timm_masterkeys as mk

open_clip = pytest.importorskip("open_clip")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]


class Towers(nn.Module):
    """So that a CLIP can see images in training mode."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images):
        return self.clip.encode_image(images)


@pytest.fixture
def clip():
    vision = open_clip.CLIPVisionCfg(
        timm_model_name="test_convnext", timm_model_pretrained=False, timm_pool="", timm_proj="linear", image_size=64
    )
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    return lively(Towers(open_clip.CLIP(16, vision, text)), photographs(40, 64)).clip


@pytest.mark.parametrize("part", ["whole", "tower"])
def test_its_image_tower_is_judged_as_an_embedding(clip, part):
    x = photographs(40, 64)
    model = damaged(mk.convert_to_masterkeys(clip))
    assert len(layers(model)) == 9
    one, other = (model, clip) if part == "whole" else (model.visual, clip.visual)
    report = mk.calibrate_masterkeys(one, other, x)
    assert report.record.metric == "embedding" and mended(report, "relative error")
    assert report.after["correlation"] > report.before["correlation"]
    fused = mk.fuse_masterkeys(model)
    assert torch.equal(fused.encode_image(x[:2]), model.encode_image(x[:2]))
    text = torch.randint(64, (2, 8))
    assert torch.equal(model.encode_text(text), clip.encode_text(text))


def test_its_state_dict_comes_back(clip):
    model = mk.convert_to_masterkeys(clip)
    again = mk.convert_to_masterkeys(clip)
    damaged(again).load_state_dict(model.state_dict())
    x = photographs(40, 64)[:2]
    assert torch.equal(again.encode_image(x), model.encode_image(x))
