"""Images to calibrate with: from a folder, a tensor or a loader; or crops of the photographs that ship."""

import hashlib
import itertools
import logging
import math
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, is_img_extension, resolve_data_config
from timm.data.transforms import str_to_pil_interp
from timm.models import PretrainedCfg
from torch import nn
from tqdm.auto import tqdm

from ..conversion.wrapped import unwrapped
from ..errors import CalibrationError, ConversionError
from ..files import walk_files
from .outputs import describe

_logger = logging.getLogger(__name__)

Images = torch.Tensor | Iterable[Any] | str | os.PathLike[str]
Size = int | Sequence[int] | None

FEWEST = 10  # images
BUILTIN = "builtin"  # in place of a folder: the photographs that ship
CALIBRATE_VARIABLE = "TIMM_MASTERKEYS_CALIBRATE"
COUNT = 76  # crops, as many as there are photographs
HELD_OUT_EVERY = 4  # every fourth photograph can be held out, as is every fourth image for a choice of keys
HELD_OUT_BATCHES = 5  # every fifth batch is held out, unless held-out images are given
AREA = 0.05, 1.0  # smallest and largest share of a photograph in a crop
RATIO = 3 / 4, 4 / 3  # a crop's width to height, times that of the model's input
BATCH_NAMES = "pixel_values", "image", "images", "input"  # of a batch that is a dictionary


class Pixels(NamedTuple):
    """How images are prepared; None takes the value from a model's ``pretrained_cfg``.

    Attributes:
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel, the same way.
        size: Height and width, or one number for both.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: Size = None


FROM_CFG = Pixels()


def prepare_for(model: nn.Module | PretrainedCfg | Mapping[str, Any], given: Pixels) -> dict[str, Any]:
    """The arguments of timm's ``create_transform`` for a model, with mean and std for each of its channels.

    Values in ``given`` come before those of the ``pretrained_cfg``, which is the model's, or that of the one timm model
    inside it. Of nested modules with a ``pretrained_cfg`` the outermost counts.

    Raises:
        CalibrationError: No ``pretrained_cfg``, or those of several models, and not all of mean, std and size.
    """
    cfg, inner = _find_cfg(model) if isinstance(model, nn.Module) else (model, None)
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg or {})
    missing = [f"{name}=" for name, value in given._asdict().items() if value is None]
    if missing and not cfg:
        raise CalibrationError(
            f"{type(model).__name__} has no pretrained_cfg, nor has one model in it, so how its images are prepared is "
            f"not known: give {', '.join(missing)}."
        )
    config = dict(resolve_data_config(pretrained_cfg=cfg or {"input_size": (3, 1, 1)}))
    channels, *size = config["input_size"]
    if isinstance(model, nn.Module):
        channels = _in_chans(inner or model, cfg.get("first_conv"), channels)
    if given.size is not None:
        size = [given.size] * 2 if isinstance(given.size, int) else list(given.size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CalibrationError(f"size is {given.size!r}, expected a height and a width, or one number for both.")
    config["input_size"] = (channels, *size)
    if given.mean is not None and not all(0 <= value <= 1 for value in given.mean):
        raise CalibrationError(f"mean is {given.mean!r}, expected values for pixels from 0 to 1: divide by 255.")
    for name, values in (("mean", given.mean), ("std", given.std)):
        values = list(config[name] if values is None else values)
        if channels == 1:  # the cfg may belong to weights for three channels
            values = [sum(values) / len(values)]
        config[name] = tuple(values[i % len(values)] for i in range(channels))
    return config


def _find_cfg(model: nn.Module) -> tuple[Any, nn.Module | None]:
    """The ``pretrained_cfg`` of a model, or of the one model inside it that has one; and that model."""
    models: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(module, "pretrained_cfg", None) and not any(not o or name.startswith(f"{o}.") for o in models):
            models[name] = module
    inner = next(iter(models.values())) if len(models) == 1 else None
    return getattr(inner, "pretrained_cfg", None), inner


def calibration_images(given: Any = None, option: str = "mk_calibrate") -> str | None:
    """The images to calibrate with: ``"builtin"``, the path of a folder, or None for no calibration.

    Args:
        given: "builtin", True, False, "none" or a folder. None stands for the environment variable
            ``TIMM_MASTERKEYS_CALIBRATE``, which is "builtin" by default.
        option: The name of the argument, for errors.

    Raises:
        ConversionError: No such folder.
    """
    images = os.environ.get(CALIBRATE_VARIABLE) or BUILTIN if given is None else given
    if images is True or _is_builtin(images):
        return BUILTIN
    if is_off(images):
        return None
    if not isinstance(images, (str, os.PathLike)) or not os.path.isdir(images):
        name = option if given is not None else CALIBRATE_VARIABLE
        raise ConversionError(
            f"{name} is {images!r}, expected a folder of images, 'builtin', or 'none' for no calibration."
        )
    return os.path.abspath(images)


def is_off(images: Any) -> bool:
    """Whether images stand for no calibration."""
    return images is False or (isinstance(images, str) and images.lower() in ("none", "false", "0", "no"))


def builtin_images(
    model: nn.Module | PretrainedCfg | Mapping[str, Any],
    count: int = COUNT,
    seed: int = 0,
    *,
    held_out: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Size = None,
) -> torch.Tensor:
    """Images prepared for a model, from photographs that ship: random crops at many scales, half of them mirrored.

    Calibrate with them, but do not measure accuracy on them: they show few things, each several times. The photographs
    are listed in ``data/photographs/sources.csv``, with authors and licences. The same arguments give the same images
    on every machine with the same Pillow; no random state is read or changed.

    Args:
        model: A timm model, a model with a single timm model in it, or a ``pretrained_cfg``. Its input size, mean,
            standard deviation and interpolation are used. A model of one channel gets grey images, one of any other
            number the three colours in turn.
        count: The number of images.
        seed: Another seed gives other crops.
        held_out: True for crops of every fourth photograph only, to compare networks by; False for crops of the other
            three quarters only, to calibrate with; None for crops of all.
        mean: Mean of each channel, for pixels from 0 to 1; in place of the cfg's.
        std: Standard deviation of each channel, the same way.
        size: Height and width, or one number for both; in place of the cfg's.

    Returns:
        (count, channels, height, width), normalised, on the CPU.

    Raises:
        CalibrationError: No count of images, or a model without a ``pretrained_cfg`` and not all of mean, std, size.

    Example:
        >>> images = builtin_images(timm.create_model("convnext_tiny"), 32)
        >>> images = builtin_images(my_model, mean=[0.5] * 3, std=[0.5] * 3, size=224)
    """
    if count < 1:
        raise CalibrationError(f"count is {count}, expected at least 1.")
    config = prepare_for(unwrapped(model) if isinstance(model, nn.Module) else model, Pixels(mean, std, size))
    return _normalised(_crops(config, count, seed, held_out), config)


def _crops(config: Mapping[str, Any], count: int, seed: int, held_out_photographs: bool | None) -> torch.Tensor:
    """The crops of ``builtin_images`` as bytes."""
    channels, height, width = config["input_size"]
    pictures = list(photographs().values())
    every = HELD_OUT_EVERY
    if held_out_photographs is not None:
        pictures = [p for i, p in enumerate(pictures) if (i % every == every - 1) == held_out_photographs]
    crops = draw_crops(pictures, (width, height), count, seed, interpolation=config["interpolation"])
    return torch.stack([_channels(crop, channels) for crop in crops])


def photographs() -> dict[str, Image.Image]:
    """The photographs by name, as in ``sources.csv`` without the suffix, in its order."""
    pictures = {}
    for path in _files():
        with path.open("rb") as file, Image.open(file) as image:
            pictures[path.name.removesuffix(".webp")] = image.convert("RGB")
    return pictures


@lru_cache
def photographs_sha256() -> str:
    """The SHA-256 of all photographs together, in hex."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in _files())).hexdigest()


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
    """Random crops, resized to ``size`` (width, height). Every picture gives one crop before any gives a second.

    ``area`` is the smallest and largest share of a picture that a crop takes. ``ratio`` is the range of its width to
    height, relative to that of ``size``; a crop ends where the picture does. ``flips`` mirrors half of the crops.
    """
    draw = random.Random(str(seed))  # a string: the same crops in every version of Python, and -1 differs from 1
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
    """The input channels of a model, from its first convolution: the cfg says three, whatever ``in_chans`` was."""
    name = stem if isinstance(stem, str) else next(iter(stem or ()), None)
    layer = dict(model.named_modules()).get(name or "")
    if not isinstance(layer, nn.Conv2d):
        layer = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return layer.in_channels if layer is not None else otherwise


def _channels(image: Image.Image, channels: int) -> torch.Tensor:
    """The pixels (channels, height, width) as bytes: grey for one channel, else the three colours in turn."""
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)[[i % 3 for i in range(channels)]]


def _normalised(pixels: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Bytes as timm's transform gives them to a model, in float32 whatever torch's default dtype is."""
    mean, std = (
        torch.tensor(config[name], dtype=torch.float32, device="cpu").view(-1, 1, 1) for name in ("mean", "std")
    )
    return (pixels.float() / 255 - mean) / std


def load_images(
    images: Images,
    model: nn.Module,
    max_images: int,
    given: Pixels = FROM_CFG,
    held_out_photographs: bool | None = None,
) -> torch.Tensor:
    """Images in any form that ``calibrate_masterkeys`` takes, as one tensor of the model's dtype and device.

    ``held_out_photographs`` is ``held_out`` of ``builtin_images``; of held-out ones there are any number of crops.
    """
    if max_images < FEWEST:
        raise CalibrationError(f"max_images is {max_images}, expected at least {FEWEST}.")
    if isinstance(images, (str, os.PathLike)):
        config = prepare_for(model, given)
        if _is_builtin(images):
            count = max_images if held_out_photographs else min(COUNT, max_images)
            pixels = _crops(config, count, 0, held_out_photographs)
        else:
            pixels = _load_folder(os.fspath(images), model, max_images, config)
        images = _normalised(pixels, config)
    elif any(value is not None for value in given):
        raise CalibrationError("mean, std and size prepare a folder or 'builtin'; other images are taken as they are.")
    elif not isinstance(images, (torch.Tensor, Iterable)):
        raise CalibrationError(f"images is {images!r:.80}, expected a tensor, batches, a folder or 'builtin'.")
    elif not isinstance(images, torch.Tensor):
        images = _collect([images] if isinstance(images, Mapping) else images, max_images)
    if images.ndim != 4 or not images.is_floating_point():
        raise CalibrationError(
            f"images are {tuple(images.shape)} {images.dtype}, expected (N, channels, H, W), normalised floats."
        )
    if len(images) < FEWEST:
        raise CalibrationError(f"{len(images)} images, expected at least {FEWEST}; some hundred are better.")
    images = images[_spread(len(images), max_images)]
    if not images.isfinite().all():
        raise CalibrationError("images hold NaN or Inf.")
    return images.to(next(itertools.chain(model.parameters(), model.buffers())))  # all of it may be frozen


def split_images(
    images: Images, held_out: Images | None, model: nn.Module, max_images: int, given: Pixels, batch_size: int
) -> tuple[list[torch.Tensor], list[int]]:
    """All batches of images, and the indices of the held-out ones: every fifth, if there are no held-out images."""
    if _is_builtin(images) and (held_out is None or _is_builtin(held_out)):
        fitted = load_images(images, model, max_images, given, False)
        others = load_images(images, model, min(COUNT, max_images), given, True)
    else:
        paths = [isinstance(part, (str, os.PathLike)) for part in (images, held_out)]
        given_images, given_held_out = (given if path or not any(paths) else FROM_CFG for path in paths)
        fitted = load_images(images, model, max_images, given_images)
        others = fitted[:0] if held_out is None else load_images(held_out, model, max_images, given_held_out)
    if others.shape[1:] != fitted.shape[1:]:
        shapes = " and ".join(str(tuple(part.shape[1:])) for part in (fitted, others))
        raise CalibrationError(f"images and held_out are of {shapes}, expected one size.")
    if len(others):
        first, last = fitted.split(batch_size), others.split(batch_size)
        batches, held_out_batches = (*first, *last), range(len(first), len(first) + len(last))
    else:
        batches = fitted.split(max(1, min(batch_size, len(fitted) // HELD_OUT_BATCHES)))
        held_out_batches = range(HELD_OUT_BATCHES - 1, len(batches), HELD_OUT_BATCHES)
    return [batch.contiguous(memory_format=torch.channels_last) for batch in batches], list(held_out_batches)


def split_for_choice(
    images: Images, dense: nn.Module, max_images: int = 300, given: Pixels = FROM_CFG
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to calibrate with, and held-out images; of the built-in ones, crops of different photographs."""
    every = HELD_OUT_EVERY
    if _is_builtin(images):
        most = 8 * (COUNT // every)  # many crops of each held-out photograph, as nothing is fitted to them
        return load_images(images, dense, max_images, given, False), load_images(images, dense, most, given, True)
    least = every * FEWEST
    tensor = load_images(images, dense, max_images * every // (every - 1), given)
    if len(tensor) < least:
        raise CalibrationError(
            f"{len(tensor)} images, expected at least {least}, as every fourth is held out; some hundred are better."
        )
    is_held_out = torch.arange(len(tensor), device=tensor.device) % every == every - 1
    return tensor[~is_held_out], tensor[is_held_out]


def _is_builtin(images: Any) -> bool:
    """Whether ``images`` names the photographs that ship."""
    return isinstance(images, str) and images == BUILTIN


def origin_of(images: Images) -> str:
    """The kind of images, for the record: "builtin", a folder's name, or "tensor"."""
    folder = isinstance(images, (str, os.PathLike))
    return os.path.basename(os.path.abspath(os.fspath(images))) if folder else "tensor"  # type: ignore[arg-type]


def _collect(batches: Iterable[Any], max_images: int) -> torch.Tensor:
    """The first images of an iterable of batches, as one tensor."""
    parts: list[Any] = []
    for batch in batches:
        if isinstance(batch, Mapping):
            batch = next((batch[key] for key in BATCH_NAMES if key in batch), batch)
        parts.append(batch[0] if isinstance(batch, (tuple, list)) else batch)
        if isinstance(parts[0], torch.Tensor) and sum(map(len, parts)) >= max_images:
            break
    kinds = {tuple(part.shape[1:]) if isinstance(part, torch.Tensor) else describe(part) for part in parts}
    if len(kinds) > 1 or not all(isinstance(part, torch.Tensor) for part in parts):
        raise CalibrationError(
            f"images come as {', '.join(map(str, kinds))}, expected batches (N, channels, H, W) of one size, alone, "
            f"first in a tuple, or in a dictionary under one of {', '.join(BATCH_NAMES)}."
        )
    return torch.cat(parts)[:max_images] if parts else torch.empty(0, 3, 1, 1)


def _load_folder(folder: str, model: nn.Module, max_images: int, config: dict[str, Any]) -> torch.Tensor:
    if not os.path.isdir(folder):
        raise CalibrationError(f"There is no folder '{folder}'.")
    files = [path for path in walk_files(folder) if is_img_extension(path.suffix.lower())]
    if not files:
        raise CalibrationError(f"There are no images in '{folder}'.")
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise CalibrationError(
            f"{type(model).__name__} takes images of {channels} channels, a folder gives 3 or 1: give a tensor of "
            "images or a DataLoader."
        )
    chosen = _spread(len(files), max_images).tolist()
    spare = sorted(set(range(len(files))).difference(chosen))  # for files that cannot be read
    tensors: list[torch.Tensor] = []
    bar = tqdm(total=len(chosen), desc="load images", unit="image", leave=False, disable=None)
    with bar, warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        mode, transform = "L" if channels == 1 else "RGB", create_transform(**config, normalize=False)
        for i in [*chosen, *spare]:
            if len(tensors) == len(chosen):
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


def _spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` of ``count`` indices, evenly spread."""
    return torch.arange(min(count, most), device="cpu") * count // min(count, most)
