"""Do frozen keys beat trainable kernels on small data? Trains from scratch, arm against arm, and prints a table.

FOLDER is an ImageFolder: ``train/CLASS/*`` and ``validation/CLASS/*``. Every arm has the same recipe and the same
budget for tuning: a run for each weight decay on four fifths of the subset, judged on the last fifth; then, with the
best one, a run for each seed on the whole subset, measured on ``validation/``. Every run is kept in the file of
results: a program broken off goes on where it was, and two started with different ``--arms`` share the work.

    python examples/small_data.py FOLDER --quick                          # minutes, to see that it runs
    python examples/small_data.py FOLDER --sizes 500 1000 2000 4000       # ConvNeXt V2 Atto: for a GPU
    python examples/small_data.py FOLDER --sizes 500 2000 --small         # a quarter as wide and deep: for a CPU
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
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
    "scales": "scale-space-b, learned scales and shift",
    "random8": "eight random keys, learned shift",
    "random": "random kernels, frozen",
    "transfer": "keys, scales and shifts of a network trained on other images, learned shift",
}
BATCH = 64
LR = 4e-3
FIRST = 2  # epochs of warmup


class Data:
    """Images of a folder in memory, (N, 3, size, size) uint8, and labels; those to train on in a fixed random order."""

    def __init__(self, folder: str, size: int, most: int | None = None) -> None:
        missing = [split for split in ("train", "validation") if not (Path(folder) / split).is_dir()]
        if missing:
            raise SystemExit(f"'{folder}' has no folder '{missing[0]}', expected train/CLASS/* and validation/CLASS/*.")
        train = create_dataset("", folder, split="train")
        names = train.reader.class_to_idx
        self.classes = len(names)
        self.train = self._read(train, size)
        self.validation = self._read(create_dataset("", folder, split="validation", class_map=names), size)
        order = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(0))
        self.train = self.train[0][order][:most], self.train[1][order][:most]
        if most:
            order = torch.randperm(len(self.validation[1]), generator=torch.Generator().manual_seed(0))[:most]
            self.validation = self.validation[0][order], self.validation[1][order]

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
    """Bytes to numbers around 0."""
    return images.float().div_(127.5).sub_(1)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored or not, and moved by up to an eighth."""
    edge = images.shape[-1] // 8
    padded = F.pad(normalised(images), (edge,) * 4, mode="reflect")
    top, left, flip = torch.randint(0, 2 * edge + 1, (3, len(images)), generator=generator).tolist()
    size = images.shape[-1]
    cut = [image[:, t : t + size, s : s + size] for image, t, s in zip(padded, top, left, strict=True)]
    return torch.stack([c.flip(2) if f % 2 else c for c, f in zip(cut, flip, strict=True)])


def network(classes: int, small: bool) -> nn.Module:
    """ConvNeXt V2 Atto with a stem of stride 2 for small images; or one a quarter as wide and deep."""
    settings: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)} if small else {}
    return timm.create_model("convnextv2_atto", num_classes=classes, patch_size=2, **settings)


def arm_model(arm: str, classes: int, small: bool, seed: int, source: nn.Module | None) -> nn.Module:
    """The network of an arm, drawn with a seed."""
    torch.manual_seed(seed)
    model = network(classes, small)
    if arm == "random":
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
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
        trainable: Any = arm if arm in ("none", "scales") else "shift"
        model = mk.initialize_masterkeys(model, bank.get(arm, "babaiee2025"), trainable=trainable)
    return model.to(DEVICE)


def train(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    epochs: int,
    weight_decay: float,
    seed: int,
    bar: Any,
) -> dict[str, Any]:
    """Trains in place; accuracy at four points, the last at the end, seconds an epoch, trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=weight_decay)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=min(FIRST, epochs - 1))
    images, labels = data
    curve, seconds = [], []
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        start = time.perf_counter()
        for own in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            out = model(augmented(images[own], generator))
            F.cross_entropy(out, labels[own], label_smoothing=0.1).backward()
            optimizer.step()
            bar.update(len(own))
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
    return 100 * float(torch.cat(hits).float().mean())


class Experiment:
    """All runs, each kept in the file of results."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data, self.path = args, data, Path(args.results)
        needed = max(args.sizes) + (BATCH if "transfer" in args.arms else 0)
        if min(args.sizes) < 5 or len(data.train[1]) < needed:
            raise SystemExit(
                f"{len(data.train[1])} training images and --sizes {args.sizes}: at least 5 are needed, and beyond the "
                f"largest {BATCH} to train the source of 'transfer' on."
            )
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, broken = text.rpartition("\n")
        if broken:  # killed while it wrote
            self.path.write_text(f"{whole}\n" if whole else "")
        self.kept = {entry["run"]: entry for entry in map(json.loads, whole.splitlines())}
        self.source: nn.Module | None = None
        self.setting = f"{Path(args.folder).name} {args.size}px {'small' if args.small else 'atto'} {args.passes}"

    def epochs(self, images: int) -> int:
        """So many that every subset is trained for as long as ``passes`` images allow."""
        return max(2, self.args.passes // images)

    def subset(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data.train[0][:count], self.data.train[1][:count]

    def run(self, arm: str, count: int, decay: float, seed: int, tuning: bool, bar: Any) -> dict[str, Any]:
        """The result of one run, from the file if it is there."""
        arm_name = f"{arm} from {max(self.args.sizes)} on" if arm == "transfer" else arm  # its source's own images
        name = f"{self.setting} {arm_name} {count} decay {decay} {'tuning' if tuning else f'seed {seed}'}"
        images, labels = self.subset(count)
        train_on, test_on = (images, labels), self.data.validation
        if tuning:
            part = count * 4 // 5
            train_on, test_on = (images[:part], labels[:part]), (images[part:], labels[part:])
        epochs = self.epochs(len(train_on[1]))
        if name in self.kept:
            bar.total -= len(train_on[1]) * epochs
            bar.refresh()
            return self.kept[name]
        bar.set_postfix_str(f"{arm} {count} {'tuning' if tuning else f'seed {seed}'}")
        model = arm_model(
            arm, self.data.classes, self.args.small, seed, self.trained_elsewhere() if arm == "transfer" else None
        )
        result = {"run": name, **train(model, train_on, test_on, epochs, decay, seed, bar)}
        self.kept[name] = result
        with self.path.open("a") as file:  # a line at once: two programs may share the file
            file.write(json.dumps(result) + "\n")
        return result

    def trained_elsewhere(self) -> nn.Module:
        """A dense network trained on images that no subset holds, four times as long as the arms."""
        if self.source is None:
            most = max(self.args.sizes)
            images, labels = self.data.train[0][most:], self.data.train[1][most:]
            model = arm_model("dense", self.data.classes, self.args.small, 1000, None)
            with tqdm(total=0, disable=True) as bar:
                train(
                    model,
                    (images, labels),
                    self.data.validation,
                    4 * self.epochs(len(labels)),
                    self.args.decays[0],
                    0,
                    bar,
                )
            self.source = copy.deepcopy(model).cpu()
        return self.source

    def work(self) -> None:
        """Every run of every arm, then the tables."""
        args = self.args
        tuned = len(args.decays) if len(args.decays) > 1 else 0
        total = 0
        for count in args.sizes:
            part = count * 4 // 5
            total += len(args.arms) * (tuned * part * self.epochs(part) + args.seeds * count * self.epochs(count))
        rows, curves = [], {}
        with tqdm(total=total, unit="image", unit_scale=True, disable=None, smoothing=0.05) as bar:
            for count in args.sizes:
                for arm in args.arms:
                    decay = args.decays[0]
                    if tuned:
                        scores = {d: self.run(arm, count, d, 0, True, bar)["accuracy"] for d in args.decays}
                        decay = max(scores, key=lambda d: scores[d])
                    results = [self.run(arm, count, decay, seed, False, bar) for seed in range(1, args.seeds + 1)]
                    values = [result["accuracy"] for result in results]
                    spread = stdev(values) if len(values) > 1 else 0.0
                    seconds = median(result["seconds"] for result in results)
                    row = (
                        f"{mean(values):.1f} ± {spread:.1f}",
                        f"{min(values):.1f} to {max(values):.1f}",
                        f"{decay:g}",
                    )
                    rows.append((count, arm, *row, f"{seconds:.2f}", f"{results[0]['parameters']:,}", mean(values)))
                    points = zip(*[result["curve"] for result in results], strict=True)
                    curves[count, arm] = [(p[0][0], mean(v for _, v in p)) for p in points]
        print("| images | arm | top-1 % | range | weight decay | seconds an epoch | trainable parameters |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(str(cell) for cell in row[:-1]) + " |")
        print("\norder of the arms, best first:")
        for count in args.sizes:
            own = sorted((row for row in rows if row[0] == count), key=lambda row: -row[-1])
            print(f"  {count} images: " + ", ".join(f"{row[1]} {row[-1]:.1f}" for row in own))
        if args.plot:
            draw(curves, args.sizes, args.arms, args.plot)


def draw(
    curves: dict[tuple[int, str], list[tuple[int, float]]], sizes: Sequence[int], arms: Sequence[str], path: str
) -> None:
    """Learning curves, a panel a size; needs matplotlib."""
    from matplotlib.figure import Figure

    from timm_masterkeys.study.plotting import COLOURS

    figure = Figure(figsize=(4.2 * len(sizes) + 1.5, 3.6), layout="constrained")
    axes = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axis, count in zip(axes, sizes, strict=True):
        for number, arm in enumerate(arms):
            style = "-" if number % 2 else "--"
            axis.plot(*zip(*curves[count, arm], strict=True), style, color=COLOURS[number % 8], label=arm)
        axis.set(xlabel="epoch", title=f"{count} images")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Parses the command line and runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--sizes", nargs="+", type=int, default=[500, 1000, 2000], help="training images of a subset")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--decays", nargs="+", type=float, default=[0.05, 0.5], help="weight decays to choose from")
    parser.add_argument("--passes", type=int, default=100_000, help="images seen in a run (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a network a quarter as wide and deep")
    parser.add_argument(
        "--results", default="small_data.jsonl", help="file that keeps every run (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the learning curves (needs matplotlib)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="two tiny subsets, two seeds, a few epochs, small network")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.sizes, args.seeds, args.passes, args.small = [100, 200], 2, 400, True
    for arm in args.arms:
        print(f"{arm:<12} {ARMS[arm]}")
    Experiment(args, Data(args.folder, args.size, 400 if args.quick else None)).work()


if __name__ == "__main__":
    main()
