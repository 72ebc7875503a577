"""Pictures: they draw the numbers they should."""

import numpy as np
import pytest
import timm
import torch
from forked import run

import timm_masterkeys as mk
from timm_masterkeys.study import plotting
from timm_masterkeys.study.discovery import Discovery


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_convnext3")


@pytest.fixture(scope="module")
def model(dense):
    return mk.convert_to_masterkeys(dense)


def images(figure):
    return [image for axis in figure.axes for image in axis.images]


@pytest.mark.parametrize("size", [None, (3, 3), (1, 7)])
def test_the_bank_is_drawn_on_one_scale_around_zero(size):
    figure = plotting.plot_bank("babaiee2025", size)
    keys = mk.get_bank().keys_for(size or (7, 7))
    drawn = images(figure)
    assert len(drawn) == len(keys)
    for image, key in zip(drawn, keys, strict=True):
        np.testing.assert_array_equal(image.get_array(), key)
        low, high = image.get_clim()
        assert -low == high == pytest.approx(float(keys.abs().max()))


def test_kernels_stand_above_their_fits(model, dense):
    figure = plotting.plot_kernels(model, dense, count=5)
    axes = np.array(figure.axes).reshape(4, 5)
    r2 = torch.cat([m.r2 for m in model.modules() if isinstance(m, mk.MasterKeyConv2d)]).sort().values
    for top, expected in ((0, r2[:5]), (2, r2[-5:])):
        for column in range(5):
            shown, place = axes[top, column].get_title().split("\n")
            assert shown == f"R² {expected[column]:.2f}"
            name, index = place.split(":")
            original, fit = (
                net.get_submodule(f"{name}.conv_dw").weight[int(index), 0].detach() for net in (dense, model)
            )
            above, below = (axes[row, column].images[0] for row in (top, top + 1))
            np.testing.assert_allclose(above.get_array(), original)
            np.testing.assert_allclose(below.get_array(), fit)
            assert above.get_clim() == below.get_clim() and -above.get_clim()[0] == above.get_clim()[1]
    with pytest.raises(mk.ConversionError, match="no layer"):
        plotting.plot_kernels(model, torch.nn.Sequential())
    with pytest.raises(mk.ConversionError, match="no kernel that was fitted"):
        plotting.plot_kernels(dense, dense)


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
    curve = {1: 0.2, 2: 0.5, 3: 0.55, 60: 0.9}
    (axis,) = plotting.plot_elimination(Discovery(mk.get_bank(), curve, 2, {}, 100, 0, 0, 0)).axes
    assert list(axis.lines[0].get_xdata()) == [1, 2, 3] and list(axis.lines[2].get_xdata()) == [2, 2]


def test_the_package_does_not_import_matplotlib_and_says_what_to_install():
    code = (
        "import sys, timm_masterkeys\nassert 'matplotlib' not in sys.modules\n"
        "assert 'timm_masterkeys.study' not in sys.modules\nsys.modules['matplotlib'] = None\n"
        "from timm_masterkeys.cli import main\n"
        "main(['plot', 'test_convnext', '--pretrained', '--output', 'x'])"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Pictures need matplotlib: pip install timm_masterkeys[plot]" in done.stderr
