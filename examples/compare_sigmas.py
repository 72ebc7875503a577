"""R2 of real kernels fitted by fixed keys, and by keys with sigmas fitted to each kernel.

python examples/compare_sigmas.py kernels/*.npz   # networks: .npz files of arrays (C, kh, kw), checkpoints, timm names
"""

import argparse
import time
from pathlib import Path
from statistics import mean

from intervals import print_head, print_row

from timm_masterkeys import get_bank
from timm_masterkeys.keys.sigma_fit import fit_sigmas
from timm_masterkeys.study.kernels import collect_kernels, read_kernels

BANK = get_bank("scale-space-b")


def main() -> None:
    """Prints a row for each network and kernel size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--fewest", type=int, default=32, help="kernels of a size (default: %(default)s)")
    args = parser.parse_args()
    print_head(["network", "size", "kernels", "published", "scale-space-b", "sigmas fitted", "seconds"])
    means: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for network in args.networks:
        layers = read_kernels(network)
        for size in sorted({(layer.shape[1], layer.shape[2]) for layer in layers if layer[0].numel() > 1}):
            kernels = collect_kernels({network: [layer for layer in layers if layer.shape[1:] == size]}, size)
            if len(kernels) < args.fewest:
                continue
            start = time.perf_counter()
            fitted = fit_sigmas(kernels.values.unflatten(1, (1, *size)), BANK.kept(size))[0].r2
            seconds = time.perf_counter() - start
            row = tuple(float(r2.mean()) for r2 in (kernels.fit("babaiee2025")[0], kernels.fit(BANK)[0], fitted))
            means.setdefault(size, []).append(row)
            labels = Path(network).stem, f"{size[0]}x{size[1]}", f"{len(kernels):,}"
            print_row([*labels, *(f"{value:.3f}" for value in row), f"{seconds:.1f}"])
    for size, rows in sorted(means.items()):
        means = (f"{mean(column):.3f}" for column in zip(*rows, strict=True))
        print_row([f"mean of {len(rows)}", f"{size[0]}x{size[1]}", "", *means, ""])


if __name__ == "__main__":
    main()
