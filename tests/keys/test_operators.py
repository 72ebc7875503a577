"""Which operator a kernel resembles: planted ones are found again; R^2 against least squares."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.keys.gaussian_banks import discrete_gaussian
from timm_masterkeys.keys.operators import OPERATORS, SIGMAS, fit_operators


def gaussian(sigma):
    return np.outer(discrete_gaussian(sigma, 31), discrete_gaussian(sigma, 31))


def moved(g, right=0, up=0):
    """What is found so many taps to the right and above."""
    return np.roll(g, (up, -right), (0, 1))


def along(g, degrees):
    """The first and the second derivative in a direction, by central differences."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = (moved(g, 1) - moved(g, -1)) / 2, (moved(g, 0, 1) - moved(g, 0, -1)) / 2
    xx, yy = moved(g, 1) + moved(g, -1) - 2 * g, moved(g, 0, 1) + moved(g, 0, -1) - 2 * g
    xy = (moved(g, 1, 1) - moved(g, 1, -1) - moved(g, -1, 1) + moved(g, -1, -1)) / 4
    return c * x + s * y, c * c * xx + 2 * c * s * xy + s * s * yy


def kernels_of(functions, size=7, seed=0):
    """The middle of each, scaled and shifted at random."""
    edge = (31 - size) // 2
    rng = np.random.default_rng(seed)
    cut = np.stack(functions)[:, edge : edge + size, edge : edge + size]
    a, b = rng.standard_normal((2, len(cut), 1, 1))
    return torch.from_numpy(a * cut + b)


SIGMA = float(SIGMAS[10])  # one of the grid's, .79


@pytest.mark.parametrize("size", [3, 5, 7, 11])
def test_planted_operators_are_found_again(size):
    g = gaussian(SIGMA)
    kernels = kernels_of([g, g - gaussian(1.6 * SIGMA), along(g, 33)[0], along(g, 60)[1]], size)
    fit = fit_operators(kernels)
    assert [OPERATORS[i] for i in fit.operator] == list(OPERATORS)
    torch.testing.assert_close(fit.r2.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(fit.sigma, torch.full((4,), SIGMA, dtype=torch.float64))
    assert fit.orientation.isnan().tolist() == [True, True, False, False]
    assert fit.orientation[2:].tolist() == pytest.approx([33, 60]) and not fit.half_pixel.any()


@pytest.mark.parametrize(("x", "y"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_one_sided_differences_stand_half_a_tap_aside(x, y):
    g = gaussian(SIGMA)
    right, up = x * (moved(g, x) - g), y * (moved(g, 0, y) - g)
    fit = fit_operators(kernels_of([right, up, np.cos(1) * right + np.sin(1) * up]))
    assert fit.operator.tolist() == [2, 2, 2] and fit.half_pixel.all()
    orientation = (fit.orientation + 1) % 180 - 1  # 180 is 0
    assert orientation.tolist() == pytest.approx([0, 90, np.degrees(1)], abs=1e-9) and fit.r2[:, 2].min() > 1 - 1e-9


def test_r2_is_that_of_the_best_least_squares_fit():
    kernels = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(0)).double()
    fit = fit_operators(kernels)
    edge = 12

    def r2(kernel, *columns):
        design = np.stack([np.ones(49), *(c[edge:-edge, edge:-edge].flatten() for c in columns)], 1)
        rest = kernel - design @ np.linalg.lstsq(design, kernel, rcond=None)[0]
        return 1 - rest @ rest / ((kernel - kernel.mean()) ** 2).sum()

    for index, kernel in enumerate(kernels.flatten(1).numpy()):
        best = np.zeros(4)
        for sigma in SIGMAS:
            g = gaussian(sigma)
            pairs = [(moved(g, 1) - moved(g, -1), moved(g, 0, 1) - moved(g, 0, -1))]
            pairs += [(moved(g, x) - g, moved(g, 0, y) - g) for x in (1, -1) for y in (1, -1)]
            turned = [r2(kernel, along(g, degrees)[1]) for degrees in range(0, 180, 5)]
            found = [r2(kernel, g), r2(kernel, g - gaussian(1.6 * sigma)), max(r2(kernel, *p) for p in pairs)]
            best = np.maximum(best, [*found, max(turned)])
        # gaussians of 31 taps are cut, as here, or not: a hair at the largest sigmas
        assert fit.r2[index].tolist() == pytest.approx(best.tolist(), abs=1e-4)
        assert int(fit.operator[index]) == int(best.argmax())


def test_the_published_keys_are_what_their_authors_say():
    fit = fit_operators(mk.get_bank().keys_for((7, 7)))
    assert [OPERATORS[i] for i in fit.operator] == ["1st derivative"] * 6 + ["DoG", "Gaussian"]
    assert fit.half_pixel.tolist() == [True] * 4 + [False] * 4
    off = [min(abs(a - b), 180 - abs(a - b)) for a, b in zip(fit.orientation[:6], [90, 0, 90, 0, 0, 90], strict=True)]
    assert max(off) < 25 and max(off[4:]) < 2 and fit.r2.amax(1).min() > 0.8


def test_constant_kernels_and_strips():
    kernels = torch.randn(6, 1, 1, 11)
    kernels[2] = 3
    fit = fit_operators(kernels)
    assert fit.operator[2] == -1 and fit.r2[2].isnan().all() and (fit.operator >= 0).sum() == 5
    assert (fit.r2[fit.operator >= 0] >= 0).all() and (fit.r2[fit.operator >= 0] <= 1 + 1e-9).all()
    assert fit_operators(torch.randn(2, 31, 31)).operator.shape == (2,)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (torch.randn(3, 7), "expected"),
        (torch.randn(3, 1, 1, 1), "expected"),
        (torch.full((2, 3, 3), torch.inf), "finite"),
    ],
)
def test_errors(kernels, message):
    with pytest.raises(mk.ProjectionError, match=message):
        fit_operators(kernels)


def test_the_report_counts_operators():
    conv, g = nn.Conv2d(4, 4, 7, groups=4), gaussian(SIGMA)
    noise = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        conv.weight.copy_(torch.cat([kernels_of([g, along(g, 45)[0], along(g, 5)[1]]), noise[None]])[:, None])
    report = mk.conversion_report(mk.convert_to_masterkeys(conv), conv)
    assert {row.operator: row.kernels for row in report.operators} == dict(
        zip([*OPERATORS, "none"], (1, 0, 1, 1, 1), strict=True)
    )
    assert report.operators[0].sigma == pytest.approx([SIGMA] * 3) and report.operators[0].mean_r2 == pytest.approx(1)
    assert [row.upright for row in report.operators[2:4]] == [0, 1] and report.operators[2].half_pixel == 0
    assert "resembles" in str(report) and "resembles" not in str(mk.conversion_report(mk.convert_to_masterkeys(conv)))
    assert sum(row.chance for row in report.operators) == 1


def test_the_report_tells_how_often_random_kernels_resemble_one():
    conv = nn.Conv2d(2000, 2000, 3, groups=2000)
    nn.init.normal_(conv.weight)  # most of 3x3 resemble a derivative
    rows = mk.conversion_report(mk.convert_to_masterkeys(conv), conv).operators
    shares = {row.operator: (row.chance, row.kernels) for row in rows}
    assert 0.2 < shares["none"][0] < 0.5 and all(abs(2000 * a - b) < 150 for a, b in shares.values())


def test_a_reports_stages_and_coverage():
    model = timm.create_model("test_efficientnet")
    report = mk.conversion_report(mk.convert_to_masterkeys(model))
    assert [row.name for row in report.stages] == list(dict.fromkeys(r.name.rsplit(".", 2)[0] for r in report.layers))
    assert sum(row.channels for row in report.stages) == report.total.channels
    for row in (*report.layers, *report.stages, report.total):
        assert list(row.coverage) == sorted(row.coverage, reverse=True)
        assert row.coverage[4] == row.above_50 and row.coverage[8] == row.above_90
