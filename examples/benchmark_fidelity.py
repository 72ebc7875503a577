"""Fidelity after conversion and calibration: networks x stages x keys per kernel x banks.

Half of the images calibrate; the other half is held out and measures. FOLDER holds images at any depth; with a
FOLDER/labels.csv (columns file and class_index) accuracy is measured as well.

    python examples/benchmark_fidelity.py FOLDER
    python examples/benchmark_fidelity.py FOLDER --network convnext_tiny --keys-per-kernel 1 4 --only table
"""

import argparse
import csv
import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from intervals import append_row, print_head, print_row
from lite0 import lite0
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, is_img_extension, resolve_model_data_config
from timm.models.efficientnet import EfficientNet, decode_arch_def
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.calibrate import STAGES

TITLES = ["network", "bank", "keys", "stages", "top-1", "agreement", "divergence", "R2", "seconds"]
COLUMNS = [
    "network",
    "bank",
    "keys",
    "stages",
    "split",
    "top1",
    "agreement",
    "divergence",
    "r2",
    "seconds",
]  # of the file


def network(name: str) -> nn.Module:
    """Lite0, a timm model with its pretrained weights, or an EfficientNet described by FILE.json beside its weights."""
    if name == "lite0":
        return lite0()
    if not name.endswith(".safetensors"):
        return timm.create_model(name, pretrained=True).eval()
    description = json.loads(Path(name).with_suffix(".json").read_text())
    model: Any = EfficientNet(
        decode_arch_def(description["arch_def"]),
        num_classes=description["num_classes"],
        num_features=description["num_features"],
        stem_size=description["stem_size"],
        fix_stem=True,
        round_chs_fn=lambda channels, *args, **kwargs: channels,
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=description["bn_eps"]),  # timm adds the activation to a partial
    )
    model.load_state_dict(load_file(name))
    model.pretrained_cfg = {key: description[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    return model.eval()


class Images:
    """The images of a folder, prepared for a model, and their classes (-1 where unknown)."""

    def __init__(self, folder: str, model: nn.Module) -> None:
        transform: Any = create_transform(**resolve_model_data_config(model))
        table = Path(folder) / "labels.csv"
        labels = (
            {row["file"]: int(row["class_index"]) for row in csv.DictReader(table.open())} if table.exists() else {}
        )
        files = sorted(path for path in Path(folder).rglob("*") if is_img_extension(path.suffix.lower()))
        self.x = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
        self.y = torch.tensor([labels.get(str(path.relative_to(folder)), -1) for path in files])

    def halves(self, split: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the images to calibrate with, and of the held-out images."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(split))
        return order[: len(order) // 2], order[len(order) // 2 :]


class Benchmark:
    """One network on one set of images."""

    def __init__(self, name: str, folder: str, results: Path | None = None) -> None:
        self.name, self.dense, self.results = Path(name).stem, network(name), results
        self.images = Images(folder, self.dense)
        self.expected = self.outputs(self.dense, torch.arange(len(self.images.x)))

    @torch.inference_mode()
    def outputs(self, model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        """A model's outputs for the chosen images."""
        return torch.cat([model(self.images.x[part]) for part in chosen.split(8)])

    def measure(self, out: torch.Tensor, chosen: torch.Tensor) -> tuple[float, float, float]:
        """Top-1 and agreement with the dense network in percent, and the divergence from it in nats."""
        expected, y = self.expected[chosen], self.images.y[chosen]
        top1 = float((out.argmax(1) == y).double().mean()) if (y >= 0).all() else math.nan
        agreement = float((out.argmax(1) == expected.argmax(1)).double().mean())
        kl = F.kl_div(out.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
        return 100 * top1, 100 * agreement, float(kl)

    def run(
        self, bank: str, keys: int, stages: tuple[Any, ...], split: int, count: int | None = None
    ) -> tuple[float, float, float, float, float]:
        """Top-1, agreement, divergence on held-out images; mean R2 of the kernels; seconds of the calibration."""
        fitted, held_out = self.images.halves(split)
        model = mk.convert_to_masterkeys(self.dense, bank, keys_per_kernel=keys)
        start = time.perf_counter()
        if stages:
            mk.calibrate_masterkeys(model, self.dense, self.images.x[fitted[:count]], stages=stages)
        seconds = time.perf_counter() - start
        r2 = mk.conversion_report(model).total.mean_r2
        return (*self.measure(self.outputs(model, held_out), held_out), r2, seconds)

    def table(self, banks: list[str], keys: list[int], splits: int) -> None:
        """Prints the table of banks, numbers of keys and stages."""
        print()
        print_head(TITLES)
        measured = [
            self.measure(self.expected[half], half) for half in (self.images.halves(s)[1] for s in range(splits))
        ]
        self.row("", "", "dense", [(*values, math.nan, math.nan) for values in measured])
        calibrations: dict[str, tuple[Any, ...]] = {
            "none": (),
            **{stage: (stage,) for stage in ("norms", "pointwise")},
            "kernels, norms": ("kernels", "norms"),
            "norms, pointwise": ("norms", "pointwise"),
            "all three": STAGES,
        }
        for bank in banks:
            for r in keys:
                for name, stages in calibrations.items():
                    every = bank == mk.get_bank().name and r == keys[0]
                    if every or not stages or stages == STAGES:
                        self.row(bank, r, name, [self.run(bank, r, stages, split) for split in range(splits)])

    def row(self, bank: str, keys: int | str, calibration: str, results: list[tuple[float, ...]]) -> None:
        """Prints mean and range over the splits; adds a row for each split to the file of results."""
        if self.results is not None:
            for split, values in enumerate(results):
                figures = (f"{value:.4f}" for value in values)
                append_row(self.results, COLUMNS, [self.name, bank, keys, calibration, split, *figures])
        top1, agreement, kl, r2, seconds = zip(*results, strict=True)
        cells = [
            self.name,
            bank,
            keys,
            calibration,
            *(f"{mean(v):.1f}" + (f" ({min(v):.1f} to {max(v):.1f})" if len(v) > 1 else "") for v in (top1, agreement)),
            f"{mean(kl):.2f}",
            "" if math.isnan(r2[0]) else f"{mean(r2):.2f}",
            "" if math.isnan(seconds[0]) else f"{mean(seconds):.0f}",
        ]
        print_row(cells)

    def growth(self, bank: str, keys: int, splits: int) -> None:
        """Prints the table by number of images."""
        half = len(self.images.x) // 2
        print()
        print_head(["network", "images", "top-1, split by split", "agreement", "divergence"])
        for count in sorted({max(10, half * part // 5) for part in (1, 2, 3, 5)}):
            results = [self.run(bank, keys, STAGES, split, count) for split in range(splits)]
            rows = zip(list(zip(*results, strict=True))[:3], (1, 1, 2), strict=True)
            columns = [" / ".join(f"{value:.{places}f}" for value in column) for column, places in rows]
            print_row([self.name, count, *columns])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--network", nargs="+", default=["lite0"], help="lite0, a timm name, or FILE.safetensors")
    parser.add_argument("--bank", nargs="+", default=["babaiee2025", "scale-space-b", "random8:0"])
    parser.add_argument("--keys-per-kernel", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--splits", type=int, default=1, help="random splits of the images")
    parser.add_argument("--results", type=Path, metavar="CSV", help="a row for each split is added to it")
    parser.add_argument("--only", choices=["table", "images"])
    args = parser.parse_args()
    for name in args.network:
        benchmark = Benchmark(name, args.folder, args.results)
        if args.only in (None, "table"):
            benchmark.table(args.bank, args.keys_per_kernel, args.splits)
        if args.only in (None, "images"):
            benchmark.growth(args.bank[0], args.keys_per_kernel[0], max(args.splits, 3))


if __name__ == "__main__":
    main()
