"""Top-1 and top-5 accuracy of networks on labelled images, measured as timm's validate.py does."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.data.readers.class_map import load_class_map
from torch import nn
from torch.utils.data import Dataset

from ..conversion.wrapped import evaluating
from ..errors import ZooError

_logger = logging.getLogger(__name__)

IMAGENET = 1000  # classes, where no class map says otherwise
UNREADABLE = -1  # the label of an image that cannot be read


@dataclass(frozen=True)
class LabelledImages:
    """A folder of labelled images."""

    folder: Path  # it holds a folder of images for each class
    files: tuple[tuple[str, int], ...]  # paths, each with the index of its class in the network's outputs
    num_classes: int  # number of classes, which a network must have too
    sha256: str  # of the files' names, sizes and labels


@dataclass(frozen=True)
class Measurement:
    """The accuracy of a network; all fields but the last two are columns of timm's results files."""

    top1: float  # percentage of images whose label has the highest output
    top1_err: float  # 100 less top1
    top5: float  # percentage of images whose label is among the five highest outputs
    top5_err: float  # 100 less top5
    param_count: float  # millions of parameters, as timm's validate.py counts them
    img_size: int  # width of the images that the network took, in pixels
    crop_pct: float  # share of an image's sides that was taken, from its middle
    interpolation: str  # how images were resized
    images: int  # number of images that could be read
    classes: int  # number of classes among these images


def find_labelled_images(folder: str | os.PathLike[str], class_map: str | os.PathLike[str] = "") -> LabelledImages:
    """Finds the images in a folder and their labels, and checks that these match a network's outputs.

    timm numbers the folders it finds, so that labels shift if a class is missing. Here a folder's name gives its class:
    it is in the class map or, without one, it is an ImageNet-1k synset (n01440764) or class index (0 to 999), the same
    kind for all. Classes may have no images.

    Args:
        folder: An ImageFolder, or one whose ``validation`` or ``val`` folder is one, as timm takes them.
        class_map: A file as for timm's ``--class-map``: a class name a line, in the order of the network's outputs, or
            a pickled dict of names to indices. It must name every class. Empty for ImageNet-1k.

    Raises:
        ZooError: No images, folders that name no class, or a class map that cannot be read or leaves out classes.
    """
    if not os.path.isdir(folder):
        raise ZooError(f"There is no folder '{os.fspath(folder)}' to evaluate with.")
    try:
        reader = create_dataset("", root=os.fspath(folder), split="validation").reader
    except RuntimeError as error:  # timm found no images
        raise ZooError(str(error)) from None
    root, names = Path(reader.root), reader.class_to_idx
    class_to_idx = _read_class_map(root, class_map) if class_map else _imagenet_classes(root, names)
    if unknown := sorted(set(names) - set(class_to_idx)):
        raise ZooError(f"'{root}' has images in folders that '{class_map}' does not name: {_first_five(unknown)}.")
    folders = {index: name for name, index in names.items()}
    files = tuple((path, class_to_idx[folders[label]]) for path, label in reader.samples)
    listing = [(os.path.relpath(path, root), os.path.getsize(path), label) for path, label in files]
    return LabelledImages(root, files, len(class_to_idx), hashlib.sha256(json.dumps(listing).encode()).hexdigest())


def _read_class_map(root: Path, path: str | os.PathLike[str]) -> dict[str, int]:
    try:
        labels = {str(name): int(index) for name, index in load_class_map(os.fspath(path), str(root)).items()}
    except Exception as error:  # not a class map: timm asserts, unpickling may raise anything
        raise ZooError(f"The class map '{os.fspath(path)}' cannot be read: {error}.") from None
    if not labels or sorted(labels.values()) != list(range(len(labels))):
        raise ZooError(
            f"The class map '{os.fspath(path)}' gives {len(labels)} names the indices "
            f"{_first_five(sorted(labels.values()))}, expected 0 to {len(labels) - 1}, each once: it names every class "
            "of the network, and none twice."
        )
    return labels


def _imagenet_classes(root: Path, names: Mapping[str, int]) -> dict[str, int]:
    """The indices of ImageNet-1k's classes, by synset or by number as the folders are named."""
    kinds = [{name: i for i, name in enumerate(ImageNetInfo().label_names())}, {str(i): i for i in range(IMAGENET)}]
    kind = min(kinds, key=lambda kind: len(set(names) - set(kind)))
    if unknown := sorted(set(names) - set(kind)):
        raise ZooError(
            f"'{root}' has images in folders that name no class: {_first_five(unknown)}. Expected ImageNet-1k synsets "
            f"(n01440764) or class indices (0 to {IMAGENET - 1}), or give a class map (--class-map FILE)."
        )
    return kind


def _first_five(names: Sequence[Any]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


@torch.inference_mode()
def measure(
    models: Sequence[nn.Module],
    labelled: LabelledImages,
    *,
    batch_size: int = 64,
    workers: int = 4,
    device: torch.device | str = "cpu",
) -> list[Measurement]:
    """Measures networks that take the same images, in one pass over the images; one measurement for each.

    Preprocessing is that of the first network's ``pretrained_cfg``, at its test size if any; in float32. An image
    that cannot be read is left out with a warning. (timm's ImageDataset counts another image in its place.)

    Args:
        models: On the device. Their training modes are restored afterwards.
        labelled: From ``find_labelled_images``.
        batch_size: Images at a time.
        workers: Processes that read images; 0 for none.
        device: Where the models are.

    Raises:
        ZooError: Networks with another number of classes than the labels have, or no image that can be read.
    """
    first: Any = models[0]
    if first.num_classes != labelled.num_classes:
        raise ZooError(f"The network has {first.num_classes} classes, the labels are of {labelled.num_classes}.")
    config = resolve_data_config(model=first, use_test_size=True)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(
        _Images(labelled.files, "RGB" if config["input_size"][0] == 3 else "L"),
        batch_size=batch_size,
        num_workers=workers,
        device=torch.device(device),
        **{name: config[name] for name in names},
    )
    hits = torch.zeros(len(models), 2, dtype=torch.long)
    read_labels: list[int] = []  # labels, in the order of the files
    with evaluating(*models):
        for images, targets in loader:
            read_labels += targets.tolist()
            for i, model in enumerate(models):
                highest = model(images).topk(min(5, labelled.num_classes), 1).indices == targets[:, None]
                hits[i] += torch.stack([highest[:, 0].sum(), highest.sum()]).cpu()
    for (path, _), label in zip(labelled.files, read_labels, strict=True):
        if label == UNREADABLE:
            _logger.warning("'%s' cannot be read and is left out.", path)
    counted = [label for label in read_labels if label != UNREADABLE]
    if not counted:
        raise ZooError(f"None of the {len(read_labels)} images in '{labelled.folder}' can be read.")
    shared = {
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "images": len(counted),
        "classes": len(set(counted)),
    }
    shares = (100 * hits.double() / len(counted)).tolist()
    return [_measurement(model, *row, **shared) for model, row in zip(models, shares, strict=True)]


def _measurement(model: nn.Module, top1: float, top5: float, **shared: Any) -> Measurement:
    top1, top5 = round(top1, 4), round(top5, 4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measurement(
        top1=top1,
        top1_err=round(100 - top1, 4),
        top5=top5,
        top5_err=round(100 - top5, 4),
        param_count=round(parameters / 1e6, 2),
        **shared,
    )


class _Images(Dataset[tuple[Any, int]]):
    """Images with their labels; an image that cannot be read becomes a black one with the label UNREADABLE."""

    transform: Callable[[Image.Image], Any]  # create_loader sets it

    def __init__(self, files: Sequence[tuple[str, int]], mode: str) -> None:
        self.files, self.mode = files, mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                picture = image.convert(self.mode)
        except Exception:  # decoders may raise anything
            picture, label = Image.new(self.mode, (64, 64)), UNREADABLE
        return self.transform(picture), label
