"""segmentation-models-pytorch: a Unet with depthwise convolutions in its encoder."""

import pytest
import torch
from tiny import damaged, layers, lively, mended, photographs

import timm_masterkeys as mk

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

ENCODERS = {"tu-mobilenetv3_small_050": 11, "mobilenet_v2": 17}  # timm's and its own, with their depthwise convolutions


def unet(encoder="tu-mobilenetv3_small_050", classes=4):
    small = {"decoder_channels": (32, 16, 16, 8, 8), "encoder_weights": None}
    return lively(smp.Unet(encoder, classes=classes, **small), photographs(40, 64))


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_it_is_calibrated_by_position(encoder):
    dense = unet(encoder)
    model = damaged(mk.convert_to_masterkeys(dense))
    assert len(layers(model)) == ENCODERS[encoder]
    batches = [{"image": part, "mask": part} for part in photographs(40, 64).split(8)]
    report = mk.calibrate_masterkeys(model, dense, batches)
    assert report.record.metric == "dense prediction" and mended(report, "divergence")
    assert report.after["agreement"] > report.before["agreement"] and "sure positions" in report.after
    x = photographs(40, 64)[:2]
    assert torch.equal(mk.fuse_masterkeys(model)(x), model(x))


def test_one_class_is_a_regression():
    dense = unet(classes=1)
    report = mk.calibrate_masterkeys(damaged(mk.convert_to_masterkeys(dense)), dense, photographs(40, 64))
    assert report.record.metric == "regression" and mended(report, "relative error")


def test_a_folder_is_prepared_for_as_told_or_as_its_timm_encoder_is(tmp_path):
    """An encoder from timm comes without the cfg of its weights where it is not pretrained: then it is asked for."""
    dense = unet("mobilenet_v2")
    model = mk.convert_to_masterkeys(dense)
    with pytest.raises(mk.CalibrationError, match="mean=, std=, size="):
        mk.calibrate_masterkeys(model, dense, "builtin")
    how = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "size": 64}
    report = mk.calibrate_masterkeys(model, dense, "builtin", max_images=16, stages="norms", **how)
    assert report.record.origin == "builtin"


def test_its_own_files_hold_fused_networks(tmp_path):
    model = mk.convert_to_masterkeys(unet())
    x = photographs(40, 64)[:2]
    mk.fuse_masterkeys(model).save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(mk.convert_to_masterkeys(loaded)(x), model(x), rtol=1e-3, atol=1e-3)


def test_its_own_files_of_a_converted_network_are_refused_by_the_dense_one(tmp_path):
    model = mk.convert_to_masterkeys(unet())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_dw\.weight"):
        smp.from_pretrained(tmp_path)
