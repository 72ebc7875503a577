"""The idealised banks: the eight keys as differences of discrete Gaussians (Lindeberg et al., JMIV 68(3), 2026)."""

import numpy as np

TAPS = 31  # a side; outside them every key is 0 to the last digit

# sigma_x and sigma_y of keys 1 to 8, in taps, for each method by which the paper fitted them to the published keys.
SIGMAS = {
    "a": "0.580 0.558  0.559 0.580  0.617 0.601  0.642 0.424  1.075 0.800  0.771 1.003  0.675 0.675  0.552 0.545",
    "b": "0.644 0.583  0.586 0.644  0.690 0.674  0.756 0.460  1.107 0.945  0.900 0.889  0.675 0.675  0.609 0.601",
    "c1": "0.360 0.510  0.555 0.453  0.701 0.655  0.563 0.384  1.309 0.875  0.973 1.171  0.654 0.654  0.637 0.587",
    "c2": "0.458 0.458  0.448 0.448  0.671 0.671  0.420 0.420  1.387 1.387  1.090 1.090  0.654 0.654  0.611 0.611",
    "d1": "0.491 0.722  0.581 0.519  0.483 0.503  0.500 0.000  1.300 1.004  0.984 1.074  0.675 0.675  0.615 0.608",
    "d2": "0.644 0.644  0.558 0.558  0.495 0.495  0.380 0.380  1.193 1.193  1.038 1.038  0.675 0.675  0.612 0.612",
}


def discrete_gaussian(sigma: float, taps: int = TAPS) -> np.ndarray:
    """The discrete analogue of the Gaussian, ``exp(-s^2) I_n(s^2)`` with the modified Bessel functions I_n.

    The taps are the Fourier coefficients of ``exp(s^2 (cos(angle) - 1))``, exact to rounding; sigma 0 gives one tap.

    Args:
        sigma: Standard deviation in taps, 0 or more.
        taps: Number of taps, odd.

    Returns:
        (taps,) float64, with n = 0 in the middle.

    Example:
        >>> discrete_gaussian(0.0, 3)
        array([0., 1., 0.])
    """
    angles = taps + 64 + 16 * int(sigma * sigma + 8 * sigma)
    spectrum = np.exp(sigma**2 * (np.cos(2 * np.pi * np.arange(angles) / angles) - 1))
    return np.fft.ifft(spectrum).real[np.abs(np.arange(taps) - taps // 2)]


def neighbours(g: np.ndarray) -> tuple[np.ndarray, ...]:
    """The values at the left, right, upper and lower neighbours of each place."""
    return tuple(np.roll(g, step, axis) for axis in (1, 0) for step in (1, -1))


def scale_space_keys(method: str, taps: int = TAPS) -> np.ndarray:
    """The eight keys (8, taps, taps) of one of the paper's models, sampled; not normalised.

    With T the outer product of two discrete Gaussians and y pointing up: one-sided differences of T up (1), left (2),
    down (3) and right (4), centred ones in x (5) and y (6), T minus half its 5-point Laplacian (7), and T itself (8).

    Args:
        method: How the sigmas were fitted: "a", "b", "c1", "c2", "d1" or "d2".
        taps: Taps a side, odd.
    """
    keys = []
    for number, (sigma_x, sigma_y) in enumerate(np.array(SIGMAS[method].split(), float).reshape(8, 2), start=1):
        g = np.outer(discrete_gaussian(sigma_y, taps + 2), discrete_gaussian(sigma_x, taps + 2))
        left, right, above, below = neighbours(g)
        key = {
            1: above - g,
            2: g - left,
            3: g - below,
            4: right - g,
            5: (right - left) / 2,
            6: (above - below) / 2,
            7: g - 0.5 * (left + right + above + below - 4 * g),
            8: g,
        }[number]
        keys.append(key[1:-1, 1:-1])
    return np.stack(keys)
