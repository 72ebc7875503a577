"""How well the kernels of a converted model fit those of its dense model."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError
from ..layers import MasterKeyConv2d
from .operator_report import OPERATOR_TITLES, OperatorReport, report_operators
from .plan import converted_layers, is_dense_depthwise, stage_of
from .record import CalibrationRecord, Record, read_record
from .table import number, share, table
from .wrapped import unwrapped

COVERAGE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # R2 of the coverage curve
R2_MEANS = "R2: the share of a dense kernel's variance over its taps that the fit explains (1: all of it)."


class KernelFits(NamedTuple):
    """The fit of each of C kernels of a converted layer, on the CPU.

    Attributes:
        r2: (C,) float32, valid where ``fitted``.
        constant: (C,) bool, kernels that are constant in the dense model: they have no variance, so no R2.
        random: (C,) bool, kernels with keys of random initialisation: they have no fit.
        key: (C,) int64, the first key of each kernel, by index in the bank.
    """

    r2: torch.Tensor
    constant: torch.Tensor
    random: torch.Tensor
    key: torch.Tensor

    @property
    def fitted(self) -> torch.Tensor:
        """(C,) bool, kernels that have an R2."""
        return ~self.constant & ~self.random


def kernel_fits(layer: MasterKeyConv2d) -> KernelFits:
    """The R2 and the first key of each kernel of a layer, and which kernels have no R2."""
    size: Any = layer.kernel_size  # nn.Conv2d's is tuple[int, ...]
    kept = torch.tensor(layer.bank.kept(size), device="cpu")
    marks = layer.constant_kernels().cpu(), layer.random_kernels().cpu()
    return KernelFits(layer.r2.float().cpu(), *marks, kept[layer.key_rows()[:, 0].cpu()])


@dataclass(frozen=True)
class LayerReport:
    """The fit of one layer, or of several together. Constant kernels have no R2 and are only counted.

    Attributes:
        name: Module name.
        kernel_size: (height, width).
        channels: Number of kernels, which is that of output channels.
        keys_per_kernel: Keys per kernel.
        constant: Number of kernels that are constant or all zero.
        random: Number of kernels of random initialisation, which have no fit.
        mean_r2: Mean R2, in [0, 1]. All figures of R2 are NaN where no kernel has an R2.
        median_r2: Median R2.
        worst_r2: Smallest R2.
        above_50: Share of kernels with R2 above 0.5.
        above_90: Share of kernels with R2 above 0.9.
        key_histogram: How many kernels have each key of the bank as their first, by index in the bank.
        coverage: Share of kernels with R2 above each of ``COVERAGE``.
    """

    name: str
    kernel_size: tuple[int, int]
    channels: int
    keys_per_kernel: int
    constant: int
    random: int
    mean_r2: float
    median_r2: float
    worst_r2: float
    above_50: float
    above_90: float
    key_histogram: tuple[int, ...]
    coverage: tuple[float, ...]

    def cells(self) -> list[str]:
        """Its row of a table, under ``ConversionReport.titles``."""
        return [
            self.name,
            "x".join(map(str, self.kernel_size)) if self.kernel_size[0] else "",
            f"{self.channels:,}",
            str(self.keys_per_kernel or ""),
            *map(number, (self.mean_r2, self.median_r2, self.worst_r2)),
            *map(share, (self.above_50, self.above_90)),
            *map(str, self.key_histogram),
        ]


@dataclass(frozen=True)
class ConversionReport:
    """The fit of a converted model; ``str()`` is a table, ``to_json()`` the same as JSON.

    Attributes:
        bank: Name of the bank (names, if layers differ).
        layers: One LayerReport for each converted layer.
        stages: The same by stage, a layer's name up to its first number (``stages.0``, ``blocks.3``).
        total: All kernels together.
        trainable_before: Trainable parameters of the model with dense, trainable depthwise kernels.
        trainable_after: Trainable parameters now.
        stored_before: Numbers stored for the dense model's parameters.
        stored_after: Numbers stored now: other parameters, key indices, scales, shifts and the keys themselves.
        dense: Number of depthwise layers that are not converted.
        record: The source of the model's weights and the figures of their calibration.
        operators: The operators that the dense kernels resemble; empty if the dense model was not given.
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
    record: Record = field(default_factory=Record)
    operators: tuple[OperatorReport, ...] = ()

    @property
    def calibration(self) -> CalibrationRecord | None:
        """The figures of the last calibration; None if the present weights are not calibrated."""
        return self.record.calibration

    def to_json(self) -> str:
        """The report as JSON text, null where a figure does not exist."""
        figures = asdict(replace(self, record=Record()))
        del figures["record"]
        figures["calibration"] = asdict(self.calibration) if self.calibration else None
        return json.dumps(_finite(figures), indent=2, allow_nan=False)

    @property
    def titles(self) -> tuple[str, ...]:
        """The titles of a table of layers; ``k1``, ``k2``, ... count the kernels that have each key."""
        keys = (f"k{index + 1}" for index in range(len(self.total.key_histogram)))
        return ("layer", "kernel", "channels", "keys", "mean R2", "median", "worst", "R2>.5", "R2>.9", *keys)

    @property
    def rows(self) -> tuple[LayerReport, ...]:
        """The rows of a table: the layers, the stages (where they are fewer), and the total."""
        stages = self.stages if len(self.stages) < len(self.layers) else ()
        return (*self.layers, *stages, self.total)

    @property
    def notes(self) -> list[str]:
        """What a table does not show: kernels without an R2, and layers that are not converted."""
        notes = [
            (self.total.constant, "kernels are constant in the dense model: they have no R2"),
            (self.total.random, "kernels have keys of random initialisation: they are not fitted and have no R2"),
            (self.dense, "depthwise layers are not converted"),
        ]
        return [f"{count:,} {text}" for count, text in notes if count]

    def __str__(self) -> str:
        lines = [
            R2_MEANS,
            f"k1 to k{len(self.total.key_histogram)} count the kernels that have each key (of several, the first).",
            "",
            table(self.titles, (row.cells() for row in self.rows)),
            "",
            table(("R2 above", *map(str, COVERAGE)), [("kernels", *map(share, self.total.coverage))]),
            "",
        ]
        if self.operators:
            lines += ["Which operator the dense kernels resemble, and how many random kernels of the same sizes do:"]
            lines += [table(OPERATOR_TITLES, (row.cells() for row in self.operators)), ""]
        lines += [
            *self.notes,
            f"bank {self.bank}; parameters: trainable {self.trainable_before:,} -> {self.trainable_after:,}, "
            f"stored {self.stored_before:,} -> {self.stored_after:,}",
        ]
        if self.calibration:
            lines.append(f"calibrated {self.calibration.summary()}")
        return "\n".join(lines)


@torch.no_grad()
def conversion_report(model: nn.Module, dense: nn.Module | None = None) -> ConversionReport:
    """Reports how well the kernels of each converted layer fit those of the dense model.

    R2 is that of the fit when the model was converted or calibrated; later training does not change it. Kernels of
    random initialisation have no R2.

    Args:
        model: A converted model, wrapped or not. Not changed.
        dense: The dense model it was made from; if given, the report says which operators its kernels resemble.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, is on the meta device, or has lazy layers that never ran;
            the dense model lacks one of the layers.

    Example:
        >>> report = conversion_report(model)
        >>> print(report)
        >>> report.total.mean_r2
    """
    model = unwrapped(model)
    layers = converted_layers(model, required=True)
    report = report_layers(model, layers)
    if dense is not None:
        report = replace(report, operators=report_operators(dense_kernels(unwrapped(dense), layers)))
    return report


@torch.no_grad()
def report_layers(model: nn.Module, layers: Mapping[str, MasterKeyConv2d]) -> ConversionReport:
    """The report of a model with these converted layers, without operators; errors as for ``conversion_report``."""
    if any(layer.keys.is_meta for layer in layers.values()):
        raise ConversionError("The model is on the meta device, its kernels have no values. Load weights first.")
    if any(map(is_lazy, model.parameters())):
        raise ConversionError("The model has lazy layers, whose sizes are not known yet. Run it once first.")
    for layer in layers.values():
        layer.check_values()
    fits = {name: kernel_fits(layer) for name, layer in layers.items()}
    by_stage: dict[str, list[KernelFits]] = {}
    for name, fit in fits.items():
        by_stage.setdefault(stage_of(name), []).append(fit)
    banks = [layer.bank for layer in layers.values()]
    bins = max(map(len, banks))
    return ConversionReport(
        bank=", ".join(sorted({bank.name for bank in banks})),
        layers=tuple(_layer_report(name, [fits[name]], bins, layer) for name, layer in layers.items()),
        stages=tuple(_layer_report(name, stage, bins) for name, stage in by_stage.items()),
        total=_layer_report("total", list(fits.values()), bins),
        **_parameters(model, list(layers.values())),
        dense=sum(map(is_dense_depthwise, model.modules())),
        record=read_record(model),
    )


def _layer_report(
    name: str, fits: Sequence[KernelFits], bins: int, layer: MasterKeyConv2d | None = None
) -> LayerReport:
    """The report of one layer, or of several layers together."""
    kernels = KernelFits(*(torch.cat(parts) for parts in zip(*fits, strict=True)))
    r2 = kernels.r2[kernels.fitted]
    if not len(r2):
        r2 = r2.new_full((1,), math.nan)

    def above(threshold: float) -> float:
        return float(torch.where(r2.isnan(), r2, (r2 > threshold).float()).mean())

    size: Any = (0, 0) if layer is None else layer.kernel_size
    return LayerReport(
        name=name,
        kernel_size=size,
        channels=len(kernels.r2),
        keys_per_kernel=0 if layer is None else layer.keys_per_kernel,
        constant=int(kernels.constant.sum()),
        random=int(kernels.random.sum()),
        mean_r2=float(r2.mean()),
        median_r2=float(r2.quantile(0.5)),
        worst_r2=float(r2.min()),
        above_50=above(0.5),
        above_90=above(0.9),
        key_histogram=tuple(torch.bincount(kernels.key[~kernels.constant], minlength=bins).tolist()),
        coverage=tuple(map(above, COVERAGE)),
    )


def _parameters(model: nn.Module, layers: Sequence[MasterKeyConv2d]) -> dict[str, Any]:
    """The numbers of trainable and of stored parameters, with dense kernels and now, by field of the report."""
    stored = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer_parameters = [p for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "bias"]
    kernels = sum(layer.out_channels * layer.keys[0].numel() for layer in layers)
    compact = sum(getattr(layer, name).numel() for layer in layers for name in layer.compact_entries if name != "r2")
    rest = stored - sum(p.numel() for p in layer_parameters)
    return {
        "trainable_before": trainable - sum(p.numel() for p in layer_parameters if p.requires_grad) + kernels,
        "trainable_after": trainable,
        "stored_before": rest + kernels,
        "stored_after": rest + compact,
    }


def dense_kernels(dense: nn.Module, layers: Mapping[str, MasterKeyConv2d]) -> list[torch.Tensor]:
    """The kernels of converted layers in the dense model; raises ConversionError if it is another one."""
    modules = dict(dense.named_modules())
    for name, layer in layers.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or conv.weight.shape != layer.weight.shape:
            raise ConversionError(
                f"The dense model has no convolution '{name}' with a weight of {tuple(layer.weight.shape)}. Give the "
                "one this was made from."
            )
    return [modules[name].weight.detach() for name in layers]


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
