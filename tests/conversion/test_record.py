"""What is known of a converted model, and for how long it is true."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from compare import layers
from timm.utils import ModelEmaV3
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.conversion.record import (
    CalibrationRecord,
    Record,
    Source,
    entries_digest,
    keys_digest,
    read_record,
    structure_digest,
    write_record,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 8, 5, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))


@pytest.fixture
def model():
    """A converted model with a source and a calibration."""
    model = mk.convert_to_masterkeys(net())
    figures = {"agreement": 0.2, "divergence": 2.0}, {"agreement": 0.75, "divergence": 0.5}
    calibration = CalibrationRecord("classification", *figures, 100, 20, "builtin", "2026-11-29", {})
    calibration = replace(calibration, entries=entries_digest(model))
    source = Source("timm/net.in1k", None, "0" * 64, "apache-2.0")
    write_record(model, replace(read_record(model), source=source, calibration=calibration))
    return model


def holds(model):
    record = read_record(model)
    return record.source is not None, record.calibration is not None


def test_claims_hold_for_the_weights_they_are_of(model):
    assert holds(model) == (True, True)
    assert holds(copy.deepcopy(model)) == holds(pickle.loads(pickle.dumps(model))) == (True, True)
    assert holds(ModelEmaV3(model).module) == holds(model.to(memory_format=torch.channels_last)) == (True, True)
    with torch.no_grad():
        model[2].bias[0] += 1  # training
    assert holds(model) == (True, False)
    with torch.no_grad():
        model[2].bias[0] -= 1
        model[0].key_index[0] = (model[0].key_index[0] + 1) % 8  # other kernels
    assert holds(model) == (False, False)


def test_other_weights_end_them(model):
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(net(5).state_dict())
    assert holds(model) == (False, False)
    model.load_state_dict(state)
    assert holds(model) == (True, True)
    assert holds(model.half()) == (True, False)


def test_fused_and_converted_again_nothing_is_known(model):
    dense = mk.fuse_masterkeys(model)
    assert not hasattr(dense, "masterkeys") and read_record(dense) == Record()
    assert holds(mk.convert_to_masterkeys(dense)) == (False, False)


@pytest.mark.parametrize("changed", [False, True])
def test_a_second_conversion_is_of_the_same_source(changed):
    """Unless other weights were loaded between."""
    model = mk.convert_to_masterkeys(nn.Sequential(net(), net()), include="0.0")
    write_record(model, replace(read_record(model), source=Source("somewhere")))
    if changed:
        model.load_state_dict(nn.Sequential(net(5), net(5)).state_dict())
    model = mk.convert_to_masterkeys(model, keys_per_kernel=2)
    record = read_record(model)
    assert record.source == (None if changed else Source("somewhere"))
    assert [config.keys_per_kernel for config in record.conversions] == [1, 2]


def test_an_attribute_of_the_same_name_is_not_lost():
    model = net()
    model.masterkeys = "mine"
    with pytest.raises(mk.ConversionError, match="'masterkeys' of its own"):
        mk.convert_to_masterkeys(model, inplace=True)
    assert type(model[0]) is nn.Conv2d
    outer, part = nn.Sequential(model), nn.Sequential(mk.convert_to_masterkeys(net()))
    part.masterkeys = "mine"
    with pytest.raises(mk.ConversionError, match="'masterkeys' of its own"):
        mk.calibrate_masterkeys(part, outer, torch.randn(10, 8, 8, 8))
    assert part.masterkeys == "mine"
    assert mk.fuse_masterkeys(mk.convert_to_masterkeys(outer))[0].masterkeys == "mine"


def test_the_same_after_json(model):
    record = read_record(model)
    data = json.loads(json.dumps(record.to_dict()))
    assert Source(**data["source"]) == record.source
    assert CalibrationRecord(**data["calibration"]) == record.calibration


def test_the_summary_of_a_calibration(model):
    summary = read_record(model).calibration.summary()
    assert summary.startswith("with 80 images") and summary.endswith("(classification, 20 held-out images)")


def test_digests_see_every_value(model):
    keys, entries = keys_digest(layers(model)), entries_digest(model)
    for name, value in model.state_dict().items():
        last = value.view(-1)[-1:]
        before = last.clone()
        last.add_(1)
        assert entries_digest(model) != entries, name
        assert (keys_digest(layers(model)) != keys) == name.endswith("key_index"), name
        last.copy_(before)
    assert (keys_digest(layers(model)), entries_digest(model)) == (keys, entries)


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("test_efficientnet", {"output_stride": 8}),  # strides and dilations of converted layers alone
        ("test_mambaout", {"global_pool": ""}),
        ("pvt_v2_b0", {"global_pool": ""}),
    ],
)
def test_another_structure_with_the_same_entries(arch, arguments):
    with torch.device("meta"):
        model, other = (mk.convert_to_masterkeys(timm.create_model(arch, **given)) for given in ({}, arguments))
    assert structure_digest(model) != structure_digest(other)
    assert entries_digest(model) == entries_digest(other)
    before = structure_digest(model)
    for layer in layers(model).values():
        layer.set_trainable("affine")
    assert structure_digest(model.train()) == before


def test_a_quantised_model_has_no_calibration(model):
    class Int8Tensor(torch.Tensor):
        pass

    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Int8Tensor))
    assert holds(model) == (True, False) and mk.conversion_report(model).calibration is None
    assert entries_digest(model) == "2.weight is of type Int8Tensor"
