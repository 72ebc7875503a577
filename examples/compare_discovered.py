"""Leaves one network out: banks discovered on the other ones, measured on its kernels. Prints Markdown tables.

FOLDER holds the depthwise kernels of trained networks, one ``.npz`` of arrays (C, kh, kw) a network.

    python examples/compare_discovered.py FOLDER
    python examples/compare_discovered.py FOLDER --kernel-size 5 --keys 4 8 16
    python examples/compare_discovered.py FOLDER --without proxyless.npz --output bank.safetensors
"""

import argparse
import time
from pathlib import Path
from statistics import mean

from intervals import print_head, print_row

from timm_masterkeys.study.discovery import collect_kernels, discover_bank, match_banks
from timm_masterkeys.study.kernels import read_kernels

SAME = 0.8  # keys with at least this absolute correlation to a published key count as the same


def main() -> None:
    """Prints a row for each network and number of keys, and saves the bank if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--keys", nargs="+", type=int, default=[8])
    parser.add_argument("--method", default="autoencoder", choices=["autoencoder", "lines"])
    parser.add_argument("--fewest", type=int, default=32, help="kernels a network must have of this size")
    parser.add_argument("--without", metavar="NETWORK", help="only this one is left out")
    parser.add_argument("--output", help="save the bank found without it (.safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = (args.kernel_size, args.kernel_size)
    sources = {}
    for path in sorted(args.folder.glob("*.npz")):
        arrays = [array for array in read_kernels(path) if tuple(array.shape[1:]) == size]
        if sum(map(len, arrays)) >= args.fewest:
            sources[path.name] = arrays
    kernels = collect_kernels(sources, size)
    fits = ("found", "lines", "published", "random", "ceiling")
    print_head(["left out", "kernels", "keys", *fits, "elbow", "same", "seconds"])
    for keys in args.keys:
        rows = []
        for name in [args.without] if args.without else list(sources):
            start = time.perf_counter()
            discovery = discover_bank(kernels, held_out=[name], keys=keys, method=args.method, seed=args.seed)
            seconds = time.perf_counter() - start
            same = sum(value >= SAME for _, _, value in match_banks(discovery.bank, "babaiee2025", size))
            rows.append(list(discovery.r2.values()))
            cells = (f"{value:.3f}" for value in rows[-1])
            print_row([name, f"{discovery.held_out:,}", keys, *cells, discovery.elbow, same, f"{seconds:.0f}"])
            if args.output:
                discovery.bank.save(args.output)
        print_row(["mean", "", keys, *(f"{mean(column):.3f}" for column in zip(*rows, strict=True)), "", "", ""])


if __name__ == "__main__":
    main()
