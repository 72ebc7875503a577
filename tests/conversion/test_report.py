"""The report against numbers computed by hand."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from compare import unchanged
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.conversion.record import CalibrationRecord, Record, entries_digest, write_record

BANK = mk.get_bank("babaiee2025")


def net():
    return nn.Sequential(
        nn.Conv2d(3, 40, 3),
        nn.Conv2d(40, 40, 7, groups=40),
        nn.BatchNorm2d(40),
        nn.Conv2d(40, 80, (1, 7), groups=40, bias=False),
        nn.Conv2d(80, 40, 1),
    )


def fit(kernel, keys):
    """R^2 and number of the best key by brute force: one least squares problem a key."""
    target = kernel.flatten().double().numpy()
    errors = []
    for key in keys.flatten(1).double().numpy():
        design = np.stack([key, np.ones_like(key)], 1)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        errors.append(((design @ solution - target) ** 2).sum())
    return 1 - min(errors) / ((target - target.mean()) ** 2).sum(), int(np.argmin(errors))


def check(row, fits):
    r2, indices = map(np.array, zip(*fits, strict=True))
    assert (row.channels, row.constant) == (len(fits), 0)
    figures = [row.mean_r2, row.median_r2, row.worst_r2, row.above_50, row.above_90]
    expected = [np.mean(r2), np.median(r2), np.min(r2), np.mean(r2 > 0.5), np.mean(r2 > 0.9)]
    assert figures == pytest.approx(expected, abs=1e-5)
    assert row.key_histogram == tuple(np.bincount(indices, minlength=8))


def test_against_hand_computation():
    model = net()
    with torch.no_grad():  # kernels near keys, so that the shares are neither 0 nor 1
        near = 0.3 * BANK.keys_for((7, 7)).repeat(5, 1, 1) * torch.linspace(-4, 4, 40)[:, None, None]
        model[1].weight.mul_(0.3).add_(near[:, None])
    report = mk.conversion_report(mk.convert_to_masterkeys(model))
    assert report.bank == "babaiee2025"
    rows = [(row.name, row.kernel_size, row.keys_per_kernel) for row in report.layers]
    assert rows == [("1", (7, 7), 1), ("3", (1, 7), 1)]
    everything = []
    for row in report.layers:
        keys, kept = BANK.keys_for(row.kernel_size), BANK.kept(row.kernel_size)
        fits = [fit(kernel, keys) for kernel in model.get_submodule(row.name).weight.detach()]
        fits = [(r2, kept[index]) for r2, index in fits]
        check(row, fits)
        everything += fits
    check(report.total, everything)
    assert 0 < report.layers[0].above_90 < report.layers[0].above_50 < 1
    strip = report.layers[1].key_histogram
    assert strip[2] == strip[5] == strip[7] == 0 < strip[6]  # three keys that a 1x7 strip does not have


def test_constant_kernels_are_counted_and_left_out():
    model, kept = net(), nn.Conv2d(25, 25, 7, groups=25)
    with torch.no_grad():
        model[1].weight[:10] = 0
        model[1].weight[10:15] = 0.7
        kept.weight.copy_(model[1].weight[15:])
    report = mk.conversion_report(mk.convert_to_masterkeys(model, keys_per_kernel=2))
    first, second = report.layers
    assert (first.constant, second.constant, report.total.constant) == (15, 0, 15)
    assert (first.channels, sum(first.key_histogram), sum(report.total.key_histogram)) == (40, 25, 105)
    rest = mk.conversion_report(mk.convert_to_masterkeys(kept, keys_per_kernel=2)).total
    for name in ("mean_r2", "median_r2", "worst_r2", "above_50", "above_90", "key_histogram"):
        assert getattr(first, name) == pytest.approx(getattr(rest, name), abs=1e-6), name
    assert "15 kernels are constant in the dense model" in str(report)

    with torch.no_grad():
        model[1].weight.fill_(0.5)
    row = mk.conversion_report(mk.convert_to_masterkeys(model)).layers[0]
    assert (row.constant, row.key_histogram) == (40, (0,) * 8)
    for figure in (row.mean_r2, row.median_r2, row.worst_r2, row.above_50, row.above_90, *row.coverage):
        assert math.isnan(figure)


@pytest.mark.parametrize(("r2", "scale", "constant", "random"), [(-2, 0, 5, 0), (-2, 0.3, 5, 0), (-1, 0, 0, 5)])
def test_marks_in_the_place_of_an_r2(r2, scale, constant, random):
    """A constant kernel stays one whatever calibration makes of its scale."""
    model = mk.convert_to_masterkeys(nn.Conv2d(9, 9, 7, groups=9))
    model.r2[:5], model.scale[:5] = r2, scale
    row = mk.conversion_report(model).total
    assert (row.constant, row.random, row.channels) == (constant, random, 9)
    assert row.mean_r2 == pytest.approx(float(model.r2[5:].mean()), abs=1e-6)


def test_a_kernel_no_key_fits_is_not_a_constant_one():
    bank, conv = torch.zeros(1, 3, 3), nn.Conv2d(2, 2, 3, groups=2)
    bank[0, 0, 0], bank[0, 0, 2] = 1, -1
    with torch.no_grad():
        conv.weight[0] = bank
        conv.weight[1] = bank[0].T  # shares no direction with the key
        conv.weight[1, 0, 0, 0] = 0
    row = mk.conversion_report(mk.convert_to_masterkeys(conv, bank)).layers[0]
    assert (row.constant, row.worst_r2, row.mean_r2) == (0, 0, pytest.approx(0.5))


@pytest.mark.parametrize(("trainable", "keys_per_kernel"), [("none", 3), ("shift", 1), ("affine", 3)])
def test_parameters_are_counted(trainable, keys_per_kernel):
    model = net()
    model[0].requires_grad_(False)
    converted = mk.convert_to_masterkeys(model, keys_per_kernel=keys_per_kernel, trainable=trainable)
    report = mk.conversion_report(converted)
    before, after = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, converted))
    assert (report.trainable_before, report.trainable_after) == (before, after)
    stock = sum(p.numel() for p in model.parameters())
    dense = 40 * 49 + 80 * 7
    compact = 8 * 49 + 5 * 7 + (40 + 80) * (2 * keys_per_kernel + 1)
    assert (report.stored_before, report.stored_after) == (stock, stock - dense + compact)
    left = 120 * {"none": 0, "shift": 1, "affine": 1 + keys_per_kernel}[trainable]
    assert before - after == dense - left


def test_table():
    model = timm.create_model("inception_next_atto", depths=(1, 1, 1, 1))
    report = mk.conversion_report(mk.convert_to_masterkeys(model, keys_per_kernel=2), model)
    assert [row.name for row in report.stages] == ["stages.0", "stages.1", "stages.2", "stages.3"]
    about, layers, coverage, operators, last = str(report).split("\n\n")
    assert about.startswith("R2: the share of a dense kernel's variance") and "k1 to k8" in about
    header, *rows = (re.split(r"  +", line) for line in layers.splitlines())
    assert header[:5] == ["layer", "kernel", "channels", "keys", "mean R2"]
    assert header[9:] == [f"k{i}" for i in range(1, 9)]
    for row, layer in zip(rows, (*report.layers, *report.stages, report.total), strict=True):
        empty = 0 if layer.kernel_size[0] else 2  # a stage has no kernel size and no number of keys
        figures = [f"{value:.3f}" for value in (layer.mean_r2, layer.median_r2, layer.worst_r2)]
        figures += [f"{value:.0%}" for value in (layer.above_50, layer.above_90)]
        assert row[0] == layer.name and row[4 - empty : 9 - empty] == figures
        assert [int(cell) for cell in row[9 - empty :]] == list(layer.key_histogram)
    assert rows[0][1:4] == ["3x3", str(report.layers[0].channels), "2"]
    assert coverage.splitlines()[1].split() == ["kernels", *(f"{value:.0%}" for value in report.total.coverage)]
    assert [line.split("  ")[0] for line in operators.splitlines()[2:]] == [row.operator for row in report.operators]
    assert sum(row.share for row in report.operators) == pytest.approx(1)
    assert last.startswith("bank babaiee2025; parameters: trainable ")
    assert f"stored {report.stored_before:,} -> {report.stored_after:,}" in last


def test_json():
    model = mk.convert_to_masterkeys(net())
    assert json.loads(mk.conversion_report(model).to_json())["calibration"] is None
    record = CalibrationRecord("regression", {"error": math.nan}, {"error": 0.5}, 9, 3, "tensor", "", {"torch": "2"})
    write_record(model, Record(calibration=replace(record, entries=entries_digest(model))))
    report = mk.conversion_report(model, net())
    data = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["total"]["mean_r2"] == report.total.mean_r2 and data["stored_after"] == report.stored_after
    for row, layer in zip(data["layers"], report.layers, strict=True):
        assert (row["name"], row["kernel_size"]) == (layer.name, list(layer.kernel_size))
        assert row["key_histogram"] == list(layer.key_histogram)
    calibration = {"before": {"error": None}, "after": {"error": 0.5}, "held_out": 3, "versions": {"torch": "2"}}
    assert data["calibration"].items() >= calibration.items()
    assert data["operators"][0]["upright"] is None


def test_several_banks_and_a_layer_used_twice():
    model = mk.convert_to_masterkeys(net(), include="1")
    mk.convert_to_masterkeys(model, mk.KeyBank("mine", BANK.keys[:3]), inplace=True)
    report = mk.conversion_report(model)
    assert report.bank == "babaiee2025, mine"
    assert {len(row.key_histogram) for row in (*report.layers, report.total)} == {8}
    once, twice = (mk.conversion_report(nn.Sequential(*[model[1]] * count)) for count in (1, 2))
    assert once == twice


def test_random_initialisation_has_no_fit():
    report = mk.conversion_report(mk.initialize_masterkeys(net()))
    assert report.total.random == sum(report.total.key_histogram) == 120
    assert math.isnan(report.total.mean_r2) and math.isnan(report.total.worst_r2)
    assert "120 kernels have keys of random initialisation" in str(report) and "nan" not in str(report)
    assert json.loads(report.to_json())["total"]["mean_r2"] is None


def test_the_model_is_not_changed():
    model = mk.convert_to_masterkeys(net()).half()
    with unchanged(model):
        mk.conversion_report(model)


LAZY = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("model", "dense", "message"),
    [
        (net(), None, r"holds no MasterKeyConv2d.*convert_to_masterkeys"),
        (mk.convert_to_masterkeys(net()), nn.Identity(), "no convolution '1'"),
        (mk.convert_to_masterkeys(net().to("meta")), None, r"meta device.*Load weights"),
        (mk.convert_to_masterkeys(LAZY), None, r"lazy layers.*Run it"),
    ],
)
def test_errors(model, dense, message):
    with pytest.raises(mk.ConversionError, match=message):
        mk.conversion_report(model, dense)
