"""Compares crops of the photographs that ship for calibration: networks x settings x seeds, on other photographs.

FOLDER holds photographs with a FOLDER/labels.csv (columns file and class_index); they only measure. Every row is added
to a CSV file, and rows that it already has are not measured again.

    python examples/compare_builtin.py FOLDER --network lite0 proxyless_w025_r112.safetensors
"""

import argparse
import csv
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_fidelity import Benchmark
from intervals import print_head, print_row, spread
from PIL import Image, ImageEnhance
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import pil_to_tensor

import timm_masterkeys as mk
from timm_masterkeys.calibration.images import AREA, COUNT, RATIO, draw_crops, photographs

COLUMNS = ["network", "keys", "setting", "seed", "images", "top1", "agreement", "divergence", "seconds"]


@dataclass(frozen=True)
class Setting:
    """How images are made from the photographs; the default is that of ``builtin_images``."""

    count: int = COUNT
    photographs: int | None = None  # how many to use, chosen again for each seed; None for all
    area: tuple[float, float] = AREA
    ratio: tuple[float, float] = RATIO
    flips: bool = True
    mosaics: float = 0.0  # share of the images that are four crops side by side
    contrast: float = 0.0  # the largest change of brightness and contrast
    colour: float = 0.0  # the largest change of saturation

    def crops(self, size: tuple[int, int], seed: int, interpolation: str) -> list[Image.Image]:
        """The images before they are normalised."""
        draw = random.Random(f"{seed} of the setting")
        pictures = list(photographs().values())
        if self.photographs:
            pictures = draw.sample(pictures, self.photographs)
        options: Any = {"area": self.area, "ratio": self.ratio, "flips": self.flips, "interpolation": interpolation}
        mosaics = round(self.mosaics * self.count)
        crops = list(draw_crops(pictures, size, self.count - mosaics, seed, **options))
        half = size[0] // 2, size[1] // 2
        small = list(draw_crops(pictures, half, 4 * mosaics, seed + 1000, **options))
        for i in range(mosaics):
            crops.append(Image.new("RGB", size))
            for j in range(4):
                crops[-1].paste(small[4 * i + j], (j % 2 * half[0], j // 2 * half[1]))
        if mosaics:
            draw.shuffle(crops)
        for name, most in (("Brightness", self.contrast), ("Contrast", self.contrast), ("Color", self.colour)):
            if most:
                enhance = getattr(ImageEnhance, name)
                crops = [enhance(crop).enhance(1 + most * (2 * draw.random() - 1)) for crop in crops]
        return crops


SETTINGS = {
    "default": Setting(),
    "area .3 to 1": Setting(area=(0.3, 1.0)),
    "area .15 to 1": Setting(area=(0.15, 1.0)),
    "area .01 to 1": Setting(area=(0.01, 1.0)),
    "area .02 to .6": Setting(area=(0.02, 0.6)),
    "48 crops": Setting(count=48),
    "192 crops": Setting(count=192),
    "16 photographs": Setting(photographs=16),
    "32 photographs": Setting(photographs=32),
    "half mosaics": Setting(mosaics=0.5),
    "contrast .4": Setting(contrast=0.4),
    "contrast and colour .4": Setting(contrast=0.4, colour=0.4),
    "one shape": Setting(ratio=(1.0, 1.0)),
    "no mirroring": Setting(flips=False),
}


def measure(benchmark: Benchmark, keys: int, setting: Setting, seed: int) -> list[float]:
    """Images, top-1, agreement, divergence, seconds of the calibration."""
    config: Any = resolve_model_data_config(benchmark.dense)
    _, height, width = config["input_size"]
    crops = setting.crops((width, height), seed, config["interpolation"])
    mean_, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = (torch.stack([pil_to_tensor(crop) for crop in crops]).float() / 255 - mean_) / std
    model = mk.convert_to_masterkeys(benchmark.dense, keys_per_kernel=keys)
    start = time.perf_counter()
    mk.calibrate_masterkeys(model, benchmark.dense, images)
    seconds = time.perf_counter() - start
    every = torch.arange(len(benchmark.images.x))
    return [len(images), *benchmark.measure(benchmark.outputs(model, every), every), seconds]


def main() -> None:
    """Measures the missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--network", nargs="+", default=["lite0"], help="lite0, a timm name, or FILE.safetensors")
    parser.add_argument("--keys-per-kernel", nargs="+", type=int, default=[1])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "builtin_images.csv")
    args = parser.parse_args()
    rows: list[dict[str, str]] = []
    if args.results.exists():
        with args.results.open(newline="") as file:
            rows = list(csv.DictReader(file))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    with args.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        for network in args.network:
            jobs = [
                (k, name, seed) for k in args.keys_per_kernel for name in args.settings for seed in range(args.seeds)
            ]
            jobs = [job for job in jobs if (Path(network).stem, *map(str, job)) not in done]
            benchmark = Benchmark(network, args.folder) if jobs else None
            for keys, name, seed in jobs:
                assert benchmark is not None
                figures = measure(benchmark, keys, SETTINGS[name], seed)
                cells = [benchmark.name, keys, name, seed, figures[0], *(f"{value:.3f}" for value in figures[1:])]
                rows.append(dict(zip(COLUMNS, map(str, cells), strict=True)))
                writer.writerow(rows[-1])
                file.flush()
    print_head(["network", "keys", "setting", "seeds", "top-1", "agreement", "divergence"])
    for group in dict.fromkeys(tuple(row[name] for name in COLUMNS[:3]) for row in rows):
        values = [
            [float(row[name]) for row in rows if tuple(row[c] for c in COLUMNS[:3]) == group] for name in COLUMNS[5:8]
        ]
        print_row([*group, len(values[0]), *(spread(v, d) for v, d in zip(values, (1, 1, 2), strict=True))])


if __name__ == "__main__":
    main()
