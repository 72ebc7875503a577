"""Images to repair with: of a folder, a tensor, a loader; or crops of photographs that ship with this package."""

import hashlib
import logging
import math
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, is_img_extension, resolve_data_config, resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from timm.models import PretrainedCfg
from torch import nn
from tqdm.auto import tqdm

from ..errors import CalibrationError

_logger = logging.getLogger(__name__)

Images = torch.Tensor | Iterable[Any] | str | os.PathLike[str]

FEWEST = 10  # images
BUILTIN = "builtin"  # is their name wherever a folder of images is taken
COUNT = 76  # as many as there are photographs: none is both fitted to and measured by
HELD_OUT = 4  # every fourth photograph can be kept for judging
AREA = 0.05, 1.0  # of a photograph that a crop takes,
RATIO = 3 / 4, 4 / 3  # its width to height, times that of the model's input


def builtin_images(
    model: nn.Module | PretrainedCfg | Mapping[str, Any],
    count: int = COUNT,
    seed: int = 0,
    *,
    held_out: bool | None = None,
) -> torch.Tensor:
    """Images prepared for a model, from photographs that ship: random crops at many scales, half of them mirrored.

    They serve to calibrate with, not to measure by: they show few things, each several times. The photographs, with
    authors and licences, are listed in ``data/photographs/sources.csv``. The same arguments give the same images, on
    every machine with the same Pillow; no other random numbers are drawn from or changed.

    Args:
        model: A timm model, or a ``pretrained_cfg``: its input size, mean, standard deviation and interpolation count.
            A model with other channels than three gets as many: grey for one, the colours in turn for others.
        count: How many.
        seed: Another one gives other crops.
        held_out: True for crops of every fourth photograph only, False for crops of the others only: one part to
            calibrate with, one to compare networks by. None for all.

    Returns:
        (count, channels, height, width), normalised, on the CPU.

    Raises:
        CalibrationError: No count of images, or a model without an image size.
    """
    if count < 1:
        raise CalibrationError(f"count is {count}, expected at least 1.")
    cfg: Any = getattr(model, "pretrained_cfg", None) if isinstance(model, nn.Module) else model
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg or {})
    if not cfg:
        raise CalibrationError(f"{type(model).__name__} has no pretrained_cfg: give one that tells the size of images.")
    config = resolve_data_config(pretrained_cfg=cfg)
    channels, height, width = config["input_size"]
    if isinstance(model, nn.Module):
        channels = _in_chans(model, cfg.get("first_conv"), channels)
    pictures = photographs()
    if held_out is not None:
        pictures = [picture for i, picture in enumerate(pictures) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
    crops = draw_crops(pictures, (width, height), count, seed, interpolation=config["interpolation"])
    pixels = torch.stack([_channels(crop, channels) for crop in crops])
    mean, std = (torch.tensor(_per_channel(config[name], channels)).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def photographs() -> list[Image.Image]:
    """The photographs, in the order of their names."""
    return list(named_photographs().values())


def named_photographs() -> dict[str, Image.Image]:
    """The photographs by name, as in ``sources.csv`` without the suffix, in its order."""
    found = {}
    for path in _files():
        with path.open("rb") as file, Image.open(file) as image:
            found[path.name.removesuffix(".webp")] = image.convert("RGB")
    return found


def photographs_sha256() -> str:
    """The SHA-256 of all photographs, in hex."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files() -> list[Any]:
    folder = resources.files(__package__).joinpath("data/photographs")
    return sorted((path for path in folder.iterdir() if path.name.endswith(".webp")), key=lambda path: path.name)


def draw_crops(
    pictures: list[Image.Image],
    size: tuple[int, int],
    count: int,
    seed: int,
    *,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
    flips: bool = True,
    interpolation: str = "bicubic",
) -> Iterator[Image.Image]:
    """Random crops, resized: of each picture one before any has two.

    Args:
        pictures: To crop from.
        size: Width and height of a crop in the end.
        count: How many.
        seed: Of the crops.
        area: Smallest and largest share of a picture.
        ratio: Smallest and largest width to height, times that of ``size``; less where the picture ends.
        flips: Mirror every other one, by chance.
        interpolation: timm's name of it.
    """
    draw = random.Random(str(seed))  # the same numbers in every version of Python; as a number, -1 would be 1
    filters = str_to_pil_interp("bilinear" if interpolation == "random" else interpolation)
    for i in range(count):
        if i % len(pictures) == 0:
            order = sorted(range(len(pictures)), key=lambda _: draw.random())
        picture = pictures[order[i % len(pictures)]]
        share = area[0] + (area[1] - area[0]) * draw.random()
        shape = size[0] / size[1] * ratio[0] * (ratio[1] / ratio[0]) ** draw.random()
        pixels = share * picture.width * picture.height
        w = min(max(1, round(math.sqrt(pixels * shape))), picture.width)
        h = min(max(1, round(math.sqrt(pixels / shape))), picture.height)
        x, y = (int(draw.random() * (most - taken + 1)) for most, taken in ((picture.width, w), (picture.height, h)))
        crop = picture.resize(size, filters, (x, y, x + w, y + h))
        mirrored = draw.random() < 0.5 and flips
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop


def _in_chans(model: nn.Module, stem: Any, otherwise: int) -> int:
    """Channels that a model takes: its cfg keeps three, whatever ``in_chans`` was."""
    name = stem if isinstance(stem, str) else next(iter(stem or ()), None)
    layer = dict(model.named_modules()).get(name or "")
    return layer.in_channels if isinstance(layer, nn.Conv2d) else otherwise


def _channels(image: Image.Image, channels: int) -> torch.Tensor:
    """(channels, height, width) of bytes: grey for one, else the three colours over and over."""
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)[torch.arange(channels) % 3]


def _per_channel(values: Any, channels: int) -> list[float]:
    values = list(values)
    if channels == 1:
        return [sum(values) / len(values)]
    return [values[i % len(values)] for i in range(channels)]


def load_images(images: Images, model: nn.Module, max_images: int) -> torch.Tensor:
    """All images, of whatever ``calibrate_masterkeys`` takes, as one tensor like the model's parameters."""
    if max_images < FEWEST:
        raise CalibrationError(f"max_images is {max_images}, expected at least {FEWEST}.")
    if isinstance(images, str) and images == BUILTIN:
        images = builtin_images(model, min(COUNT, max_images))
    elif isinstance(images, (str, os.PathLike)):
        images = _load_folder(os.fspath(images), model, max_images)
    elif not isinstance(images, torch.Tensor):
        parts: list[torch.Tensor] = []
        part: Any
        for part in images:
            parts.append(part[0] if isinstance(part, (tuple, list)) else part)
            if len(parts) * len(parts[0]) >= max_images:
                break
        shapes = {tuple(part.shape[1:]) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts}
        if len(shapes) > 1 or not all(isinstance(part, torch.Tensor) for part in parts):
            raise CalibrationError(f"images come as {shapes}, expected batches (N, channels, H, W) of one size.")
        images = torch.cat(parts)[:max_images] if parts else torch.empty(0, 3, 1, 1)
    if images.ndim != 4 or not images.is_floating_point():
        raise CalibrationError(
            f"images are {tuple(images.shape)} {images.dtype}, expected (N, channels, H, W), normalised floats."
        )
    if len(images) < FEWEST:
        raise CalibrationError(f"{len(images)} images, expected at least {FEWEST}; some hundred are better.")
    images = images[_spread(len(images), max_images)]
    if not images.isfinite().all():
        raise CalibrationError("images hold NaN or Inf.")
    return images.to(next(model.parameters()))


def _load_folder(folder: str, model: nn.Module, max_images: int) -> torch.Tensor:
    if not os.path.isdir(folder):
        raise CalibrationError(f"There is no folder '{folder}'.")
    found = sorted(path for path in Path(folder).rglob("*") if is_img_extension(path.suffix.lower()))
    files = [p for p in found if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts)]
    if not files:
        raise CalibrationError(f"There are no images in '{folder}'.")
    first = _spread(len(files), max_images).tolist()
    others = sorted(set(range(len(files))).difference(first))  # in place of those that cannot be read
    tensors: list[torch.Tensor] = []
    bar = tqdm(total=len(first), desc="images", leave=False, disable=None)
    with bar, warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        mode, transform = _preparation(model)
        for i in [*first, *others]:
            if len(tensors) == len(first):
                break
            try:
                with Image.open(files[i]) as image:
                    tensors.append(transform(image.convert(mode)))
            except Exception as error:  # a damaged file: decoders may raise anything
                _logger.warning("'%s' is left out: %s", files[i], " ".join(str(error).split()) or repr(error))
            else:
                bar.update()
    if len(tensors) < FEWEST:
        raise CalibrationError(
            f"{len(tensors)} of {len(files)} images in '{folder}' can be read, expected at least {FEWEST}."
        )
    return torch.stack(tensors)


def _preparation(model: nn.Module) -> tuple[str, Any]:
    """The mode of images (PIL's) and what makes tensors of them, by a model's cfg and its first convolution."""
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    if channels not in (1, 3):
        raise CalibrationError(
            f"{type(model).__name__} takes images of {channels} channels, a folder gives 3 or 1: give a tensor of "
            "images or a DataLoader."
        )
    config = resolve_model_data_config(model)
    if channels == 1:  # the cfg may be of the weights in colour
        config["input_size"] = (1, *config["input_size"][1:])
        for name in ("mean", "std"):
            config[name] = (sum(config[name]) / len(config[name]),)
    return "L" if channels == 1 else "RGB", create_transform(**config)


def _spread(count: int, most: int) -> torch.Tensor:
    """Indices, evenly spread, at most so many."""
    return torch.arange(min(count, most), device="cpu") * count // min(count, most)
