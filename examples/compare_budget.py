"""Compares ``convert_to_agreement`` with the same number of keys for every kernel: keys and agreement.

FOLDER holds photographs with a FOLDER/labels.csv (columns file and class_index). All networks are calibrated with the
same crops of the photographs that ship, and crops of other ones are held out. With --own every other photograph of
FOLDER takes their place: three quarters calibrate, one is held out. The remaining photographs of FOLDER measure the
returned network and the uniform ones, not those that the search only tries. Rows are added to a CSV file.

    python examples/compare_budget.py FOLDER --network lite0 --agreement 0.8
    python examples/compare_budget.py FOLDER --network lite0 --agreement 0.95 --own
"""

import argparse
import time
from pathlib import Path

import torch
from benchmark_fidelity import Benchmark
from intervals import append_row, print_head, print_row
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.images import Images, split_for_choice

COLUMNS = [
    "network",
    "images",
    "keys chosen",
    "keys",
    "per kernel",
    "agreement held out",
    "divergence held out",
    "top1",
    "agreement",
    "divergence",
    "s",
]


def main() -> None:
    """Measures, adds each row to the file at once, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--network", default="lite0", help="lite0, a timm name, or FILE.safetensors")
    parser.add_argument("--agreement", type=float, default=0.95)
    parser.add_argument("--own", action="store_true", help="calibrate with half of the photographs of FOLDER")
    parser.add_argument("--keys-per-kernel", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "key_budget.csv")
    args = parser.parse_args()
    benchmark = Benchmark(args.network, args.folder)
    dense, every = benchmark.dense, torch.arange(len(benchmark.images.x))
    images: Images = "builtin"
    if args.own:
        images, every = benchmark.images.x[::2], every[1::2]
    fitted, held_out = split_for_choice(images, dense)

    def photographs(model: nn.Module) -> list[str]:
        return [f"{value:.3f}" for value in benchmark.measure(benchmark.outputs(model, every), every)]

    def write(chosen: str, keys: int, figures: list[str]) -> None:
        row = [benchmark.name, "own" if args.own else "builtin", chosen, str(keys), f"{keys / kernels:.2f}", *figures]
        print_row(row)
        append_row(args.results, COLUMNS, row)

    kernels = sum(layer.out_channels for layer in mk.plan_conversion(dense).converted)
    print_head(COLUMNS)
    model, budget = mk.convert_to_agreement(dense, args.agreement, images)
    for network in budget.tried:
        figures = [f"{100 * network.figures['agreement']:.3f}", f"{network.figures['divergence']:.3f}"]
        figures += [*photographs(model), f"{budget.seconds:.0f}"] if network == budget.chosen else [""] * 4
        write(f"for {args.agreement:.1%}" if network == budget.chosen else "tried", network.keys, figures)
    print(f"\n{budget}\n", flush=True)
    for count in args.keys_per_kernel:
        start = time.perf_counter()
        model = mk.convert_to_masterkeys(dense, keys_per_kernel=count)
        after = mk.calibrate_masterkeys(model, dense, fitted, held_out=held_out).record.after
        seconds = time.perf_counter() - start
        figures = [f"{100 * after['agreement']:.3f}", f"{after['divergence']:.3f}"]
        write("uniform", count * kernels, [*figures, *photographs(model), f"{seconds:.0f}"])


if __name__ == "__main__":
    main()
