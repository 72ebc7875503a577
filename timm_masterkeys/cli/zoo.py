"""``timm-masterkeys zoo``."""

import argparse
import os
from pathlib import Path

from ..errors import ZooError
from .options import CONVERSION, add_options, check_device, read_config

SUMMARY = (
    "convert, calibrate, measure and publish every timm network that matches; the same command again continues where "
    "it ended"
)
EXAMPLE = "zoo 'convnext*' --org my-team --calibrate photographs --evaluate imagenet/val --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "pattern",
        nargs="+",
        help="timm names that have pretrained weights, for example 'convnext*' or convnext_tiny.fb_in1k",
    )
    add("--org", required=True, help="user or organisation on the Hub; a network is published as ORG/ARCH.mk8_TAG")
    add_options(parser, *CONVERSION, "--agreement")
    add(
        "--calibrate",
        default="builtin",
        metavar="DIR",
        help="a folder of images to calibrate with, without labels (default: photographs that ship with "
        "timm_masterkeys)",
    )
    add(
        "--evaluate",
        required=True,
        metavar="DIR",
        help="labelled images to measure the accuracy on: a folder for each class, named after it",
    )
    add(
        "--class-map",
        metavar="FILE",
        help="a file with the names of the classes' folders, one a line, in the order of the network's outputs "
        "(default: ImageNet-1k's synsets, or class indices)",
    )
    add("--dataset", metavar="NAME", help="the labelled images' name on model cards (default: their folder's name)")
    add(
        "--output",
        default="zoo",
        metavar="DIR",
        help="the folder for results.csv (accuracies), names.txt (for use_weights) and work in progress (default: zoo)",
    )
    add_options(parser, "--license", "--private")
    add("--dry-run", action="store_true", help="do everything but publish; the same command without it then publishes")
    add("--keep-weights", action="store_true", help="keep downloads and published networks on disk")
    add("--batch-size", type=int, default=64, metavar="N", help="how many images to measure at a time (default: 64)")
    add("--workers", type=int, default=4, metavar="N", help="how many processes read labelled images (default: 4)")
    add("--device", help="where to compute (default: the GPU if there is one; under torchrun one for each process)")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..zoo.evaluate import find_labelled_images
    from ..zoo.make import ZooSettings, make_zoo, plan_zoo

    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = args.device or (gpu if torch.cuda.is_available() else "cpu")
    check_device(device)
    config = read_config(args, "agreement")
    labelled = find_labelled_images(args.evaluate, args.class_map or "")
    others = "org", "calibrate", "dataset", "license", "private", "dry_run", "keep_weights", "batch_size", "workers"
    given = {name: getattr(args, name) for name in others}
    zoo = ZooSettings(labelled=labelled, output=Path(args.output), config=config, device=device, **given)
    names, left_out = plan_zoo(args.pattern, labelled.num_classes)
    for name, reason in left_out.items():
        print(f"{name}  left out: {reason}")
    classes = len({label for _, label in labelled.files})
    print(f"{len(names)} networks, {len(labelled.files):,} images of {classes:,} classes", flush=True)
    failed = []
    for outcome in make_zoo(names, zoo):
        if outcome.fresh:
            print(outcome, flush=True)
        if outcome.error:
            failed.append(f"{outcome.name} ({outcome.error})")
    print(f"{len(names) - len(failed)} of {len(names)} networks done, see {args.output}/results.csv")
    if failed:
        raise ZooError(
            f"{len(failed)} of {len(names)} networks failed: {'; '.join(failed)}. The others are kept. The same "
            f"command tries the failed ones again. More in {args.output}/models/NAME/failure.txt."
        )
