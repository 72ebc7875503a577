"""Time of the shifts' gradient on the CPU, computed in two ways, in the depthwise layers of real networks.

A backward pass needs the gradients of a layer's input and of its shifts. The shifts' gradient is the sum over the taps
of the whole weight gradient ("whole"), or comes from sums of the input over the kernel's windows, in parts that fit
into the cache ("sums"). The two ways alternate in every layer. Medians are printed, and their ratio: below 1, sums are
faster. ``WHOLE_UP_TO`` of ``timm_masterkeys/layers/depthwise.py`` follows from this. Run it on an idle machine, with
the variables of "Training cost" in examples/README.md: a busy machine, or one that fetches new pages, favours the way
that computes less.

    python examples/benchmark_shift_gradient.py --threads 1 2 --csv shift_gradient.csv
    python examples/benchmark_shift_gradient.py --models convnext_tiny --rounds 5
"""

import argparse
import csv
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import timm
import torch

from timm_masterkeys import MasterKeyConv2d, convert_to_masterkeys
from timm_masterkeys.conversion.table import table
from timm_masterkeys.layers import depthwise

NETWORKS = ["tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_tiny", "starnet_s1", "efficientnet_b0"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WAYS = {"whole": 99, "sums": 0}  # WHOLE_UP_TO
SIDE = 224


class Case(NamedTuple):
    """The properties of a layer and its input on which the speed depends."""

    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    bias: bool


def cases(name: str) -> dict[Case, tuple[int, MasterKeyConv2d]]:
    """The kinds of depthwise layers of a network: the number of layers of each kind, and one of them."""
    model = convert_to_masterkeys(timm.create_model(name)).eval()
    count: Counter[Case] = Counter()
    layers: dict[Case, MasterKeyConv2d] = {}

    def note(layer: MasterKeyConv2d, args: Any) -> None:
        kernel, stride = layer.kernel_size, layer.stride
        case = Case(*args[0].shape[1:], kernel, stride, layer.bias is not None)  # type: ignore[arg-type]
        count[case] += 1
        layers[case] = layer

    for module in model.modules():
        if isinstance(module, MasterKeyConv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.randn(1, 3, SIDE, SIDE))
    for layer in layers.values():
        layer._forward_pre_hooks.clear()
    return {case: (count[case], layer) for case, layer in layers.items()}


def backward_times(layer: MasterKeyConv2d, input: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of a layer's backward pass, by way; the ways alternate, and the first turn is not counted."""
    input.requires_grad_()
    output = layer(input)
    inputs, upstream = [input, *layer.parameters()], torch.randn_like(output)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    repeats = 1
    for turn in range(-1, rounds):
        for way, depthwise.WHOLE_UP_TO in WAYS.items():
            start = time.perf_counter()
            for _ in range(repeats):
                torch.autograd.grad(output, inputs, upstream, retain_graph=True)
            spent = time.perf_counter() - start
            if turn >= 0:
                times[way].append(spent / repeats * 1e3)
        if turn < 0:
            repeats = max(1, math.ceil(0.02 / spent))  # 20 ms a turn, so that the clock does not matter
    return {way: median(values) for way, values in times.items()}


def rows(names: list[str], batch_size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each kind of layer and memory layout."""
    for name in names:
        for case, (count, layer) in cases(name).items():
            for layout, memory_format in LAYOUTS.items():
                input = torch.randn(batch_size, case.channels, case.height, case.width)
                times = backward_times(layer, input.to(memory_format=memory_format), rounds)
                yield {
                    "threads": torch.get_num_threads(),
                    "network": name,
                    "layers": count,
                    "channels": case.channels,
                    "height": case.height,
                    "kernel": "x".join(map(str, case.kernel)),
                    "stride": case.stride[0],
                    "layout": layout,
                    "input_bytes": input.nbytes,
                    "whole_ms": round(times["whole"], 4),
                    "sums_ms": round(times["sums"], 4),
                    "ratio": round(times["sums"] / times["whole"], 3),
                }


def main() -> None:
    """Prints the rows, then for each network the ratio of all its layers together, by kernel size and layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NETWORKS, help="timm names")
    parser.add_argument("--batch-size", type=int, default=8, help="images")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=9, help="turns of either way, of which the medians are taken")
    parser.add_argument("--csv", type=argparse.FileType("w"), default=sys.stdout, help="file for the rows")
    args = parser.parse_args()
    torch.manual_seed(0)
    total: defaultdict[tuple[int, str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    writer = None
    for threads in args.threads:
        torch.set_num_threads(threads)
        for row in rows(args.models, args.batch_size, args.rounds):
            if writer is None:
                writer = csv.DictWriter(args.csv, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            args.csv.flush()
            both = total[threads, row["network"], row["kernel"], row["layout"]]
            both[0] += row["layers"] * row["whole_ms"]
            both[1] += row["layers"] * row["sums_ms"]
    header = ["threads", "network", "kernel", "layout", "whole ms", "sums ms", "ratio"]
    print(f"Batches of {args.batch_size}, all layers together")
    print(table(header, [[*map(str, key), f"{w:.2f}", f"{s:.2f}", f"{s / w:.2f}"] for key, (w, s) in total.items()]))


if __name__ == "__main__":
    main()
