"""Pictures of banks, conversions and searches. Needs matplotlib: ``pip install timm_masterkeys[plot]``.

Not imported with the package: ``from timm_masterkeys.study.plotting import plot_bank``. Every function returns a
matplotlib ``Figure`` of its own, to show or to save: ``plot_bank("babaiee2025").savefig("bank.png")``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ConversionError
from ..keys.banks import DEFAULT_BANK, Bank, get_bank
from ..layers import MasterKeyConv2d
from ..models.report import COVERAGE, ConversionReport
from ..models.wrapped import unwrapped
from .discovery import Discovery

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install timm_masterkeys[plot]") from error

DIVERGING = "RdBu_r"  # zero is white; told apart with any colour vision
# Okabe and Ito's colours, told apart with any colour vision; beyond eight they come again, hatched.
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
COLOURS = (ORANGE, "#E69F00", "#CC79A7", "#F0E442", "#009E73", BLACK, "#56B4E9", BLUE)


def plot_bank(bank: Bank = DEFAULT_BANK, kernel_size: tuple[int, int] | None = None) -> Figure:
    """The keys of a bank, four in a row, all on one scale around zero.

    Args:
        bank: Anything ``get_bank`` takes.
        kernel_size: The size to bring them to; 7x7 if None, or the bank's own if that is smaller.

    Example:
        >>> plot_bank("scale-space-b").savefig("bank.png")
    """
    bank = get_bank(bank)
    size = kernel_size or (min(7, bank.keys.shape[1]), min(7, bank.keys.shape[2]))
    keys, kept = bank.keys_for(size), bank.kept(size)
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(1.15 * columns + 0.5, 1.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    most = float(keys.abs().max())
    for axis in axes:
        axis.axis("off")
    for axis, key, index in zip(axes, keys, kept, strict=False):
        image = _kernel(axis, key, most)
        axis.set_title(f"key {index + 1}", fontsize=9)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.8, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"{bank.name}, {size[0]}x{size[1]}", fontsize=10)
    return figure


@torch.no_grad()
def plot_kernels(model: nn.Module, reference: nn.Module, count: int = 8) -> Figure:
    """Kernels of the dense network above what conversion made of them, with their R^2: the worst met, then the best.

    A kernel and its fit are on one scale around zero; the fit is as it is now, R^2 that of its projection.

    Args:
        model: A converted model. Not changed.
        reference: The dense model it was made from.
        count: Kernels of each sort.

    Raises:
        ConversionError: No converted layer with fitted kernels, or the reference has other layers.
    """
    model, reference = unwrapped(model), unwrapped(reference)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MasterKeyConv2d)}
    found = []
    for name, layer in layers.items():
        try:
            original: Any = reference.get_submodule(name).weight
        except AttributeError as error:
            raise ConversionError(f"The reference has no layer '{name}'. Give the dense model of this one.") from error
        shaped = (layer.r2 >= 0) & ~(layer.scale.view(layer.out_channels, -1).eq(0).all(1) & layer.r2.eq(1))
        found += [(float(layer.r2[i]), name, i, original[i, 0]) for i in shaped.nonzero()[:, 0].tolist()]
    if not found:
        raise ConversionError(f"{type(model).__name__} holds no kernel that was fitted: convert_to_masterkeys first.")
    found.sort(key=lambda kernel: kernel[0])
    count = min(count, len(found))
    figure = Figure(figsize=(1.15 * count + 0.6, 6.6), layout="constrained")
    axes = figure.subplots(4, count, squeeze=False)
    for top, kernels in ((0, found[:count]), (2, found[-count:])):
        for column, (r2, name, index, original) in enumerate(kernels):
            fitted = layers[name].weight[index, 0]
            most = float(torch.stack([original, fitted]).abs().max()) or 1.0
            for row, kernel in ((top, original), (top + 1, fitted)):
                _kernel(axes[row, column], kernel, most)
            axes[top, column].set_title(f"R² {r2:.2f}\n{name.removesuffix('.conv_dw')}:{index}", fontsize=7)
    for row, title in enumerate(("worst", "its fit", "best", "its fit")):
        axes[row, 0].set_ylabel(title, fontsize=9)
    return figure


def plot_keys(report: ConversionReport) -> Figure:
    """Which keys the layers use, by depth: shares of each layer's kernels."""
    counts = np.array([layer.key_histogram for layer in report.layers], float).T
    shares = counts / counts.sum(0).clip(1)
    figure = Figure(figsize=(_width(report), 3.6), layout="constrained")
    axis = figure.subplots()
    places, below = np.arange(len(report.layers)), np.zeros(len(report.layers))
    for index, share in enumerate(shares):
        colour, hatch = COLOURS[index % 8], (None, "//", "..", "xx")[index // 8 % 4]
        axis.bar(places, share, 0.85, below, color=colour, hatch=hatch, label=f"key {index + 1}")
        below += share
    axis.set(ylabel="share of kernels", ylim=(0, 1), xlim=(-0.6, len(places) - 0.4), title="Keys by depth")
    _layers(axis, report)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_r2(report: ConversionReport) -> Figure:
    """How well each layer's kernels are met, by depth: mean, median and worst R^2."""
    figure = Figure(figsize=(_width(report), 3.4), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(report.layers))
    worst, median, mean = (
        np.array([getattr(layer, field) for layer in report.layers]) for field in ("worst_r2", "median_r2", "mean_r2")
    )
    axis.vlines(places, worst, np.maximum(median, mean), color="0.8", linewidth=2, zorder=1)
    for values, marker, colour, label in (
        (mean, "o", BLUE, "mean"),
        (median, "_", BLACK, "median"),
        (worst, "v", ORANGE, "worst"),
    ):
        axis.scatter(places, values, marker=marker, color=colour, label=label, zorder=2)
    title = f"Fit by depth; mean over all kernels {report.total.mean_r2:.2f}"
    axis.set(ylabel="R²", ylim=(0, 1.02), xlim=(-0.6, len(places) - 0.4), title=title)
    axis.grid(axis="y", alpha=0.3)
    _layers(axis, report)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_coverage(reports: ConversionReport | Mapping[str, ConversionReport]) -> Figure:
    """The share of kernels above each R^2, a curve a report; the further to the upper right, the better.

    Example:
        >>> plot_coverage({"keys": report, "eight random filters": control}).savefig("coverage.png")
    """
    named = {reports.bank: reports} if isinstance(reports, ConversionReport) else reports
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axis = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, report) in enumerate(named.items()):
        x, y = [0, *COVERAGE, 1], [1, *report.total.coverage, 0]
        axis.plot(x, y, styles[index % 4], marker=".", color=COLOURS[index % 8 - 1], label=name)
    axis.set(xlabel="R²", ylabel="share of kernels above", xlim=(0, 1), ylim=(0, 1.02), title="Coverage")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def plot_elimination(found: Discovery) -> Figure:
    """The score by number of keys in a search, and where it bends."""
    counts = sorted(count for count in found.curve if count <= 25)
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(counts, [found.curve[count] for count in counts], ".-", color=BLUE)
    ends = [counts[0], counts[-1]]
    axis.plot(ends, [found.curve[end] for end in ends], ":", color="0.5", label="chord")
    axis.axvline(found.elbow, color=ORANGE, linestyle="--", label=f"elbow: {found.elbow} keys, farthest above it")
    axis.set(xlabel="keys", ylabel="score", title=f"Search of {found.searched:,} kernels")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _kernel(axis: Axes, kernel: torch.Tensor, most: float) -> AxesImage:
    """Draws one kernel, colours centred at zero; axes without ticks."""
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    return axis.imshow(kernel.float().cpu().numpy(), cmap=DIVERGING, vmin=-most, vmax=most)


def _width(report: ConversionReport) -> float:
    return min(14, max(4.8, 0.28 * len(report.layers) + 2))


def _layers(axis: Axes, report: ConversionReport) -> None:
    """Names under the bars; of many layers every second, third ... one."""
    step = -(-len(report.layers) // 40)
    names = [layer.name.removesuffix(".conv_dw") or "all" for layer in report.layers][::step]
    axis.set_xticks(range(0, len(report.layers), step), names, rotation=90, fontsize=7)
