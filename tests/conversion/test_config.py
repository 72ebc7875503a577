"""The description of a conversion: checked once, and the same after a way through JSON."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys import MasterKeysConfig
from timm_masterkeys.conversion.config import LayerSettings
from timm_masterkeys.conversion.plan import resolve

DESCRIPTIONS = [
    {},
    {"bank": "random8:3", "keys_per_kernel": 3, "trainable": "affine"},
    {"bank": "scale-space-b", "trainable": "sigmas"},
    {"include": "stages.0.*", "exclude": ["*.1.conv_dw", "head*"]},
    {"agreement": 0.95, "trainable": "none"},
    {"bank": torch.arange(50.0).sin().view(2, 5, 5), "keys_per_kernel": 2},
]


@pytest.mark.parametrize("given", DESCRIPTIONS, ids=str)
def test_the_same_after_json(given):
    config = MasterKeysConfig(**given)
    data = json.loads(json.dumps(config.to_dict()))
    again = MasterKeysConfig.from_dict(data, [config.bank] if config.bank.name.startswith("custom") else [])
    assert again == config and hash(again) == hash(config) and again.bank.digest == config.bank.digest
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert all(config != MasterKeysConfig(**other) for other in DESCRIPTIONS if other is not given)


def test_a_bank_that_is_not_the_one_described():
    data = MasterKeysConfig(torch.arange(50.0).sin().view(2, 5, 5)).to_dict()
    with pytest.raises(mk.BankError, match="Unknown bank 'custom-"):
        MasterKeysConfig.from_dict(data)
    data["bank"] = {"name": "random8:2", "digest": "0" * 64}
    with pytest.raises(mk.CheckpointError, match="'random8:2' is not the one described"):
        MasterKeysConfig.from_dict(data)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bank": "nope"}, mk.BankError, "'nope'"),
        ({"keys_per_kernel": 9}, mk.ProjectionError, "keys_per_kernel is 9"),
        ({"trainable": "all"}, mk.ConversionError, "trainable is 'all'"),
        ({"trainable": "sigmas"}, mk.ConversionError, "'babaiee2025' has no sigmas"),
        ({"include": [3]}, mk.ConversionError, r"include is \[3\], expected a pattern"),
        ({"agreement": 95}, mk.ConversionError, "agreement is 95, expected more than 0, at most 1"),
        ({"agreement": True}, mk.ConversionError, "agreement is True"),
        ({"agreement": 0.9, "keys_per_kernel": 2}, mk.ConversionError, "drop keys_per_kernel"),
        ({"agreement": 0.9, "bank": "scale-space-a", "trainable": "sigmas"}, mk.ConversionError, "one key per kernel"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(given, error, message):
    with pytest.raises(error, match=message):
        MasterKeysConfig(**given)


def test_resolved_against_a_model():
    model = nn.ModuleDict(
        {"a": nn.Conv2d(4, 4, 3, groups=4), "b": nn.Conv2d(4, 8, 3), "c": nn.Conv2d(4, 4, 5, groups=4)}
    )
    config = MasterKeysConfig(keys_per_kernel=2, exclude="c")
    plan = resolve(config, model)
    assert plan.config == config and plan.settings == {"a": LayerSettings(config.bank, 2, "shift")}
    assert [layer.reason for layer in plan.layers] == ["", "not depthwise (groups 1)", "excluded by 'c'"]


@pytest.mark.parametrize("given", DESCRIPTIONS[:3])
def test_the_settings_of_a_converted_model(given):
    config = MasterKeysConfig(**given)
    model = mk.convert_to_masterkeys(nn.Sequential(nn.Conv2d(4, 4, 7, groups=4)), **given)
    banks = {config.bank.digest: config.bank}
    settings = LayerSettings.from_layer(model[0])
    assert settings == config.layer_settings
    assert LayerSettings.from_dict(json.loads(json.dumps(settings.to_dict())), banks) == settings
