"""Least squares from sums of products: the keys of a layer, and ridge regression with cross-validation."""

import itertools
import math
from dataclasses import dataclass

import torch

MOST_SETS = 100  # sets of keys, up to which all are tried; of eight keys there are 70 at most
RIDGES = tuple(10 ** (power / 2) for power in range(-10, 3))  # times the mean energy of a feature


def choose_keys(covariance: torch.Tensor, keys_per_kernel: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys whose responses, with that of a constant kernel, come nearest to the dense layer's output.

    Least squares over all sets of ``keys_per_kernel`` keys. If there are too many sets, orthogonal matching pursuit:
    the key that leaves the smallest error is added and all are refitted, once for each key.

    Args:
        covariance: (C, K + 2, K + 2) float64, for each channel the covariance of the responses to a kernel of ones and
            to the K keys, and of the expected output.
        keys_per_kernel: Keys per kernel.

    Returns:
        Keys and scale (C, keys_per_kernel), shift (C,).
    """
    count, size = covariance.shape[0], covariance.shape[1] - 1
    matrix, right = covariance[:, :size, :size], covariance[:, :size, size]
    loading = 1e-6 * matrix.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    matrix = matrix + loading[:, None, None] * torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    if math.comb(size - 1, keys_per_kernel) <= MOST_SETS:
        all_sets = [(0, *keys) for keys in itertools.combinations(range(1, size), keys_per_kernel)]
        chosen, solution = _best_sets(matrix, right, torch.tensor(all_sets, device=matrix.device).expand(count, -1, -1))
    else:
        chosen = torch.zeros(count, 1, dtype=torch.long, device=matrix.device)
        unused = torch.arange(1, size, device=matrix.device).expand(count, -1)
        for _ in range(keys_per_kernel):
            grown = chosen.unsqueeze(1).expand(-1, unused.shape[1], -1)
            chosen, solution = _best_sets(matrix, right, torch.cat([grown, unused.unsqueeze(2)], 2))
            unused = unused[unused != chosen[:, -1:]].view(count, -1)
    return chosen[:, 1:] - 1, solution[:, 1:], solution[:, 0]


def _best_sets(matrix: torch.Tensor, right: torch.Tensor, sets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sets (C, sets, features) the one with the smallest error, and its solution; both (C, features)."""
    channels = torch.arange(len(sets), device=sets.device)
    matrices = matrix[channels[:, None, None, None], sets.unsqueeze(3), sets.unsqueeze(2)]
    right_sides = right[channels[:, None, None], sets]
    solutions = torch.linalg.solve(matrices, right_sides)
    best = (solutions * right_sides).sum(2).argmax(1)
    return sets[channels, best], solutions[channels, best]


@dataclass(frozen=True)
class Gram:
    """Sums over rows of features and residuals, in float64."""

    products: torch.Tensor  # (1 + inputs, 1 + inputs + outputs), of (1, features) with (1, features, residual)
    power: torch.Tensor  # (outputs,), of the squared residuals

    @classmethod
    def of(cls, features: torch.Tensor, residual: torch.Tensor) -> "Gram":
        """The sums of features (rows, inputs) and residuals (rows, outputs), multiplied in their own dtype."""
        x = torch.cat([features.new_ones(len(features), 1), features], 1)
        products = torch.cat([x.T @ x, x.T @ residual], 1).double()
        return cls(products, residual.square().sum(0, dtype=torch.float64))

    def __add__(self, other: "Gram") -> "Gram":
        return Gram(self.products + other.products, self.power + other.power)

    def __sub__(self, other: "Gram") -> "Gram":
        return Gram(self.products - other.products, self.power - other.power)

    @property
    def mean(self) -> torch.Tensor:
        """The means (inputs + outputs,) of features and residuals."""
        return self.products[0, 1:] / self.products[0, 0]

    def around(self, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of products (inputs, inputs), (inputs, outputs) and of squares (outputs,), with ``mean`` subtracted."""
        size = len(self.products) - 1
        n, total = self.products[0, 0], self.products[0, 1:]
        left = self.products[1:, 1:] - torch.outer(mean[:size], total - n * mean)
        left = left - torch.outer(total[:size], mean)
        power = self.power - mean[size:] * (2 * total[size:] - n * mean[size:])
        return left[:, :size], left[:, size:], power


def fit_ridge(folds: list[Gram], weight: torch.Tensor, intercept: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ridge regression of the residual: D (inputs, outputs) and b (outputs,) so that features @ D + b comes near it.

    Args:
        folds: Parts of the rows, for cross-validation: each is predicted by a fit to all other parts.
        weight: (outputs,), the weight of an output in the error of a prediction.
        intercept: Whether to fit b; else it is 0.

    Returns:
        D and b, fitted to all rows with the best ridge, or None if no ridge predicts better than D = 0.
    """
    whole = sum(folds[1:], folds[0])
    centred = [_centred(whole - fold, fold, intercept) for fold in folds]
    best, least = 0.0, float((weight * whole.power).sum())
    for ridge in reversed(RIDGES):  # from the strongest down, while the error falls
        error = sum(_ridge_error(ridge, weight.float(), *sums) for sums in centred)
        if not error < least:
            break
        best, least = ridge, error
    if not best:
        return None
    mean = whole.mean if intercept else torch.zeros_like(whole.mean)
    matrix, right, _ = whole.around(mean)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    d = torch.linalg.solve(matrix + best * _energy(matrix) * identity, right)
    return d, mean[len(d) :] - mean[: len(d)] @ d


def _centred(fitted: Gram, test: Gram, intercept: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sums of both around the mean of ``fitted``; in float32, as they only choose the ridge."""
    mean = fitted.mean if intercept else torch.zeros_like(fitted.mean)
    return [sums.float() for sums in fitted.around(mean)], [sums.float() for sums in test.around(mean)]


def _ridge_error(ridge: float, weight: torch.Tensor, fitted: list[torch.Tensor], test: list[torch.Tensor]) -> float:
    """The squared error on the rows of ``test``; infinite if rounding makes the matrix indefinite."""
    (matrix, right, _), (test_matrix, test_right, power) = fitted, test
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + ridge * _energy(matrix) * identity)
    if failed:
        return math.inf
    d = torch.cholesky_solve(right, factor)
    return float((weight * (power - 2 * (d * test_right).sum(0) + (d * (test_matrix @ d)).sum(0))).sum())


def _energy(matrix: torch.Tensor) -> torch.Tensor:
    """The mean energy of a feature, never 0."""
    return matrix.diagonal().mean().clamp_min(1e-30)
