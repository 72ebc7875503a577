"""What ``pretrained=True`` gives a ``.mk8`` name: stock weights, converted and repaired once, then kept in a cache."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import nn

from ..errors import ConversionError
from ..files import file_sha256
from ..hub.save import save_pretrained
from ..keys.banks import DEFAULT_BANK, get_bank
from ..models.surgery import convert_to_masterkeys
from ..repair.budget import KeyBudget, convert_to_agreement
from ..repair.calibrate import CalibrationReport, calibrate_masterkeys
from ..repair.images import BUILTIN, COUNT, FEWEST, photographs_sha256
from ..repair.walk import OVER
from .cache import cache_folder, load_or_make

_logger = logging.getLogger(__name__)

CALIBRATE_VARIABLE = "TIMM_MASTERKEYS_CALIBRATE"
REPAIR = 2  # counts up whenever the repair gives other networks
SECONDS = 300.0  # a repair takes at most about so long on this machine
PASSES = 7  # of an image through a network, about, that a repair takes
TRIALS = 8  # repairs, about, that take as long as the choice of keys
OFF = ("", "none", "false", "0", "no")


class NotRepairedError(Exception):
    """What was asked for is taken as it is, or only converted: never kept as a repaired network."""


def calibration_images(given: Any = None, option: str = "mk_calibrate") -> str | None:
    """What to repair with: ``"builtin"``, the path of a folder, or None for no repair.

    Args:
        given: What the caller asked for, as ``mk_calibrate``: "builtin", True, False, "none" or a folder; if None, the
            environment variable ``TIMM_MASTERKEYS_CALIBRATE`` is asked, and then it is "builtin".
        option: What the caller knows it by, for errors.

    Raises:
        ConversionError: No such folder.
    """
    asked = os.environ.get(CALIBRATE_VARIABLE, BUILTIN) if given is None else given
    if asked is True or asked == BUILTIN:
        return BUILTIN
    if asked is False or (isinstance(asked, str) and asked.lower() in OFF):
        return None
    if not isinstance(asked, (str, os.PathLike)) or not os.path.isdir(asked):
        name = option if given is not None else CALIBRATE_VARIABLE
        raise ConversionError(
            f"{name} is {asked!r}, expected a folder of images, 'builtin', or 'none' (False) for no repair."
        )
    return os.path.abspath(asked)


def load_repaired(
    name: str,
    cfg: PretrainedCfg,
    settings: Mapping[str, Any],
    images: str,
    build: Callable[[], nn.Module],
    load: Callable[[Path], nn.Module],
    cache_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Loads the repaired network of some stock weights from the cache; repairs it first if it is not there.

    Args:
        name: What is made, for the log.
        cfg: Of the stock weights.
        settings: Arguments of ``convert_to_masterkeys``, or with ``agreement`` of ``convert_to_agreement``.
        images: From ``calibration_images``.
        build: Makes the dense network with the stock weights.
        load: Loads a saved folder.
        cache_dir: As given to ``create_model``: where the weights are, and the cache unless a variable says otherwise.

    Raises:
        NotRepairedError: The machine has too little memory.
    """
    source = _source_sha256(cfg, cache_dir)
    dense: list[nn.Module] = []
    if source is None:  # not here yet: building the network fetches it
        dense.append(_undisturbed(build))
        source = _source_sha256(cfg, cache_dir) or _state_sha256(dense[0].state_dict())
    about = {
        "repair": REPAIR,
        "architecture": cfg.architecture,
        "source": source,
        "preprocessing": [cfg.input_size, cfg.mean, cfg.std, cfg.interpolation, cfg.crop_pct],
        "images": photographs_sha256() if images == BUILTIN else _folder_sha256(images),
        "settings": {**settings, "bank": get_bank(settings.get("bank", DEFAULT_BANK)).digest},
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()[:16]
    return load_or_make(
        cache_folder(cache_dir),
        f"{name}-{key}",
        lambda: _undisturbed(lambda: _repair(name, dense.pop() if dense else build(), settings, images)),
        save_pretrained,
        load,
    )


def _repair(name: str, dense: nn.Module, settings: Mapping[str, Any], images: str) -> nn.Module:
    """Converts and repairs."""
    settings = {"bank": DEFAULT_BANK, **settings}
    agreement = settings.pop("agreement", None)
    model = convert_to_masterkeys(dense, **settings)
    count, seconds = _affordable(dense)
    if count < FEWEST:
        _logger.warning("%s is NOT repaired: this machine has too little memory for it.", name)
        raise NotRepairedError
    _logger.warning(
        "%s: repairing with %s, once, in about %.0f s; kept in the cache afterwards (mk_calibrate=False turns it off).",
        name,
        "photographs that ship with timm_masterkeys" if images == BUILTIN else images,
        seconds if agreement is None else TRIALS * seconds,
    )
    report: CalibrationReport | KeyBudget
    if agreement is None:
        report = calibrate_masterkeys(model, dense, images, max_images=count, time_budget=SECONDS)
    else:
        model, report = convert_to_agreement(
            dense, agreement, images, max_images=count, time_budget=SECONDS / TRIALS, **settings
        )
    _logger.warning("%s: repaired in %.0f s %s.", name, report.seconds, report.summary())
    late = sum(why == OVER for stage in getattr(report, "stages", ()) for why in stage.left.values())
    if late:
        _logger.warning("%s: %d steps of the repair did not fit into %.0f s and were left out.", name, late, SECONDS)
    return model


@torch.no_grad()
def _affordable(dense: nn.Module) -> tuple[int, float]:
    """How many images a repair can take within time and memory, and about how many seconds that takes."""
    cfg: Any = dense.pretrained_cfg
    first = next(dense.parameters())
    image = torch.zeros(2, *cfg["input_size"], dtype=first.dtype, device=first.device)
    largest = 0

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.nbytes // len(image))

    handles = [module.register_forward_hook(measure) for module in dense.modules()]
    training = dense.training
    dense.eval()
    try:
        dense(image)
        start = time.perf_counter()
        dense(image)
        seconds = PASSES * (time.perf_counter() - start) / len(image)
    finally:
        dense.train(training)
        for handle in handles:
            handle.remove()
    weights = sum(p.nbytes for p in dense.parameters())
    each = 4 * largest + image[0].nbytes  # a block's inputs and outputs in both networks
    count = min(COUNT, max(FEWEST, int(SECONDS / seconds)), int((_free_memory() - 4 * weights) / each))
    return count, count * seconds


def _free_memory() -> float:
    """Bytes that can be had; infinite where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
        if limit != "max":
            free = min(free, float(limit) - float((group / "memory.current").read_text()))
        return free
    except (OSError, StopIteration, ValueError):
        return float("inf")


def _undisturbed(work: Callable[[], nn.Module]) -> nn.Module:
    """Does work in float32, whatever mode torch is in, and without a trace in its random numbers."""
    dtype = torch.get_default_dtype()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda), torch.inference_mode(False):
        torch.set_default_dtype(torch.float32)
        try:
            return work()
        finally:
            torch.set_default_dtype(dtype)


def _source_sha256(cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> str | None:
    """The SHA-256 of the weights that timm would load; None if they are not on this machine yet."""
    if cfg.state_dict:
        return _state_sha256(cfg.state_dict)
    if cfg.file:
        return file_sha256(cfg.file) if os.path.isfile(cfg.file) else None
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        for filename in names:
            where: Any = {"cache_dir": cache_dir, "revision": revision or None}
            path = try_to_load_from_cache(repo_id, filename, **where)
            if isinstance(path, str):
                blob = os.path.basename(os.path.realpath(path))  # of a large file its SHA-256 is the name
                return blob if len(blob) == 64 else file_sha256(path)
        return None
    if cfg.url:
        folder = cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints")
        path = os.path.join(folder, os.path.basename(cfg.url))
        return file_sha256(path) if os.path.isfile(path) else None
    return None


def _state_sha256(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder_sha256(folder: str) -> str:
    """Of the names, sizes and times of all files: that of the contents would take too long."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            about = path.stat()
            digest.update(f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()
