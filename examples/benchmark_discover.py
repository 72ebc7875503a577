"""Time and memory of the search for a bank, by the number of kernels.

The kernels are published keys, with noise of the same standard deviation.

    python examples/benchmark_discover.py --kernels 2500 10000 40000
"""

import argparse
import resource
import time

import torch
from intervals import print_head, print_row

from timm_masterkeys.keys.banks import get_bank
from timm_masterkeys.study.discovery import Kernels, collect_kernels, discover_bank


def kernels_like(count: int, size: int) -> Kernels:
    """Published keys chosen at random, with noise of the same standard deviation."""
    generator = torch.Generator().manual_seed(0)
    keys = get_bank("babaiee2025").keys_for((size, size))
    chosen = keys[torch.randint(len(keys), (count,), generator=generator)]
    noise = torch.randn(chosen.shape, generator=generator)
    noisy = chosen + noise * chosen.std((1, 2), keepdim=True)
    return collect_kernels({"noisy": [noisy]}, (size, size))


def main() -> None:
    """Prints a row for each number of kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", type=int, default=[2500, 10000, 40000])
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU)")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else args.device}\n")
    print_head(["kernels", "autoencoder, s", "lines, s", "ratio", "peak memory, MB"])
    for count in args.kernels:
        kernels = kernels_like(count, args.kernel_size)
        seconds = []
        for method in ("autoencoder", "lines"):
            start = time.perf_counter()
            discover_bank(kernels, method=method, device=args.device)
            seconds.append(time.perf_counter() - start)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures = (f"{value:.1f}" for value in (*seconds, seconds[0] / seconds[1]))
        print_row([f"{count:,}", *figures, f"{memory:,.0f}"])


if __name__ == "__main__":
    main()
