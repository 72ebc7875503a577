"""The table of the README: EfficientNet-Lite0 converted in several ways, all measured on the same photographs.

Some rows are calibrated with half of FOLDER's images; the other half is held out and measures all rows. Needs a
FOLDER/labels.csv (columns file and class_index).

    python examples/front_door.py FOLDER --results examples/results/front_door.csv
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_fidelity import Benchmark
from intervals import append_row, print_head, print_row

import timm_masterkeys as mk

COLUMNS = ["network", "calibrated with", "top1", "agreement", "sure", "sure images", "dense layers", "seconds"]


class Table:
    """Measures networks on the held-out half of the images."""

    def __init__(self, folder: str, results: Path) -> None:
        self.benchmark = Benchmark("lite0", folder)
        self.dense, self.results = self.benchmark.dense, results
        fitted, self.held_out = self.benchmark.images.halves(0)
        self.fitted = self.benchmark.images.x[fitted]

    def row(self, name: str, images: str, model: Any, seconds: float) -> None:
        """Measures a network, prints its row and adds it to the file of results."""
        out, expected = self.benchmark.outputs(model.eval(), self.held_out), self.benchmark.expected[self.held_out]
        top1, agreement, _ = self.benchmark.measure(out, self.held_out)
        sure = expected.softmax(1).amax(1) > 0.5
        same = float((out.argmax(1) == expected.argmax(1))[sure].double().mean()) * 100
        left = len(mk.plan_conversion(model).converted) if model is not self.dense else ""
        figures = [f"{top1:.1f}", f"{agreement:.1f}", f"{same:.1f}", int(sure.sum()), left, f"{seconds:.0f}"]
        print_row([name, images, *figures])
        append_row(self.results, COLUMNS, [name, images, *figures])

    def converted(self, name: str, keys: int, images: str, bank: str = "babaiee2025") -> None:
        """Measures a network with the same number of keys for every kernel."""
        model = mk.convert_to_masterkeys(self.dense, bank, keys_per_kernel=keys)
        start = time.perf_counter()
        if images:
            mk.calibrate_masterkeys(model, self.dense, self.fitted if images == "250 of one's own" else "builtin")
        self.row(name, images or "nothing", model, time.perf_counter() - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--results", type=Path, required=True, metavar="CSV", help="rows are added to it")
    parser.add_argument("--agreement", type=float, default=0.95)
    args = parser.parse_args()
    logging.getLogger("timm_masterkeys").setLevel(logging.ERROR)
    table = Table(args.folder, args.results)
    print(f"{torch.get_num_threads()} threads\n")
    print_head(COLUMNS)
    table.row("dense", "", table.dense, 0)
    for keys in (1, 4):
        for images in ("", "builtin", "250 of one's own"):
            table.converted(f"{keys} key{'s' * (keys > 1)}", keys, images)
    start = time.perf_counter()
    model, _ = mk.convert_to_agreement(table.dense, args.agreement, table.fitted)
    table.row(f"--agreement {args.agreement:g}", "250 of one's own", model, time.perf_counter() - start)
    table.converted("1 random filter (control)", 1, "250 of one's own", "random8:0")


if __name__ == "__main__":
    main()
