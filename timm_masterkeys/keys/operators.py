"""Differential operators that kernels resemble: least-squares fits of discrete Gaussian derivatives."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..errors import ProjectionError
from .gaussian_banks import discrete_gaussian, neighbours
from .projection import constant_kernels

OPERATORS = ("Gaussian", "DoG", "1st derivative", "2nd derivative")
SIGMAS = np.geomspace(0.25, 4, 25)  # 12 % apart
ANGLES = np.arange(0, 180, 5)  # degrees, of the second derivative
SURROUND = 1.6  # times the centre's sigma: a DoG that comes near a Laplacian (Marr and Hildreth 1980)
_CHUNK = 4096  # kernels at a time


@dataclass(frozen=True, eq=False)
class OperatorFit:
    """The operator that each of N kernels resembles most.

    Attributes:
        operator: (N,) int64, indices into ``OPERATORS``; -1 for a constant kernel.
        r2: (N, 4), R2 of the best fit ``a*x + b`` by each operator; NaN for a constant kernel.
        sigma: (N,), the Gaussian's standard deviation in taps, from 0.25 to 4 (for a DoG that of its centre).
        orientation: (N,), the direction of a derivative in degrees [0, 180), 0 to the right, 90 up; else NaN.
        half_pixel: (N,), True for a first derivative that is half a tap off, between a tap and its neighbours.
    """

    operator: torch.Tensor
    r2: torch.Tensor
    sigma: torch.Tensor
    orientation: torch.Tensor
    half_pixel: torch.Tensor


@torch.no_grad()
def fit_operators(kernels: torch.Tensor) -> OperatorFit:
    """Fits Gaussians and their derivatives to kernels, each as ``a*x + b`` by least squares.

    T is Lindeberg's discrete Gaussian (JMIV 68(3), 2026) at 25 sigmas from 0.25 to 4 taps, 12 % apart. The operators
    are T itself; the DoG, T minus T of 1.6 times the sigma; the first derivative of T in any direction, by central or
    one-sided differences (half a tap off, as in master keys 1 to 4); and the second derivative in 36 directions.

    Args:
        kernels: (N, kh, kw) or (N, 1, kh, kw), finite.

    Returns:
        The best operator of each kernel, and the R2 of all operators.

    Raises:
        ProjectionError: Another shape, a single tap, or values that are not finite.

    Example:
        >>> fit = fit_operators(get_bank("babaiee2025").keys_for((7, 7)))
        >>> [OPERATORS[i] for i in fit.operator]
        ['1st derivative', ..., 'DoG', 'Gaussian']
    """
    if not (kernels.ndim == 3 or (kernels.ndim == 4 and kernels.shape[1] == 1)) or kernels.shape[-2:].numel() < 2:
        raise ProjectionError(f"Kernels have shape {tuple(kernels.shape)}, expected (N, kh, kw) or (N, 1, kh, kw).")
    if not kernels.isfinite().all():
        raise ProjectionError("Kernels hold NaN or Inf; every value must be finite.")
    height, width = kernels.shape[-2:]
    flat = kernels.detach().cpu().double().reshape(-1, height * width)
    flat = flat - flat.mean(1, keepdim=True)
    norm = flat.norm(dim=1, keepdim=True)
    constant = constant_kernels(kernels).cpu()
    flat = flat / norm.clamp_min(1e-300)
    tables = _tables(height, width)
    parts = [_best(part, tables) for part in flat.split(_CHUNK)]
    r2, sigma, orientation, half_pixel = (torch.cat(columns) for columns in zip(*parts, strict=True))
    operator = r2.argmax(1)
    best = torch.arange(len(flat), device=flat.device), operator
    operator[constant], r2[constant] = -1, float("nan")
    return OperatorFit(operator, r2, sigma[best], orientation[best], half_pixel[best])


_Template = tuple[list[np.ndarray], float, float, bool]  # kernels that span it, sigma, orientation, half_pixel


@dataclass(frozen=True, eq=False)
class _Table:
    """The T templates of one operator, each as an orthonormal basis."""

    basis: torch.Tensor  # (T, taps, rank); a direction that vanishes at this size is 0
    steering: torch.Tensor | None  # (T, 2, rank): maps coefficients to those along x and y
    sigma: torch.Tensor  # (T,)
    orientation: torch.Tensor  # (T,)
    half_pixel: torch.Tensor  # (T,)


@lru_cache(maxsize=16)
def _tables(height: int, width: int) -> list[_Table]:
    tables = [_isotropic(height, width, surround) for surround in (False, True)]
    return [*tables, _first(height, width), _second(height, width)]


def _best(kernels: torch.Tensor, tables: list[_Table]) -> tuple[torch.Tensor, ...]:
    """R2, sigma, orientation and half_pixel of the best template in each table, each (n, tables)."""
    columns = []
    for table in tables:
        coefficients = torch.einsum("np,tpr->ntr", kernels, table.basis)
        r2, index = coefficients.square().sum(2).max(1)
        orientation = table.orientation[index]
        if table.steering is not None:
            best = coefficients[torch.arange(len(kernels), device=kernels.device), index]
            x, y = torch.einsum("nr,nir->in", best, table.steering[index])
            orientation = torch.atan2(y, x).rad2deg() % 180
        columns.append((r2, table.sigma[index], orientation, table.half_pixel[index]))
    return tuple(torch.stack(column, 1) for column in zip(*columns, strict=True))


def _isotropic(height: int, width: int, surround: bool) -> _Table:
    templates: list[_Template] = []
    for sigma in SIGMAS:
        g = _gaussian(sigma, max(height, width))
        if surround:
            g = g - _gaussian(SURROUND * sigma, max(height, width))
        templates.append(([_cut(g, height, width)], sigma, np.nan, False))
    return _table(templates)


def _first(height: int, width: int) -> _Table:
    templates: list[_Template] = []
    for sigma in SIGMAS:
        g = _gaussian(sigma, max(height, width))
        left, right, above, below = neighbours(g)
        pairs = [(right - left, above - below)]
        pairs += [(x, y) for x in (right - g, g - left) for y in (above - g, g - below)]
        for number, pair in enumerate(pairs):
            templates.append(([_cut(kernel, height, width) for kernel in pair], sigma, np.nan, number > 0))
    return _table(templates, steer=True)


def _second(height: int, width: int) -> _Table:
    templates: list[_Template] = []
    for sigma in SIGMAS:
        g = _gaussian(sigma, max(height, width))
        left, right, above, below = neighbours(g)
        _, _, right_above, right_below = neighbours(right)
        _, _, left_above, left_below = neighbours(left)
        xx, yy = left + right - 2 * g, above + below - 2 * g
        xy = (right_above - right_below - left_above + left_below) / 4
        for angle in ANGLES:
            c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
            along = c * c * xx + 2 * c * s * xy + s * s * yy
            templates.append(([_cut(along, height, width)], sigma, float(angle), False))
    return _table(templates)


def _table(templates: list[_Template], steer: bool = False) -> _Table:
    kernels, sigmas, angles, half_pixel = zip(*templates, strict=True)
    columns = torch.from_numpy(np.array(kernels)).flatten(2).mT  # (T, taps, columns)
    columns = columns - columns.mean(1, keepdim=True)
    left, size, right = torch.linalg.svd(columns, full_matrices=False)
    nonzero = size > 1e-9
    return _Table(
        basis=left * nonzero[:, None],
        steering=right.mT / torch.where(nonzero, size, torch.inf)[:, None] if steer else None,
        sigma=torch.tensor(sigmas, dtype=torch.float64, device="cpu"),  # for any default device
        orientation=torch.tensor(angles, dtype=torch.float64, device="cpu"),
        half_pixel=torch.tensor(half_pixel, device="cpu"),
    )


def _gaussian(sigma: float, side: int) -> np.ndarray:
    """A Gaussian on a grid larger than the kernel, so that its differences have no border inside the kernel."""
    taps = discrete_gaussian(sigma, side // 2 * 2 + 7)
    return np.outer(taps, taps)


def _cut(g: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (g.shape[0] - height) // 2, (g.shape[1] - width) // 2
    return g[top : top + height, left : left + width]
