"""Pictures: they draw the numbers they should."""

import sys

import numpy as np
import pytest
import timm
import torch

import timm_masterkeys as mk
from timm_masterkeys.cli import main
from timm_masterkeys.study import plotting


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_convnext3")


@pytest.fixture(scope="module")
def model(dense):
    return mk.convert_to_masterkeys(dense)


def pictures(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def colour_bars(figure):
    """The limits of every colour bar, which stand in axes of their own."""
    return [axis.get_ylim() for axis in figure.axes if axis.get_label() == "<colorbar>"]


@pytest.mark.parametrize("size", [None, (3, 3), (1, 7)])
def test_the_bank_is_drawn_on_one_scale_around_zero(size):
    keys = mk.get_bank().keys_for(size or (7, 7))
    images = [image for axis in pictures(plotting.plot_bank("babaiee2025", size)) for image in axis.images]
    for image, key in zip(images, keys, strict=True):
        np.testing.assert_array_equal(image.get_array(), key)
        low, high = image.get_clim()
        assert -low == high == pytest.approx(float(keys.abs().max()))


@pytest.fixture
def strip_and_squares():
    return torch.nn.Sequential(*(torch.nn.Conv2d(9, 9, size, groups=9) for size in ((1, 7), 3, 3)))


def test_keys_are_shown_as_the_layers_use_them(strip_and_squares):
    """A row for each kernel size; a key that vanishes there has its place, and no picture."""
    figure = plotting.plot_used_keys(mk.convert_to_masterkeys(strip_and_squares))
    axes, bank = np.array(pictures(figure)).reshape(2, 8), mk.get_bank()
    rows = (((1, 7), "1 layer"), ((3, 3), "2 layers"))
    for row, limits, (size, layers) in zip(axes, colour_bars(figure), rows, strict=True):
        assert row[0].get_ylabel() == f"{size[0]}x{size[1]}\n{layers}"
        keys = dict(zip(bank.kept(size), bank.keys_for(size), strict=True))
        for index, axis in enumerate(row):
            if index not in keys:
                assert not axis.images and "left out" in axis.texts[0].get_text()
                continue
            np.testing.assert_array_equal(axis.images[0].get_array(), keys[index])
            assert axis.get_title() == f"key {index + 1}"
        assert -limits[0] == limits[1] == pytest.approx(float(bank.keys_for(size).abs().max()))


def test_used_keys_of_several_banks(strip_and_squares):
    mixed = mk.convert_to_masterkeys(strip_and_squares, include="0")
    mk.convert_to_masterkeys(mixed, "random8:1", inplace=True)
    titles = [axis.get_ylabel() for axis in plotting.plot_used_keys(mixed).axes if axis.get_ylabel()]
    assert titles == ["babaiee2025\n1x7\n1 layer", "random8:1\n3x3\n2 layers"]


def test_kernels_stand_above_their_fits(model, dense):
    figure = plotting.plot_kernels(model, dense, count=5)
    axes = np.array(pictures(figure)).reshape(6, 5)
    assert colour_bars(figure) == [(-1, 1)]
    r2 = torch.cat([m.r2 for m in model.modules() if isinstance(m, mk.MasterKeyConv2d)]).sort(descending=True).values
    middle = (len(r2) - 5) // 2
    assert r2[middle] >= r2.median() >= r2[middle + 4]
    groups = {"best": r2[:5], "median": r2[middle : middle + 5], "worst": r2[-5:]}
    for top, (title, expected) in zip((0, 2, 4), groups.items(), strict=True):
        assert [axes[row, 0].get_ylabel() for row in (top, top + 1)] == [f"{title}\ndense", f"{title}\nits fit"]
        for column in range(5):
            shown, place = axes[top, column].get_title().split("\n")
            assert shown == f"R² {expected[column]:.2f}"
            name, index = place.split(":")
            kernel, fit = (
                net.get_submodule(f"{name}.conv_dw").weight[int(index), 0].detach() for net in (dense, model)
            )
            kernel, fit = kernel - kernel.mean(), fit - fit.mean()
            most = max(kernel.abs().max(), fit.abs().max())
            above, below = (axes[row, column].images[0] for row in (top, top + 1))
            np.testing.assert_allclose(above.get_array(), kernel / most, atol=1e-6)
            np.testing.assert_allclose(below.get_array(), fit / most, atol=1e-6)
            assert above.get_clim() == below.get_clim() == (-1, 1)
            error = 1 - (kernel - fit).square().sum() / kernel.square().sum()  # what R2 says is what is seen
            assert float(error) == pytest.approx(float(expected[column]), abs=1e-4)


def test_constant_kernels_are_not_among_the_best():
    dense = torch.nn.Sequential(conv(4))
    with torch.no_grad():
        dense[0].weight[:3] = 0.5
    figure = plotting.plot_kernels(mk.convert_to_masterkeys(dense), dense)
    assert {axis.get_title().split("\n")[1] for axis in pictures(figure) if axis.get_title()} == {"0:3"}


def conv(channels):
    return torch.nn.Conv2d(channels, channels, 3, groups=channels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, dense: plotting.plot_kernels(model, torch.nn.Sequential()), "dense model has no convolution"),
        (lambda *_: plotting.plot_kernels(mk.convert_to_masterkeys(conv(4)), conv(2)), r"weight of \(4, 1, 3, 3\)"),
        (lambda *_: mk.conversion_report(mk.convert_to_masterkeys(conv(2)), conv(4)), r"weight of \(2, 1, 3, 3\)"),
        (lambda model, dense: plotting.plot_kernels(dense, dense), "holds no MasterKeyConv2d"),
        (lambda model, dense: plotting.plot_used_keys(dense), "holds no MasterKeyConv2d"),
        (lambda model, dense: plotting.plot_kernels(mk.initialize_masterkeys(dense), dense), "no fitted kernel"),
    ],
)
def test_kernels_that_cannot_be_shown(model, dense, call, message):
    with pytest.raises(mk.ConversionError, match=message):
        call(model, dense)


def test_curves_and_bars(model):
    report = mk.conversion_report(model)
    (axis,) = plotting.plot_keys(report).axes
    heights = np.array([patch.get_height() for patch in axis.patches]).reshape(8, len(report.layers))
    counts = np.array([layer.key_histogram for layer in report.layers]).T
    np.testing.assert_allclose(heights, counts / counts.sum(0))
    (axis,) = plotting.plot_r2(report).axes
    np.testing.assert_allclose(axis.collections[1].get_offsets()[:, 1], [layer.mean_r2 for layer in report.layers])
    (axis,) = plotting.plot_coverage({"a": report, "b": report}).axes
    assert [line.get_label() for line in axis.lines] == ["a", "b"]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [1, *report.total.coverage, 0])


def test_what_to_install(monkeypatch, capsys):
    for module in ("page", "plotting"):
        monkeypatch.delitem(sys.modules, f"timm_masterkeys.study.{module}", raising=False)
    monkeypatch.delattr("timm_masterkeys.study.plotting")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["inspect", "test_convnext", "--pretrained", "--html", "x"]) == 1
    assert "Pictures need matplotlib: pip install matplotlib" in capsys.readouterr().err
