"""Which differential operators the kernels of a dense model resemble."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..keys.operators import OPERATORS, OperatorFit, fit_operators
from .table import number, share

_NONE = (math.nan,) * 3


@dataclass(frozen=True)
class OperatorReport:
    """The dense kernels that one operator fits best, see ``fit_operators``.

    Attributes:
        operator: One of ``OPERATORS``, or "none" for kernels that no operator fits with an R2 above 0.5.
        kernels: Number of these kernels.
        share: Their share of the kernels that are not constant.
        chance: The same share of a thousand Gaussian random kernels of each size: at 3x3 most resemble some operator.
        mean_r2: Mean R2 of the operator (of the best one, for "none"); NaN without kernels.
        sigma: The 10 %, 50 % and 90 % quantile of the Gaussian's standard deviation, in taps.
        upright: Share of first and second derivatives within 10 degrees of an image axis; else NaN.
        half_pixel: Share of first derivatives with centres half a tap aside (four of five random ones have).
    """

    operator: str
    kernels: int
    share: float
    chance: float
    mean_r2: float
    sigma: tuple[float, float, float]
    upright: float
    half_pixel: float

    def cells(self) -> list[str]:
        """Its row of a table, under ``OPERATOR_TITLES``."""
        return [
            self.operator,
            f"{self.kernels:,}",
            *map(share, (self.share, self.chance)),
            number(self.mean_r2),
            *(number(value, 2) for value in self.sigma),
            *map(share, (self.upright, self.half_pixel)),
        ]


_TITLES = "resembles, kernels, share, random, mean R2, sigma 10%, median, 90%, along an axis, half a tap aside"
OPERATOR_TITLES = tuple(_TITLES.split(", "))


def report_operators(weights: Sequence[torch.Tensor]) -> tuple[OperatorReport, ...]:
    """The reports of all operators, and of none, for the kernels (C, 1, kh, kw) of several layers."""
    weights = [weight.float() for weight in weights]
    fits = [fit_operators(weight) for weight in weights]
    operator, best = torch.cat([_classify(fit) for fit in fits]), torch.cat([fit.r2.amax(1) for fit in fits])
    sigma, orientation = torch.cat([fit.sigma for fit in fits]), torch.cat([fit.orientation for fit in fits])
    half_pixel = torch.cat([fit.half_pixel for fit in fits]).double()
    upright = (((orientation + 45) % 90 - 45).abs() <= 10).double()
    chance = torch.stack([len(weight) * _chance(*weight.shape[2:]) for weight in weights]).sum(0) / len(operator)
    rows = []
    for index, title in enumerate((*OPERATORS, "none")):
        mask = operator == index
        low, middle, high = sigma[mask].quantile(sigma.new_tensor([0.1, 0.5, 0.9])).tolist() if mask.any() else _NONE
        rows.append(
            OperatorReport(
                operator=title,
                kernels=int(mask.sum()),
                share=float(mask.sum()) / max(1, int((operator >= 0).sum())),
                chance=float(chance[index]),
                mean_r2=float(best[mask].mean()),
                sigma=(low, middle, high),
                upright=float(upright[mask].mean()) if "derivative" in title else math.nan,
                half_pixel=float(half_pixel[mask].mean()) if title == "1st derivative" else math.nan,
            )
        )
    return tuple(rows)


def _classify(fit: OperatorFit) -> torch.Tensor:
    """The operator of each kernel, by index; len(OPERATORS) if none has an R2 above 0.5, -1 for a constant kernel."""
    return torch.where(fit.r2.amax(1) > 0.5, fit.operator, len(OPERATORS)).where(fit.operator >= 0, fit.operator)


@lru_cache(maxsize=16)
def _chance(height: int, width: int) -> torch.Tensor:
    """The share of random kernels that resemble each operator, and none, (5,)."""
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(1000, height, width, generator=generator, dtype=torch.float32, device="cpu")
    operator = _classify(fit_operators(kernels))
    return torch.bincount(operator, minlength=len(OPERATORS) + 1).double() / len(operator)
