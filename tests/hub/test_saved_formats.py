"""Saved models of every format there was: this version loads them bit for bit. ``data/make_saved.py`` made them."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_masterkeys as mk
from timm_masterkeys.conversion.config import LayerSettings
from timm_masterkeys.conversion.plan import converted_layers
from timm_masterkeys.conversion.record import Source, read_record

DATA = Path(__file__).parent / "data"


@pytest.fixture
def expected():
    return load_file(DATA / "saved_1.safetensors")


def test_format_1(expected):
    x, out = expected.pop("x"), expected.pop("out")
    model = timm.create_model(f"local-dir:{DATA / 'saved_1'}", pretrained=True).eval()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[n].dtype == expected[n].dtype and torch.equal(state[n], expected[n]) for n in expected)
    with torch.no_grad():
        assert torch.allclose(model(x), out, rtol=1e-4, atol=1e-5)  # convolutions differ between versions of torch

    settings = map(LayerSettings.from_layer, converted_layers(model).values())
    assert [(s.bank.name, s.keys_per_kernel, s.trainable, s.sigmas) for s in settings] == [
        ("babaiee2025", 1, "shift", False),
        ("mine", 2, "affine", False),
        ("scale-space-b", 1, "sigmas", True),  # "scales" in the file
        ("babaiee2025", 3, "none", False),
    ]
    record = read_record(model)
    assert record.source == Source("me/dense", license="mit", license_given=True)
    assert [config.include for config in record.conversions] == [("stages.0.*",), ("stages.1.*",), ("stages.2.*",), ()]
    assert (record.calibration.images, record.calibration.held_out, record.calibration.origin) == (10, 2, "tensor")
    assert record.calibration.after.keys() == {"agreement", "divergence"}
    assert model.pretrained_cfg["license"] == "mit" and model.pretrained_cfg["label_names"] == list("abcde")


def test_format_1_compact_file(expected):
    dense = timm.create_model("test_convnext3", dims=(8, 8, 16, 16), num_classes=5)
    dense.load_state_dict(load_file(DATA / "saved_1" / "model.safetensors"))
    mk.load_compact(dense, DATA / "saved_1" / "masterkeys.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in dense.state_dict().items())
