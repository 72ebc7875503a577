"""Converts a network with real ImageNet weights and shows what happened to it. Needs no Hub and no GPU.

Run it as the README says, or with the quickstart extra installed: python examples/quickstart.py
"""

import logging
import tempfile

import skimage.data
import timm
import torch
from lite0 import lite0
from PIL import Image
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


@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The most likely ImageNet class of each image, with its probability."""
    probability, index = model(images).softmax(1).max(1)
    names = [ImageNetInfo().index_to_description(int(i)).split(",")[0] for i in index]
    return [f"{name} {p:.2f}" for name, p in zip(names, probability.tolist(), strict=True)]


def main() -> None:
    """Converts, reports, classifies, saves, reloads."""
    logging.getLogger("timm_masterkeys").setLevel(logging.ERROR)  # the numbers it would warn with are printed below
    dense = lite0()
    print("EfficientNet-Lite0, trained on ImageNet, its 8,960 depthwise kernels put on 8 master keys\n")
    converted = {r: mk.convert_to_masterkeys(dense, keys_per_kernel=r) for r in (1, 2, 4, 8)}

    print("One key per kernel, each kernel a*key + b. R2 is the share of a kernel's shape that survives:\n")
    print(mk.conversion_report(converted[1]))

    transform = create_transform(**resolve_data_config(model=dense))
    images = torch.stack([transform(Image.fromarray(load()).convert("RGB")) for load in PHOTOGRAPHS.values()])
    answers = {"dense": classify(dense, images)}
    answers |= {f"{r} key{'s' * (r > 1)}": classify(model, images) for r, model in converted.items()}
    print("\nWhat the network says of five photographs, without any training after the conversion:\n")
    widths = [max(map(len, [name, *says])) for name, says in answers.items()]
    first = max(map(len, PHOTOGRAPHS))
    print("  ".join([" " * first, *(f"{name:<{w}}" for name, w in zip(answers, widths, strict=True))]).rstrip())
    for row, photograph in enumerate(PHOTOGRAPHS):
        cells = (f"{says[row]:<{w}}" for says, w in zip(answers.values(), widths, strict=True))
        print("  ".join([f"{photograph:<{first}}", *cells]).rstrip())
    fits = ", ".join(f"{mk.conversion_report(m).total.mean_r2:.2f} with {r}" for r, m in converted.items())
    print(f"\nMean R2: {fits}.")
    print("One key per kernel ruins a network as compact as this one, four or eight keep most of what it says.")
    print("A converted network is a starting point: fine-tune it before use.")

    with tempfile.TemporaryDirectory() as folder:
        mk.save_pretrained(converted[4], folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            same = torch.equal(again(images), converted[4](images))
    print(f"\nSaved with 4 keys per kernel and loaded again by timm: outputs equal bit for bit: {same}")


if __name__ == "__main__":
    main()
