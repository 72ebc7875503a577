"""Pictures of banks and conversions. Needs matplotlib: ``pip install matplotlib``.

Not imported with the package: ``from timm_masterkeys.study.plotting import plot_bank``. Every function returns a
new matplotlib ``Figure``, to show or to save: ``plot_bank("babaiee2025").savefig("bank.png")``.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..conversion.plan import converted_layers
from ..conversion.report import COVERAGE, ConversionReport, dense_kernels, kernel_fits
from ..conversion.wrapped import unwrapped
from ..errors import ConversionError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank, get_bank
from ..layers import MasterKeyConv2d

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install matplotlib") from error

DIVERGING = "RdBu_r"  # zero is white; readable with any colour vision
# Okabe and Ito's colours, readable with any colour vision; beyond eight they repeat, with hatches.
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
COLOURS = (ORANGE, "#E69F00", "#CC79A7", "#F0E442", "#009E73", BLACK, "#56B4E9", BLUE)


def plot_bank(bank: BankLike = DEFAULT_BANK, kernel_size: tuple[int, int] | None = None) -> Figure:
    """The keys of a bank, four in a row, all on one scale around zero.

    Args:
        bank: Anything ``get_bank`` takes.
        kernel_size: The size to show the keys at; if None 7x7, or the bank's own size if that is smaller.

    Example:
        >>> plot_bank("scale-space-b").savefig("bank.png")
    """
    bank = get_bank(bank)
    size = kernel_size or (min(7, bank.keys.shape[1]), min(7, bank.keys.shape[2]))
    kept = bank.kept(size)
    columns = min(4, len(kept))
    rows = -(-len(kept) // columns)
    figure = Figure(figsize=(1.15 * columns + 0.5, 1.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    image = _draw_keys(dict(zip(kept, axes, strict=False)), bank, size, fontsize=9)
    draw_colour_bar(figure, image, axes)
    figure.suptitle(f"{bank.name}, {size[0]}x{size[1]}", fontsize=10)
    return figure


def plot_used_keys(model: nn.Module) -> Figure:
    """The keys as the layers of a converted model use them: a row, with its own scale, for each bank and kernel size.

    A key that a bank leaves out at a size has no picture there. For a ``SigmaKeyConv2d``, whose kernels have sigmas of
    their own, the keys are those of the bank.

    Args:
        model: A converted model. Not changed.

    Raises:
        ConversionError: The model has no converted layer.
    """
    uses: Counter[Any] = Counter((layer.bank, layer.kernel_size) for layer in _converted(unwrapped(model)).values())
    banks = {bank for bank, _ in uses}
    columns = max(map(len, banks))
    figure = Figure(figsize=(1.05 * columns + 1.4, 1.45 * len(uses) + 0.1), layout="constrained")
    axes = figure.subplots(len(uses), columns, squeeze=False)
    for row, (bank, size) in zip(axes, sorted(uses, key=lambda use: (use[0].name, use[1])), strict=True):
        kept = bank.kept(size)
        image = _draw_keys({index: row[index] for index in kept}, bank, size, fontsize=8)
        for index in set(range(columns)) - set(kept):
            row[index].set(frame_on=False, xticks=[], yticks=[])
            text = f"key {index + 1}\nleft out" if index < len(bank) else ""
            row[index].text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
        name = f"{bank.name}\n" if len(banks) > 1 else ""
        layers = uses[bank, size]
        row[0].set_ylabel(f"{name}{size[0]}x{size[1]}\n{layers} {'layer' if layers == 1 else 'layers'}", fontsize=8)
        draw_colour_bar(figure, image, row)
    return figure


@torch.no_grad()
def plot_kernels(model: nn.Module, dense: nn.Module, count: int = 8) -> Figure:
    """Kernels of the dense model above their fits, with R2: the best fits, those around the median, and the worst.

    Kernel and fit are shown less their means, as R2 compares them, and in units of the pair's largest value, so that
    all pairs share one scale. The fit is that of the model now; R2 is that of its conversion or calibration.

    Args:
        model: A converted model. Not changed.
        dense: The dense model it was converted from.
        count: The number of kernels in each of the three groups.

    Raises:
        ConversionError: No converted layer has fitted kernels, or the dense model lacks a converted layer.
    """
    model, dense = unwrapped(model), unwrapped(dense)
    layers, ranked = _converted(model), []
    for (name, layer), kernels in zip(layers.items(), dense_kernels(dense, layers), strict=True):
        fits = kernel_fits(layer)
        ranked += [(float(fits.r2[i]), name, i, kernels[i, 0]) for i in fits.fitted.nonzero()[:, 0].tolist()]
    if not ranked:
        raise ConversionError(f"{type(model).__name__} has no fitted kernel: its keys are of random initialisation.")
    ranked.sort(key=lambda kernel: -kernel[0])
    count = min(count, len(ranked))
    middle = (len(ranked) - count) // 2
    groups = {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[-count:]}
    figure = Figure(figsize=(1.15 * count + 1.1, 9.2), layout="constrained")
    axes = figure.subplots(2 * len(groups), count, squeeze=False)
    for top, (title, group) in zip(range(0, 2 * len(groups), 2), groups.items(), strict=True):
        axes[top, 0].set_ylabel(f"{title}\ndense", fontsize=9)
        axes[top + 1, 0].set_ylabel(f"{title}\nits fit", fontsize=9)
        for column, (r2, name, index, kernel) in enumerate(group):
            pair = torch.stack([kernel, layers[name].weight[index, 0]]).float().cpu()
            pair = pair - pair.mean((1, 2), keepdim=True)
            pair = pair / pair.abs().max().clamp_min(1e-30)
            for row in (0, 1):
                image = draw_kernel(axes[top + row, column], pair[row], 1)
            axes[top, column].set_title(f"R² {r2:.2f}\n{name.removesuffix('.conv_dw')}:{index}", fontsize=7)
    draw_colour_bar(figure, image, axes, "weight less the kernel's mean, in units of the pair's largest")
    return figure


def plot_keys(report: ConversionReport) -> Figure:
    """The keys that the layers use, by depth: the share of each key among a layer's kernels."""
    counts = np.array([layer.key_histogram for layer in report.layers], float).T
    shares = counts / counts.sum(0).clip(1)
    figure, axis = _by_depth(report)
    below = np.zeros(len(report.layers))
    for index, share in enumerate(shares):
        colour, hatch = COLOURS[index % 8], (None, "//", "..", "xx")[index // 8 % 4]
        axis.bar(range(len(share)), share, 0.85, below, color=colour, hatch=hatch, label=f"key {index + 1}")
        below += share
    axis.set(ylabel="share of kernels", ylim=(0, 1), title="Keys by depth")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_r2(report: ConversionReport) -> Figure:
    """The mean, median and worst R2 of each layer's kernels, by depth."""
    figure, axis = _by_depth(report)
    places = np.arange(len(report.layers))
    worst, median, mean = np.array([(layer.worst_r2, layer.median_r2, layer.mean_r2) for layer in report.layers]).T
    axis.vlines(places, worst, np.maximum(median, mean), color="0.8", linewidth=2, zorder=1)
    axis.scatter(places, mean, marker="o", color=BLUE, label="mean", zorder=2)
    axis.scatter(places, median, marker="_", color=BLACK, label="median", zorder=2)
    axis.scatter(places, worst, marker="v", color=ORANGE, label="worst", zorder=2)
    title = f"Fit by depth; mean over all kernels {report.total.mean_r2:.2f}"
    axis.set(ylabel="R²", ylim=(0, 1.02), title=title)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_coverage(reports: ConversionReport | Mapping[str, ConversionReport]) -> Figure:
    """The share of kernels above each R2, a curve for each report; the further to the upper right, the better.

    Example:
        >>> plot_coverage({"keys": report, "eight random filters": control}).savefig("coverage.png")
    """
    named = {reports.bank: reports} if isinstance(reports, ConversionReport) else reports
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel="R²", ylabel="share of kernels above", xlim=(0, 1), ylim=(0, 1.02), title="Coverage")
    axis.grid(alpha=0.3)
    styles = ("-", "--", ":", "-.")
    for index, (name, report) in enumerate(named.items()):
        x, y = [0, *COVERAGE, 1], [1, *report.total.coverage, 0]
        axis.plot(x, y, styles[index % 4], marker=".", color=COLOURS[index % 8 - 1], label=name)
    axis.legend(fontsize=8)
    return figure


def draw_kernel(axis: Axes, kernel: torch.Tensor, most: float) -> AxesImage:
    """Draws one kernel, with colours from ``-most`` to ``most`` (zero is white) and without ticks."""
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    return axis.imshow(kernel.float().cpu().numpy(), cmap=DIVERGING, vmin=-most, vmax=most)


def draw_colour_bar(figure: Figure, image: AxesImage, axes: np.ndarray, label: str = "") -> None:
    """Draws the scale of an image to the right of the axes that share it."""
    parents = axes.flatten().tolist()
    bar = figure.colorbar(image, ax=parents, shrink=0.8, pad=0.01, aspect=20, panchor=False)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def _draw_keys(axes: Mapping[int, Axes], bank: KeyBank, size: tuple[int, int], fontsize: int) -> AxesImage:
    """Draws the keys of a bank at a size, each into the axes of its index in the bank, all on one scale."""
    keys = bank.keys_for(size)
    for key, index in zip(keys, bank.kept(size), strict=True):
        image = draw_kernel(axes[index], key, float(keys.abs().max()))
        axes[index].set_title(f"key {index + 1}", fontsize=fontsize)
    return image


def _converted(model: nn.Module) -> dict[str, MasterKeyConv2d]:
    layers = converted_layers(model)
    if not layers:
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    return layers


def _by_depth(report: ConversionReport) -> tuple[Figure, Axes]:
    """A figure and its axes, with a place for each layer and at most 40 of their names below."""
    names = [layer.name.removesuffix(".conv_dw") or "all" for layer in report.layers]
    size = min(14, max(4.8, 0.28 * len(names) + 2)), 2.7 + 0.055 * max(map(len, names))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    step = -(-len(names) // 40)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
    axis.set_xlim(-0.6, len(names) - 0.4)
    return figure, axis
