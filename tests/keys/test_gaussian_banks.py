"""The idealised banks, against scipy's numbers, the published keys and the defining equations."""

import numpy as np
import pytest
import torch

import timm_masterkeys as mk
from timm_masterkeys.keys.gaussian_banks import SIGMAS, discrete_gaussian

# exp(-s^2) I_n(s^2) for n = 0 to 4, as scipy.special.ive(n, s^2) gives it.
BESSEL = {
    0.0: [1.0, 0.0, 0.0, 0.0, 0.0],
    0.3: [
        0.915782833054503,
        0.04116855838304002,
        0.0009259800980585312,
        1.3887358216417459e-05,
        1.5621696403460966e-07,
    ],
    0.675: [
        0.6673873269359125,
        0.14822567198678802,
        0.016739658406802048,
        0.0012657079215847504,
        7.189976864896022e-05,
    ],
    1.387: [0.31585245453815536, 0.21631146518296362, 0.09096946163935758, 0.02716305570270366, 0.0062512162490732034],
    4.0: [0.100544127361252, 0.09734961475646806, 0.08837542551669349, 0.07525575837729469, 0.06015451612520798],
    12.0: [0.03327416225879933, 0.033158424982817625, 0.03281362857848241, 0.032246935300082, 0.03147000627431234],
}

# A Fourier transform adds up values of at most 1 in about 8 rounds, each of which rounds anew.
ROUNDING = 8 * np.finfo(float).eps


@pytest.mark.parametrize("sigma", BESSEL)
def test_discrete_gaussian(sigma):
    taps = discrete_gaussian(sigma, 41)
    np.testing.assert_allclose(taps[20:25], BESSEL[sigma], rtol=1e-13, atol=ROUNDING)
    np.testing.assert_array_equal(taps, taps[::-1])
    if sigma < 4:
        assert abs(taps.sum() - 1) < 1e-5
        variance = (taps * (np.arange(41) - 20) ** 2).sum()
        np.testing.assert_allclose(variance, sigma**2, atol=1e-3)  # of a semi-group


def test_semigroup():
    one, two = discrete_gaussian(0.7, 61), discrete_gaussian(1.1, 61)
    both = discrete_gaussian((0.7**2 + 1.1**2) ** 0.5, 61)
    np.testing.assert_allclose(np.convolve(one, two, "same"), both, atol=4 * ROUNDING)  # two transforms and a sum


@pytest.mark.parametrize("method", SIGMAS)
def test_correlation_with_the_published_keys(method):
    """As measured when the models were published; a flipped axis would give far less."""
    published = mk.get_bank("babaiee2025").keys_for((7, 7)).flatten(1)
    sampled = mk.get_bank(f"scale-space-{method}").keys_for((7, 7)).flatten(1)
    low = torch.tensor([0.835, 0.93, 0.90, 0.875, 0.885, 0.925, 0.985, 0.985])
    correlation = (published * sampled).sum(1).abs()
    assert (correlation >= low).all(), correlation
    assert (published @ sampled.T).abs().argmax(1).tolist() == list(range(8))


def test_the_names_are_different_banks():
    names = [name for name in mk.list_banks() if name.startswith("scale-space-")]
    assert names == [f"scale-space-{method}" for method in ("a", "b", "c1", "c2", "d1", "d2")]
    assert len({mk.get_bank(name).digest for name in names}) == 6
