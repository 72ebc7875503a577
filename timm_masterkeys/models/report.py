"""How well the kernels of a converted model are met by its keys."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import ConversionError
from ..keys.operators import OPERATORS, fit_operators
from ..layers import MasterKeyConv2d
from .plan import plan_conversion, stage_of
from .wrapped import unwrapped

COVERAGE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # R^2 of the coverage curve
_NONE = (math.nan,) * 3
CALIBRATION_NOTE = "masterkeys: calibrated "  # how calibration's figures go along, among the notes of a cfg


@dataclass(frozen=True)
class LayerReport:
    """The fit of one layer. R^2 is over kernels that have a shape: constant ones are met exactly and only counted.

    Attributes:
        name: Module name.
        kernel_size: (height, width).
        channels: Kernels, the output channels.
        keys_per_kernel: Keys per kernel.
        constant: Kernels that are constant or all zero.
        drawn: Kernels drawn from the bank, not fitted; they have no R^2 (NaN where a layer has no other).
        mean_r2: Mean R^2, in [0, 1].
        median_r2: Median R^2.
        worst_r2: Smallest R^2.
        above_50: Share of kernels with R^2 above 0.5.
        above_90: Share of kernels with R^2 above 0.9.
        key_histogram: How many kernels have each key of the bank as their first, by index in the bank.
        coverage: Share of kernels with R^2 above each of ``COVERAGE``.
    """

    name: str
    kernel_size: tuple[int, int]
    channels: int
    keys_per_kernel: int
    constant: int
    drawn: int
    mean_r2: float
    median_r2: float
    worst_r2: float
    above_50: float
    above_90: float
    key_histogram: tuple[int, ...]
    coverage: tuple[float, ...]


@dataclass(frozen=True)
class OperatorReport:
    """The kernels of the dense network that one operator meets better than the others, see ``fit_operators``.

    Attributes:
        operator: One of ``OPERATORS``, or "none" for kernels of which no operator meets half (R^2 up to 0.5).
        kernels: How many.
        chance: The share of Gaussian random kernels of the same sizes (a thousand of each) that come out so: at 3x3
            most resemble some operator.
        mean_r2: Mean R^2 of the operator (of the best one, for "none"); NaN without kernels.
        sigma: The 10 %, 50 % and 90 % quantile of the Gaussian's standard deviation, in taps.
        upright: Share of first and second derivatives within 10 degrees of an axis of the image; else NaN.
        half_pixel: Share of first derivatives that stand half a tap aside (four of five random ones do).
    """

    operator: str
    kernels: int
    chance: float
    mean_r2: float
    sigma: tuple[float, float, float]
    upright: float
    half_pixel: float


@dataclass(frozen=True)
class ConversionReport:
    """The fit of a converted model; ``str()`` is a table, ``to_json()`` the same as JSON.

    Attributes:
        bank: Name of the bank (names, if layers differ).
        layers: One LayerReport a converted layer.
        stages: The same by stage, a layer's name up to its first number (``stages.0``, ``blocks.3``).
        total: All kernels together.
        trainable_before: Trainable parameters of the model with ordinary, trainable depthwise kernels.
        trainable_after: Trainable parameters now.
        stored_before: Numbers stored for the ordinary model's parameters.
        stored_after: Numbers stored now: other parameters, key indices, scales, shifts and the keys themselves.
        dense: Depthwise layers that could be converted and were not.
        calibration: What the last calibration measured, in a sentence; empty if there was none.
        operators: The operators that the dense kernels resemble; empty without a reference.
    """

    bank: str
    layers: tuple[LayerReport, ...]
    stages: tuple[LayerReport, ...]
    total: LayerReport
    trainable_before: int
    trainable_after: int
    stored_before: int
    stored_after: int
    dense: int = 0
    calibration: str = ""
    operators: tuple[OperatorReport, ...] = ()

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(_without_nan(asdict(self)), indent=2)

    def __str__(self) -> str:
        stages = [row for row in self.stages if len(self.stages) < len(self.layers)]
        rows = (*self.layers, *stages, self.total)
        width = max(len(layer.name) for layer in rows)
        titles = [f"k{i + 1}" for i in range(len(self.total.key_histogram))]
        counts = max(len(str(cell)) for cell in (*titles, *self.total.key_histogram))
        keys = " ".join(f"{title:>{counts}}" for title in titles)
        lines = [
            f"{'layer':<{width}}  kernel  channels  keys  mean R2  median  worst  R2>.5  R2>.9  {keys}",
        ]
        for layer in rows:
            size = "x".join(map(str, layer.kernel_size)) if layer.kernel_size[0] else ""
            each = str(layer.keys_per_kernel) if layer.keys_per_kernel else ""
            histogram = " ".join(f"{n:>{counts}}" for n in layer.key_histogram)
            lines.append(
                f"{layer.name:<{width}}  {size:>6}  {layer.channels:>8,}  {each:>4}  {layer.mean_r2:>7.3f}  "
                f"{layer.median_r2:>6.3f}  {layer.worst_r2:>5.3f}  {layer.above_50:>5.0%}  {layer.above_90:>5.0%}  "
                f"{histogram}"
            )
        marks = " ".join(f"{mark:>5}" for mark in COVERAGE)
        lines += [f"kernels with R2 above  {marks}"]
        lines += [" " * 23 + " ".join(f"{share:>5.0%}" for share in self.total.coverage)]
        if self.operators:
            lines += [_operator_table(self.operators)]
        if self.total.constant:
            lines.append(f"{self.total.constant:,} kernels are constant: met exactly, not in the R2 above")
        if self.total.drawn:
            lines.append(f"{self.total.drawn:,} kernels were drawn from the bank, not fitted: they have no R2")
        if self.dense:
            lines.append(f"{self.dense} depthwise layers are not converted")
        lines.append(
            f"bank {self.bank}; parameters: trainable {self.trainable_before:,} -> {self.trainable_after:,}, "
            f"stored {self.stored_before:,} -> {self.stored_after:,}"
        )
        if self.calibration:
            lines.append(self.calibration)
        return "\n".join(lines)


@torch.no_grad()
def conversion_report(model: nn.Module, reference: nn.Module | None = None) -> ConversionReport:
    """How well each converted layer of a model meets the kernels it was made from.

    R^2 is that of the projection; it does not follow later training. Kernels drawn from the bank have none.

    Args:
        model: A converted model, wrapped or not. Not changed.
        reference: The dense model it was made from, if the report is to tell the operators its kernels resemble.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, or it is on the meta device; the reference lacks one of
            the layers.

    Example:
        >>> report = conversion_report(model)
        >>> print(report)
        >>> report.total.mean_r2
    """
    model = unwrapped(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)]
    if not layers:
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    if any(layer.keys.is_meta for _, layer in layers):
        raise ConversionError("The model is on the meta device, its kernels have no values. Load weights first.")
    bins = max(len(layer.bank) for _, layer in layers)
    rows = []
    by_stage: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for name, layer in layers:
        index = layer.key_rows()[:, 0].cpu()
        first = torch.tensor(layer.bank.kept(layer.kernel_size), device="cpu")[index]  # type: ignore[arg-type]
        constant = (layer.scale.view(layer.out_channels, -1).eq(0).all(1) & layer.r2.eq(1)).cpu()
        values = (layer.r2.float().cpu(), constant, first)
        rows.append(_row(name, layer.kernel_size, layer.keys_per_kernel, bins, *values))  # type: ignore[arg-type]
        by_stage.setdefault(stage_of(name), []).append(values)
    everything = [values for stage in by_stage.values() for values in stage]

    stored = sum(p.numel() for p in model.parameters())
    of_keys = [p for _, layer in layers for n, p in layer.named_parameters(recurse=False) if n != "bias"]
    own = sum(p.numel() for p in of_keys)
    kernels = sum(layer.out_channels * layer.keys[0].numel() for _, layer in layers)
    compact = sum(getattr(m, name).numel() for _, m in layers for name in m.compact_entries if name != "r2")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own_trainable = sum(p.numel() for p in of_keys if p.requires_grad)
    return ConversionReport(
        bank=", ".join(sorted({layer.bank.name for _, layer in layers})),
        layers=tuple(rows),
        stages=tuple(_together(name, bins, values) for name, values in by_stage.items()),
        total=_together("total", bins, everything),
        trainable_before=trainable - own_trainable + kernels,
        trainable_after=trainable,
        stored_before=stored - own + kernels,
        stored_after=stored - own + compact,
        dense=len(plan_conversion(model, layers[0][1].bank).converted),
        calibration=_calibration(model),
        operators=() if reference is None else _operators(unwrapped(reference), [name for name, _ in layers]),
    )


def _together(name: str, bins: int, values: Iterable[tuple[torch.Tensor, ...]]) -> LayerReport:
    return _row(name, (0, 0), 0, bins, *(torch.cat(parts) for parts in zip(*values, strict=True)))


def _operators(reference: nn.Module, names: list[str]) -> tuple[OperatorReport, ...]:
    modules = dict(reference.named_modules())
    missing = [name for name in names if not isinstance(modules.get(name), nn.Conv2d)]
    if missing:
        raise ConversionError(f"The reference has no convolution '{missing[0]}'. Give the dense model of this one.")
    weights = [modules[name].weight.detach().float() for name in names]
    r2, operator, sigma, orientation, aside = _fitted(weights)
    chance = torch.stack([len(weight) * _chance(*weight.shape[2:]) for weight in weights]).sum(0) / len(r2)
    best = r2.amax(1)
    rows = []
    for number, title in enumerate((*OPERATORS, "none")):
        own = operator == number
        low, middle, high = sigma[own].quantile(sigma.new_tensor([0.1, 0.5, 0.9])).tolist() if own.any() else _NONE
        off = (orientation[own] + 45) % 90 - 45
        rows.append(
            OperatorReport(
                title,
                int(own.sum()),
                float(chance[number]),
                float(best[own].mean()),
                (low, middle, high),
                float((off.abs() <= 10).double().mean()) if "derivative" in title else math.nan,
                float(aside[own].double().mean()) if title == "1st derivative" else math.nan,
            )
        )
    return tuple(rows)


def _fitted(weights: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """R^2, operator (one past the last where no fit reaches .5), sigma, orientation, half_pixel of all kernels."""
    fits = [fit_operators(weight) for weight in weights]
    r2, operator, *rest = (
        torch.cat([getattr(fit, field) for fit in fits])
        for field in ("r2", "operator", "sigma", "orientation", "half_pixel")
    )
    return r2, torch.where(r2.amax(1) > 0.5, operator, len(OPERATORS)).where(operator >= 0, operator), *rest


@lru_cache(maxsize=16)
def _chance(height: int, width: int) -> torch.Tensor:
    """The share of random kernels that resemble each operator, and none, (5,)."""
    _, operator, *_ = _fitted(
        [torch.randn(1000, height, width, generator=torch.Generator().manual_seed(0), device="cpu")]
    )
    return torch.bincount(operator, minlength=len(OPERATORS) + 1) / len(operator)


def _operator_table(rows: tuple[OperatorReport, ...]) -> str:
    sigmas = "sigma: 10 %  median   90 %"
    lines = [f"{'resembles':<15} kernels  share  random  mean R2  {sigmas}  along an axis  half a tap aside"]
    count = max(1, sum(row.kernels for row in rows))
    for row in rows:
        low, middle, high = (f"{value:.2f}" for value in row.sigma)
        shares = ["" if math.isnan(share) else f"{share:.0%}" for share in (row.upright, row.half_pixel)]
        lines.append(
            f"{row.operator:<15} {row.kernels:>7,}  {row.kernels / count:>5.0%}  {row.chance:>6.0%}  "
            f"{row.mean_r2:>7.3f}  {low:>11}  {middle:>6}  {high:>5}  {shares[0]:>13}  {shares[1]:>16}".rstrip()
        )
    return "\n".join(lines)


def _calibration(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    notes = [note for note in cfg.get("notes") or () if note.startswith(CALIBRATION_NOTE)]
    return notes[-1].removeprefix("masterkeys: ") if notes else ""


def _row(
    name: str,
    kernel_size: tuple[int, int],
    keys_per_kernel: int,
    bins: int,
    r2: torch.Tensor,
    constant: torch.Tensor,
    first: torch.Tensor,
) -> LayerReport:
    drawn = r2 < 0
    shaped = r2[~constant & ~drawn]
    if not len(shaped):
        shaped = r2.new_full((1,), float("nan") if drawn.any() else 1.0)
    return LayerReport(
        name,
        kernel_size,
        len(r2),
        keys_per_kernel,
        int(constant.sum()),
        int(drawn.sum()),
        float(shaped.mean()),
        float(shaped.quantile(0.5)),
        float(shaped.min()),
        float((shaped > 0.5).float().mean()),
        float((shaped > 0.9).float().mean()),
        tuple(torch.bincount(first[~constant], minlength=bins).tolist()),
        tuple(float((shaped > mark).float().mean()) for mark in COVERAGE),
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
