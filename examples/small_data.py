"""Do frozen keys beat trainable kernels on small data? Trains from scratch, arm against arm, and prints a table.

FOLDER is an ImageFolder: ``train/CLASS/*`` and ``validation/CLASS/*``. All arms have the same recipe and the same
budget for tuning: a run for each learning rate and weight decay, on one subset of the training images and measured on
held-out training images. Then the best pair gets a run for each seed, on the seed's subset and measured on
``validation/``. All arms see the same images in the same order for a seed, so that differences to dense are paired.

The ``transfer`` arms take their kernels from a dense network trained on ``--source``, another ImageFolder.

Every run is kept in the file of results: an interrupted program resumes when it is run again, and two programs with
different ``--arms`` share the work. ``--table FILE`` prints the results in a file.

    python examples/small_data.py FOLDER --quick                          # minutes, to see that it runs
    python examples/small_data.py FOLDER --sizes 250 1000 6000            # ConvNeXt V2 Atto: for a GPU
    python examples/small_data.py FOLDER --sizes 250 1000 --small         # a quarter as wide and deep: for a CPU
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from intervals import interval, spread
from PIL import Image
from timm.data import create_dataset
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from tqdm.auto import tqdm

import timm_masterkeys as mk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARMS = {
    "dense": "trainable kernels",
    "shift": "keys, learned shift",
    "none": "keys alone",
    "scale-space": "scale-space-b, learned shift",
    "scales": "scale-space-b, learned sigmas and shift",
    "random8": "eight random keys, learned shift",
    "random": "random kernels, frozen",
    "transfer": "keys, scales and shifts of a network trained on other images, learned shift",
    "transfer-dense": "the kernels of that network themselves, frozen",
}
BATCH = 64
FIRST = 2  # epochs of warmup
TITLES = ("arm", "top-1 %", "above dense, 95 %", "lr", "weight decay", "seeds", "s an epoch", "trainable")


class Data:
    """Images of a folder in memory, (N, 3, size, size) uint8, and labels."""

    def __init__(self, folder: str, size: int, most: int | None = None) -> None:
        missing = [split for split in ("train", "validation") if not (Path(folder) / split).is_dir()]
        if missing:
            raise SystemExit(f"'{folder}' has no folder '{missing[0]}', expected train/CLASS/* and validation/CLASS/*.")
        train = create_dataset("", folder, split="train")
        names = train.reader.class_to_idx
        self.classes = len(names)
        self.train = self._read(train, size)
        self.validation = self._read(create_dataset("", folder, split="validation", class_map=names), size)
        if most:
            self.train = self.subset(most, 0)[0]
            order = torch.randperm(len(self.validation[1]), generator=torch.Generator().manual_seed(0))[:most]
            self.validation = self.validation[0][order], self.validation[1][order]

    def subset(self, count: int, seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """The first training images in a seed's order, and the last fifth in that order."""
        order = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        return tuple((self.train[0][ids], self.train[1][ids]) for ids in (order[:count], order[-(len(order) // 5) :]))

    def _read(self, dataset: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for i in range(len(dataset)):
            file, label = dataset.reader[i]
            with file, Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB").resize((size, size))))
            labels.append(label)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return pixels.to(DEVICE), torch.tensor(labels, device=DEVICE)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Converts bytes to floats in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images normalised, mirrored at random, and moved by up to an eighth."""
    edge = images.shape[-1] // 8
    padded = F.pad(normalised(images), (edge,) * 4, mode="reflect")
    top, left, flip = torch.randint(0, 2 * edge + 1, (3, len(images)), generator=generator).tolist()
    size = images.shape[-1]
    cut = [image[:, t : t + size, s : s + size] for image, t, s in zip(padded, top, left, strict=True)]
    return torch.stack([c.flip(2) if f % 2 else c for c, f in zip(cut, flip, strict=True)])


def network(classes: int, small: bool) -> nn.Module:
    """ConvNeXt V2 Atto with a stem of stride 2 for small images; if ``small``, a quarter as wide and deep."""
    settings: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)} if small else {}
    return timm.create_model("convnextv2_atto", num_classes=classes, patch_size=2, **settings)


def arm_model(arm: str, classes: int, small: bool, seed: int, source: nn.Module | None) -> nn.Module:
    """The network of an arm, initialised at random with a seed."""
    torch.manual_seed(seed)
    model = network(classes, small)
    if arm in ("random", "transfer-dense"):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                if source is not None:
                    module.load_state_dict(source.get_submodule(name).state_dict())
                module.weight.requires_grad = False
    elif arm == "transfer":
        assert source is not None
        keys = {
            name: m for name, m in mk.convert_to_masterkeys(source).named_modules() if isinstance(m, mk.MasterKeyConv2d)
        }
        model = mk.initialize_masterkeys(model)
        for name, layer in keys.items():
            model.get_submodule(name).load_state_dict(layer.state_dict())
    elif arm != "dense":
        bank = {"scale-space": "scale-space-b", "scales": "scale-space-b", "random8": f"random8:{seed}"}
        trainable: Any = {"none": "none", "scales": "sigmas"}.get(arm, "shift")
        model = mk.initialize_masterkeys(model, bank.get(arm, "babaiee2025"), trainable=trainable)
    return model.to(DEVICE)


def train(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    epochs: int,
    lr: float,
    weight_decay: float,
    seed: int,
    bar: Any,
) -> dict[str, Any]:
    """Trains in place. Returns accuracies at four epochs, up to the last, seconds per epoch, trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=weight_decay)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=min(FIRST, epochs - 1))
    images, labels = data
    curve, seconds = [], []
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        start = time.perf_counter()
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            out = model(augmented(images[batch], generator))
            F.cross_entropy(out, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            bar.update(len(batch))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if (epoch + 1) % max(1, epochs // 4) == 0 or epoch + 1 == epochs:
            curve.append((epoch + 1, accuracy(model, test)))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy": curve[-1][1], "curve": curve, "seconds": median(seconds), "parameters": parameters}


@torch.inference_mode()
def accuracy(model: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Top-1 in percent."""
    model.eval()
    hits = [model(normalised(x)).argmax(1) == y for x, y in zip(test[0].split(250), test[1].split(250), strict=True)]
    return round(100 * float(torch.cat(hits).float().mean()), 3)


class Experiment:
    """All runs, each kept in the file of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, Path(args.results)
        most = 400 if args.quick else None
        self.data = Data(args.folder, args.size, most)
        images = len(self.data.train[1])
        if min(args.sizes) < 5 or images < max(args.sizes):
            raise SystemExit(f"--sizes {args.sizes}: expected 5 to {images}, the training images of '{args.folder}'.")
        self.other = Data(args.source, args.size, most) if args.source else None
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, broken = text.rpartition("\n")
        if broken:  # killed while it wrote
            self.path.write_text(f"{whole}\n" if whole else "")
        self.kept = rows(self.path)
        self.source: nn.Module | None = None

    def run_cells(self, arm: str, count: int, lr: float, decay: float, seed: int) -> dict[str, Any]:
        """The columns that identify a run; seed 0 is for tuning."""
        args = self.args
        cells = {"data": Path(args.folder).resolve().name, "px": args.size}
        cells |= {"network": "small" if args.small else "convnextv2_atto", "images": count, "passes": args.passes}
        cells |= {"arm": arm, "lr": lr, "weight_decay": decay, "seed": seed}
        return cells | ({"source": Path(args.source).resolve().name} if arm.startswith("transfer") else {})

    def run(self, arm: str, count: int, lr: float, decay: float, seed: int, bar: Any) -> dict[str, Any]:
        """The result of one run, from the file if the file has it."""
        cells = self.run_cells(arm, count, lr, decay, seed)
        subset, rest = self.data.subset(count if seed else self.tuned_on(count), seed)
        epochs = max(2, self.args.passes // len(subset[1]))  # the same number of images for every size
        for row in self.kept:
            if cells.items() <= row.items():
                bar.total -= len(subset[1]) * epochs
                bar.refresh()
                return row
        bar.set_postfix_str(f"{arm} {count} lr {lr:g} decay {decay:g} seed {seed}")
        source = self.trained_elsewhere() if arm.startswith("transfer") else None
        model = arm_model(arm, self.data.classes, self.args.small, seed, source)
        measured = train(model, subset, self.data.validation if seed else rest, epochs, lr, decay, seed, bar)
        row = cells | measured | {"timm_masterkeys": mk.__version__, "torch": torch.__version__}
        self.kept.append(row)
        with self.path.open("a") as file:  # one write per line, as two programs may share the file
            file.write(json.dumps(row) + "\n")
        return row

    def tuned_on(self, count: int) -> int:
        """The number of images of a run for tuning: ``count``, but a fifth of all images stays held out."""
        images = len(self.data.train[1])
        return min(count, images - images // 5)

    def trained_elsewhere(self) -> nn.Module:
        """The dense network trained on all images of ``--source``, four times as long as the arms."""
        if self.source is None:
            assert self.other is not None
            epochs = max(2, 4 * self.args.passes // len(self.other.train[1]))
            model = arm_model("dense", self.other.classes, self.args.small, 1000, None)
            with tqdm(total=0, disable=True) as bar:
                train(
                    model, self.other.train, self.other.validation, epochs, self.args.lr[0], self.args.decays[0], 0, bar
                )
            self.source = copy.deepcopy(model).cpu()
        return self.source

    def work(self) -> None:
        """Does all runs of all arms."""
        args = self.args
        pairs = list(product(args.lr, args.decays))
        total, tried = 0, len(pairs) if len(pairs) > 1 else 0
        for count in args.sizes:
            tuning, measured = (size * max(2, args.passes // size) for size in (self.tuned_on(count), count))
            total += len(args.arms) * (tried * tuning + args.seeds * measured)
        with tqdm(total=total, unit="image", unit_scale=True, disable=None, smoothing=0.05) as bar:
            for count in args.sizes:
                for arm in args.arms:
                    best = pairs[0]
                    if tried:
                        scores = {pair: self.run(arm, count, *pair, 0, bar)["accuracy"] for pair in pairs}
                        best = max(scores, key=lambda pair: scores[pair])
                    for seed in range(1, args.seeds + 1):
                        self.run(arm, count, *best, seed, bar)


def rows(path: Path) -> list[dict[str, Any]]:
    """The runs in a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(kept: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table for each data set, network and size: accuracies, and paired differences to dense."""
    settings = ("data", "px", "network", "images", "passes")
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in kept:
        if row["seed"]:
            arms = groups.setdefault(tuple(row[name] for name in settings), {})
            arms.setdefault(row["arm"], {})[row["seed"]] = row
    lines = []
    for setting, arms in sorted(groups.items()):
        epochs = max(run["curve"][-1][0] for runs in arms.values() for run in runs.values())
        lines += ["", "{}, {} px, {}: {} images, {} epochs".format(*setting[:-1], epochs), ""]
        lines += [
            "| arm | top-1 % | above dense, 95 % | lr | weight decay | seeds | s an epoch | trainable |",
            "|---" * 8 + "|",
        ]
        for arm in (name for name in ARMS if name in arms):
            runs, dense = arms[arm], arms.get("dense", {})
            values = [run["accuracy"] for run in runs.values()]
            above = [run["accuracy"] - dense[seed]["accuracy"] for seed, run in runs.items() if seed in dense]
            one = next(iter(runs.values()))
            cells = [arm, spread(values), interval(above) if arm != "dense" else ""]
            cells += [f"{one['lr']:g}", f"{one['weight_decay']:g}", str(len(values))]
            cells += [f"{median(run['seconds'] for run in runs.values()):.2f}", f"{one['parameters']:,}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(kept: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the learning curves, a panel for each data set and size; needs matplotlib."""
    from matplotlib.figure import Figure

    from timm_masterkeys.study.plotting import COLOURS

    panels = sorted({(row["data"], row["images"], row["passes"]) for row in kept if row["seed"]})
    figure = Figure(figsize=(4.2 * len(panels) + 1.5, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, arm in enumerate(ARMS):
            runs = [
                row["curve"]
                for row in kept
                if row["seed"] and row["arm"] == arm and (row["data"], row["images"], row["passes"]) == panel
            ]
            if runs:
                epochs, values = zip(*[(p[0][0], mean(v for _, v in p)) for p in zip(*runs, strict=True)], strict=True)
                axis.plot(
                    epochs,
                    values,
                    ":" if number > 7 else "-" if number % 2 else "--",
                    color=COLOURS[number % 8],
                    label=arm,
                )
        axis.set(xlabel="epoch", title=f"{panel[0]}, {panel[1]:,} images")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Parses the command line, runs the experiment, and prints the tables of all results in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--source", metavar="FOLDER", help="other images, for the arms transfer and transfer-dense")
    parser.add_argument("--sizes", nargs="+", type=int, default=[250, 1000], help="training images of a subset")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that there is a source for")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), default=5, metavar="1...10", help="(default: 5)")
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3, 6e-3], help="learning rates to choose from")
    parser.add_argument("--decays", nargs="+", type=float, default=[0.05, 0.5], help="weight decays to choose from")
    parser.add_argument("--passes", type=int, default=100_000, help="images seen in a run (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a network a quarter as wide and deep")
    parser.add_argument(
        "--results", default="small_data.jsonl", help="file that keeps every run (default: %(default)s)"
    )
    parser.add_argument("--table", metavar="FILE", help="print what a file of results holds, and train nothing")
    parser.add_argument("--plot", metavar="FILE", help="draw the learning curves (needs matplotlib)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="two tiny subsets, two seeds, a few epochs, small network")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.sizes, args.seeds, args.passes, args.small = [100, 200], 2, 400, True
    if not args.table:
        arms = [arm for arm in ARMS if args.source or not arm.startswith("transfer")]
        args.arms = args.arms or arms
        if not args.folder or not set(args.arms) <= set(arms):
            parser.error("no FOLDER to train on" if not args.folder else "transfer needs --source FOLDER, other images")
        for arm in args.arms:
            print(f"{arm:<14} {ARMS[arm]}")
        Experiment(args).work()
    kept = rows(Path(args.table or args.results))
    print("\n".join(tables(kept)))
    if args.plot:
        draw(kept, args.plot)


if __name__ == "__main__":
    main()
