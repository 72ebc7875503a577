"""Training from scratch: does it matter how often each key is assigned? A small ConvNeXt on a folder of small images.

Compares the dense network with keys assigned uniformly (the default), keys assigned as often as trained networks use
them, and eight random filters; same recipe, several seeds. The folder is an ImageFolder with train/ and validation/.

    python examples/compare_key_draws.py FOLDER
"""

import argparse
from collections.abc import Iterable
from statistics import mean, stdev

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import Dataset

from timm_masterkeys import MasterKeyConv2d, initialize_masterkeys

# How often each key of babaiee2025 is the nearest one, mean over the kernels of seven trained mobile networks.
FREQUENCIES = torch.tensor([0.056, 0.053, 0.065, 0.035, 0.078, 0.111, 0.246, 0.356])
VARIANTS = ("dense", "uniform", "trained frequencies", "random filters")


def images(dataset: Dataset[tuple[torch.Tensor, int]], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of a split, in memory."""
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]] = create_loader(
        dataset, (3, size, size), 256, use_prefetcher=False, num_workers=0, crop_pct=1.0
    )
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def network(variant: str, classes: int, seed: int) -> nn.Module:
    """The network of a variant, initialised with a seed."""
    torch.manual_seed(seed)
    shape = {"patch_size": 2, "depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)}
    model = timm.create_model("convnext_atto", num_classes=classes, **shape)
    if variant == "dense":
        return model
    bank = f"random8:{seed}" if variant == "random filters" else "babaiee2025"
    model = initialize_masterkeys(model, bank, inplace=True)
    if variant == "trained frequencies":
        for layer in model.modules():
            if isinstance(layer, MasterKeyConv2d):
                layer.key_index.copy_(torch.multinomial(FREQUENCIES, len(layer.key_index), True)[:, None])
    return model


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int, batch: int = 64) -> None:
    """Trains in place with AdamW, a cosine schedule, flips and small translations."""
    torch.manual_seed(seed)
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=2, warmup_lr=2e-4)
    model.train()
    for epoch in range(epochs):
        schedule.step(epoch)
        for chosen in torch.randperm(len(x)).split(batch):
            part = x[chosen].flip(3) if torch.rand(()) < 0.5 else x[chosen]
            part = part.roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3))
            optimizer.zero_grad()
            F.cross_entropy(model(part), y[chosen], label_smoothing=0.1).backward()
            optimizer.step()


@torch.inference_mode()
def top1(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    return 100 * float((torch.cat([model(part).argmax(1) for part in x.split(256)]) == y).float().mean())


def main() -> None:
    """Trains every variant with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="with train/ and validation/, a folder of images for each class")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    train_set = create_dataset("", args.folder, split="train")
    names = train_set.reader.class_to_idx  # validation/ may lack some
    validation_set = create_dataset("", args.folder, split="validation", class_map=names)
    (x, y), held_out = images(train_set, args.size), images(validation_set, args.size)
    accuracies: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant in VARIANTS:
            model = network(variant, len(names), seed)
            train(model, x, y, args.epochs, seed)
            accuracies[variant].append(top1(model, *held_out))
            print(f"seed {seed}  {variant:<19}  {accuracies[variant][-1]:.1f} %", flush=True)
    print("\n| depthwise kernels | top-1, mean | spread over seeds |\n|---|---|---|")
    for variant, values in accuracies.items():
        print(f"| {variant} | {mean(values):.1f} % | {stdev(values) if len(values) > 1 else 0:.1f} |")


if __name__ == "__main__":
    main()
