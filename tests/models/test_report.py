"""The report against numbers computed by hand."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_masterkeys import (
    ConversionError,
    conversion_report,
    convert_to_masterkeys,
    fuse_masterkeys,
    get_bank,
    initialize_masterkeys,
)

BANK = get_bank("babaiee2025")


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


def check(row, r2, indices, channels, constant=0):
    assert (row.channels, row.constant) == (channels, constant)
    assert row.mean_r2 == pytest.approx(np.mean(r2), abs=1e-5)
    assert row.median_r2 == pytest.approx(np.median(r2), abs=1e-5)
    assert row.worst_r2 == pytest.approx(np.min(r2), abs=1e-5)
    assert row.above_50 == pytest.approx(np.mean(np.array(r2) > 0.5))
    assert row.above_90 == pytest.approx(np.mean(np.array(r2) > 0.9))
    assert row.key_histogram == tuple(np.bincount(indices, minlength=8))


def test_against_hand_computation():
    model = net()
    with torch.no_grad():  # kernels near keys, so that the shares are neither 0 nor 1
        near = 0.3 * BANK.keys_for((7, 7)).repeat(5, 1, 1) * torch.linspace(-4, 4, 40)[:, None, None]
        model[1].weight.mul_(0.3).add_(near[:, None])
    report = conversion_report(convert_to_masterkeys(model))
    assert report.bank == "babaiee2025"
    assert [row.name for row in report.layers] == ["1", "3"]
    assert [row.kernel_size for row in report.layers] == [(7, 7), (1, 7)]
    assert [row.keys_per_kernel for row in report.layers] == [1, 1]
    everything = []
    for row in report.layers:
        kernels = model.get_submodule(row.name).weight.detach()
        kept = BANK.kept(row.kernel_size)
        fits = [fit(kernel, BANK.keys_for(row.kernel_size)) for kernel in kernels]
        fits = [(r2, kept[index]) for r2, index in fits]
        check(row, *zip(*fits, strict=True), channels=len(kernels))
        everything += fits
    check(report.total, *zip(*everything, strict=True), channels=120)
    assert 0 < report.layers[0].above_90 < report.layers[0].above_50 < 1
    strip = report.layers[1].key_histogram
    assert strip[2] == strip[5] == strip[7] == 0  # the keys a 1x7 strip does not have
    assert strip[6] > 0


def test_keys_of_a_strip_are_counted_by_their_index_in_the_bank():
    conv = nn.Conv2d(5, 5, (1, 7), groups=5)
    with torch.no_grad():
        conv.weight.copy_(-2 * BANK.keys_for((1, 7))[:, None] + 3)
    report = conversion_report(convert_to_masterkeys(conv))
    assert report.layers[0].key_histogram == (1, 1, 0, 1, 1, 0, 1, 0)
    assert report.total.mean_r2 == pytest.approx(1)
    assert report.layers[0].name == ""


def test_constant_kernels_are_counted_and_left_out():
    model = net()
    with torch.no_grad():
        model[1].weight[:10] = 0
        model[1].weight[10:15] = 0.7
    report = conversion_report(convert_to_masterkeys(model, keys_per_kernel=2))
    first, second = report.layers
    assert (first.constant, second.constant, report.total.constant) == (15, 0, 15)
    assert (first.channels, sum(first.key_histogram), sum(report.total.key_histogram)) == (40, 25, 105)
    whole = conversion_report(convert_to_masterkeys(nn.Sequential(model[1]), keys_per_kernel=2)).total
    with torch.no_grad():
        rest = nn.Conv2d(25, 25, 7, groups=25)
        rest.weight.copy_(model[1].weight[15:])
    shaped = conversion_report(convert_to_masterkeys(rest, keys_per_kernel=2)).total
    for name in ("mean_r2", "median_r2", "worst_r2", "above_50", "above_90", "key_histogram"):
        assert getattr(whole, name) == pytest.approx(getattr(shaped, name), abs=1e-6), name
    assert "15 kernels are constant" in str(report)

    with torch.no_grad():
        model[1].weight.fill_(0.5)
    row = conversion_report(convert_to_masterkeys(model)).layers[0]
    assert (row.constant, row.mean_r2, row.worst_r2, row.key_histogram) == (40, 1, 1, (0,) * 8)


def test_a_kernel_no_key_meets_is_not_a_constant_one():
    bank = torch.zeros(1, 3, 3)
    bank[0, 0, 0], bank[0, 0, 2] = 1, -1
    conv = nn.Conv2d(2, 2, 3, groups=2)
    with torch.no_grad():
        conv.weight[0] = bank
        conv.weight[1] = bank[0].T  # shares no direction with the key
        conv.weight[1, 0, 0, 0] = 0
    row = conversion_report(convert_to_masterkeys(conv, bank)).layers[0]
    assert row.constant == 0
    assert row.worst_r2 == 0
    assert row.mean_r2 == pytest.approx(0.5)


@pytest.mark.parametrize("trainable", ["none", "shift", "affine"])
@pytest.mark.parametrize("keys_per_kernel", [1, 3])
def test_parameters_are_counted(trainable, keys_per_kernel):
    model = net()
    model[0].requires_grad_(False)
    converted = convert_to_masterkeys(model, keys_per_kernel=keys_per_kernel, trainable=trainable)
    report = conversion_report(converted)

    def trained(m):
        return sum(p.numel() for p in m.parameters() if p.requires_grad)

    assert report.trainable_before == trained(model)
    assert report.trainable_after == trained(converted)
    stock = sum(p.numel() for p in model.parameters())
    assert report.stored_before == stock
    dense = 40 * 49 + 80 * 7
    compact = 8 * 49 + 5 * 7 + (40 + 80) * (2 * keys_per_kernel + 1)
    assert report.stored_after == stock - dense + compact
    left = 120 * {"none": 0, "shift": 1, "affine": 1 + keys_per_kernel}[trainable]
    assert report.trainable_before - report.trainable_after == dense - left


def test_parameters_of_a_timm_model():
    model = timm.create_model("convnext_atto")
    converted = convert_to_masterkeys(model)
    report = conversion_report(converted)
    assert report.trainable_before == report.stored_before == sum(p.numel() for p in model.parameters())
    assert report.trainable_after == sum(p.numel() for p in converted.parameters())
    layers = {name.rpartition(".")[0] for name in converted.state_dict() if name.endswith("key_index")}
    stored = dict(converted.named_parameters()) | {
        name: value
        for name, value in converted.state_dict().items()
        if name.rpartition(".")[0] in layers and not name.endswith("r2")
    }
    assert report.stored_after == sum(value.numel() for value in stored.values())
    assert report.stored_after < report.stored_before


def test_a_layer_used_twice_counts_once():
    conv = nn.Conv2d(8, 8, 3, groups=8)
    once = conversion_report(convert_to_masterkeys(nn.Sequential(conv)))
    assert conversion_report(convert_to_masterkeys(nn.Sequential(conv, conv))) == once


def test_table():
    model = timm.create_model("inception_next_atto")
    report = conversion_report(convert_to_masterkeys(model, keys_per_kernel=2))
    lines = str(report).splitlines()
    assert [row.name for row in report.stages] == ["stages.0", "stages.1", "stages.2", "stages.3"]
    assert len(lines) == 1 + 36 + 4 + 1 + 2 + 1
    header, rows = lines[0], lines[1:-3]
    start = header.index("R2>.9") + 5
    assert len({len(line) for line in [header, *rows]}) == 1
    for title in ("kernel", "channels", "keys", "mean R2", "median", "worst", "R2>.5", "R2>.9"):
        end = header.index(title) + len(title)  # columns are right-aligned
        assert all(row[end] == " " for row in rows), title
        assert all(row[end - 1] != " " for row in rows[:36]), title
    for row, layer in zip(rows, (*report.layers, *report.stages, report.total), strict=True):
        assert row.startswith(layer.name)
        assert [int(n) for n in row[start:].split()] == list(layer.key_histogram)
        assert f"{layer.mean_r2:.3f}" in row
        assert f"{layer.worst_r2:.3f}" in row
    assert rows[0].split()[1:4] == ["3x3", str(report.layers[0].channels), "2"]
    assert lines[-1].startswith("bank babaiee2025; parameters: trainable ")
    assert f"stored {report.stored_before:,} -> {report.stored_after:,}" in lines[-1]


def test_table_of_few_kernels_lines_up():
    lines = str(conversion_report(convert_to_masterkeys(nn.Conv2d(3, 3, 3, groups=3)))).splitlines()
    header, *rows = lines[:3]
    assert {len(row) for row in rows} == {len(header)} and len(lines[3]) == len(lines[4])


def test_json():
    report = conversion_report(convert_to_masterkeys(net()))
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(asdict(report)))
    assert data["total"]["mean_r2"] == report.total.mean_r2
    assert [row["name"] for row in data["layers"]] == ["1", "3"]
    assert data["layers"][1]["kernel_size"] == [1, 7]
    assert data["layers"][1]["key_histogram"] == list(report.layers[1].key_histogram)
    assert data["stored_after"] == report.stored_after


def test_several_banks():
    model = convert_to_masterkeys(net(), include="1")
    convert_to_masterkeys(model, BANK.keys[:3], inplace=True)
    report = conversion_report(model)
    assert report.bank == "babaiee2025, custom"
    assert {len(row.key_histogram) for row in (*report.layers, report.total)} == {8}


def test_drawn_kernels_have_no_fit():
    report = conversion_report(initialize_masterkeys(net()))
    assert report.total.drawn == 120 and math.isnan(report.total.mean_r2) and math.isnan(report.total.worst_r2)
    assert "120 kernels were drawn" in str(report)
    assert json.loads(report.to_json())["total"]["mean_r2"] is None
    assert sum(report.total.key_histogram) == 120


def test_the_model_is_not_changed():
    model = convert_to_masterkeys(net()).half()
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    conversion_report(model)
    for name, value in model.state_dict(keep_vars=True).items():
        assert before[name][0] == id(value)
        assert torch.equal(before[name][1], value)


def test_errors():
    model = net()
    for ordinary in (model, fuse_masterkeys(convert_to_masterkeys(model)), nn.Identity()):
        with pytest.raises(ConversionError, match=r"holds no MasterKeyConv2d.*convert_to_masterkeys"):
            conversion_report(ordinary)
    with torch.device("meta"):
        empty = convert_to_masterkeys(net())
    with pytest.raises(ConversionError, match=r"meta device.*Load weights"):
        conversion_report(empty)
