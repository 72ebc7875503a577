"""Repairs a converted network without labels, from some images and the dense network it was converted from."""

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CalibrationError
from ..layers import MasterKeyConv2d
from ..models.provenance import keeping
from ..models.report import CALIBRATION_NOTE, conversion_report
from ..models.wrapped import evaluating, is_sharded, unwrapped
from .images import Images, load_images
from .memory import freed_memory_kept
from .walk import HELD_OUT, StageReport, Walk

_logger = logging.getLogger(__name__)

Stage = Literal["projection", "statistics", "absorption", "healing"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WITHOUT_GRADIENTS = STAGES[:3]


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did; ``str()`` is a table.

    Attributes:
        images: Images given.
        held_out: Those of them that gave the figures. Nothing was fitted to them or chosen by them.
        stages: One StageReport a stage, in their order.
        agreement: Share of the held-out images on which both networks have the same highest output, before and after.
        divergence: Kullback-Leibler divergence of the softmaxed outputs from the reference's in nats, the same way.
        seconds: Time spent in all.
    """

    images: int
    held_out: int
    stages: tuple[StageReport, ...]
    agreement: tuple[float, float]
    divergence: tuple[float, float]
    seconds: float

    def summary(self) -> str:
        """The figures in one line."""
        refitted = sum(len(stage.changed) for stage in self.stages if stage.name == "absorption")
        return (
            f"on {self.images} images: agreement with the dense network {self.agreement[0]:.1%} -> "
            f"{self.agreement[1]:.1%}, divergence {self.divergence[0]:.2f} -> {self.divergence[1]:.2f} "
            f"({self.held_out} images held out), {refitted} pointwise layers refitted"
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{'stage':<10}  error before  error after  changed  left  seconds",
                *map(str, self.stages),
                *(f"left by {stage.name}: {name}: {why}" for stage in self.stages for name, why in stage.left.items()),
                f"calibrated {self.summary()}, {self.seconds:.0f} s",
            ]
        )


@torch.inference_mode(False)
@torch.no_grad()
def calibrate_masterkeys(
    model: nn.Module,
    reference: nn.Module,
    images: Images,
    *,
    stages: Stage | Sequence[Stage] = WITHOUT_GRADIENTS,
    heal_minutes: float = 5.0,
    batch_size: int = 8,
    max_images: int = 400,
    time_budget: float | None = None,
) -> CalibrationReport:
    """Brings a converted network's outputs back towards the dense network's, from unlabelled images. In place.

    Walks both networks block by block, in the order of execution; each block is fed with what the repaired blocks
    before it put out. In each block, in this order:

    - ``"projection"``: keys, scales and shifts are chosen anew, by least squares on the *outputs* of the layer instead
      of its kernels: the nearest key under the second moments of what the layer really sees.
    - ``"statistics"``: the BatchNorm that follows a converted layer gets the mean and variance that give its output
      the mean and variance it has in the reference; without a BatchNorm, the layer's bias gets the mean.
    - ``"absorption"``: the block's last pointwise layer (and every pointwise layer outside of blocks, such as the
      classifier) is refitted by ridge least squares, so that the block's output, with all the drift that came in by
      its skip path, is that of the reference. A layer for which no ridge helps on images it was not fitted to is left
      as it is.
    - ``"healing"`` (not by default): gradient steps on all parameters of the block, scales included, towards the
      reference's output of the block; the state that is best on images it was not trained on stays.

    Keys never change; leave out ``"absorption"`` and ``"healing"`` to keep every layer but the converted ones and
    their norms. How a block's output depends on its last pointwise layer is measured, not known by family: where it is
    not one factor a channel, the layer is fitted to its own output in the reference. Each ridge is chosen by four folds
    of the images; every fifth batch is kept out of all that and gives the report's figures. Deterministic, but for
    healing and a time budget. While it works, freed memory stays with the process (``memory.freed_memory_kept``).

    Args:
        model: A converted model in float32 or float64. What is compiled or wrapped, this or the reference, runs as the
            plain model in it.
        reference: The dense model it was converted from, on the same device and of the same type; unchanged.
        images: (N, channels, H, W), normalised as for the model; or an iterable of such batches, alone or first in a
            tuple (a DataLoader); or a folder of images, searched at all depths (but for hidden files) and prepared as
            the model's ``pretrained_cfg`` says, in grey for a model of one channel; files that cannot be read, or of
            more than PIL's 90 megapixels, are named in a warning and left out; or ``"builtin"``:
            ``builtin_images(model)``. At least 10; some hundred are better.
        stages: What to do in each block; the order is always the one above.
        heal_minutes: For healing alone, shared equally among the blocks.
        batch_size: Images at a time.
        max_images: At most so many are used: evenly spread over a folder or a tensor, the first of an iterable. All
            are kept in memory, with one block's inputs and outputs in both networks (EfficientNet-Lite0 with 250
            images: 3 GB in all); of each layer at most 100,000 positions.
        time_budget: Seconds, healing apart, after which the blocks still to come get their statistics only.

    Returns:
        What each stage did, and how well the networks agree before and after.

    Raises:
        CalibrationError: Nothing converted, a reference of another architecture, too few or non-finite images, or
            outputs that are not finite. The model is then as it was; so it is after an interruption.

    Example:
        >>> dense = timm.create_model("convnext_tiny", pretrained=True)
        >>> model = convert_to_masterkeys(dense)
        >>> print(calibrate_masterkeys(model, dense, "folder/of/images"))
    """
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise CalibrationError(f"stages is {stages!r}, expected some of {', '.join(STAGES)}.")
    if "healing" in stages and not 0 < heal_minutes < math.inf:
        raise CalibrationError(f"heal_minutes is {heal_minutes}, expected more than 0.")
    model, reference = unwrapped(model), unwrapped(reference)
    check_models(model, reference)
    tensor = load_images(images, model, max_images)
    start = time.perf_counter()
    batch_size = max(1, min(batch_size, len(tensor) // HELD_OUT))
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in tensor.split(batch_size)]
    state = copy.deepcopy(model.state_dict())
    plainly = torch.autocast(tensor.device.type, enabled=False)
    with evaluating(model, reference), plainly, freed_memory_kept():
        for network in (reference, model):
            probe(network, batches[0][:2])
        try:
            walk = Walk(model, reference, batches, stages, heal_minutes, time_budget)
            before = torch.cat([_finite(model, model(batches[i])) for i in walk.held_out])
            outputs = [_finite(m, out) for m, out in zip((model, reference), walk.run(), strict=True)]
            after, expected = (torch.cat([out.split(batch_size)[i] for i in walk.held_out]) for out in outputs)
        except BaseException:
            with keeping(model):
                model.load_state_dict(state)
            raise
    report = CalibrationReport(
        len(tensor),
        len(expected),
        tuple(walk.ledgers[stage].report(stage) for stage in STAGES if stage in stages),
        (output_agreement(before, expected), output_agreement(after, expected)),
        (output_divergence(before, expected), output_divergence(after, expected)),
        time.perf_counter() - start,
    )
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        notes = tuple(note for note in cfg.get("notes") or () if not note.startswith(CALIBRATION_NOTE))
        cfg["notes"] = (*notes, CALIBRATION_NOTE + report.summary())
    _logger.info("Calibrated:\n%s", report)
    return report


def check_models(model: nn.Module, reference: nn.Module) -> None:
    """Raises CalibrationError unless a converted model can be repaired with a dense one."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MasterKeyConv2d)}
    if not layers:
        raise CalibrationError(f"{type(model).__name__} holds no converted layer; convert_to_masterkeys comes first.")
    if is_sharded(model) or is_sharded(reference):
        raise CalibrationError("The parameters are sharded, expected whole ones. Calibrate first, then shard.")
    dense = dict(reference.named_modules())
    for name, layer in layers.items():
        other = dense.get(name)
        if isinstance(other, MasterKeyConv2d) or not isinstance(other, nn.Conv2d):
            raise CalibrationError(
                f"The reference has {type(other).__name__} at {name}, expected the dense Conv2d it was converted from."
            )
        if other.weight.shape != layer.weight.shape:
            raise CalibrationError(
                f"The reference has kernels of {tuple(other.weight.shape)} at {name}, the model of "
                f"{tuple(layer.weight.shape)}."
            )
    missing = [name for name, _ in model.named_modules() if name not in dense]
    if missing:
        raise CalibrationError(f"The reference has no {missing[0]}: give the dense model this one was converted from.")
    own, given = (dict(m.named_parameters()) for m in (model, reference))
    for name in own.keys() & given.keys():
        a, b = own[name], given[name]
        if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype:
            raise CalibrationError(
                f"The reference has {tuple(b.shape)} {b.dtype} on {b.device} at {name}, the model {tuple(a.shape)} "
                f"{a.dtype} on {a.device}: give the dense model this one was converted from, in the same place."
            )
    first = next(reference.parameters())
    if first.device.type in ("meta", "mps") or first.dtype not in (torch.float32, torch.float64):
        raise CalibrationError(
            f"The models are {first.dtype} on {first.device}; calibrate in float32 on CPU or CUDA, then cast and move."
        )
    if any(parameter.is_inference() for parameter in (*model.parameters(), *reference.parameters())):
        raise CalibrationError("The models were made in inference mode, which allows no change. Make them outside.")
    other = [name for name in own.keys() & given.keys() if not torch.equal(own[name], given[name])]
    if other and not conversion_report(model).calibration:
        _logger.warning(
            "%d parameters beside the kernels differ from the reference's, as %s. The reference should be the dense "
            "model that this one was converted from.",
            len(other),
            min(other),
        )


def _finite(model: nn.Module, out: Any) -> torch.Tensor:
    if not isinstance(out, torch.Tensor):
        raise CalibrationError(
            f"{type(model).__name__} puts out a {type(out).__name__}, expected one tensor: give the whole model, not "
            "a feature extractor."
        )
    if not out.isfinite().all():
        raise CalibrationError(f"{type(model).__name__} puts out NaN or Inf on these images.")
    return out


def probe(model: nn.Module, images: torch.Tensor) -> None:
    """Fails if a model cannot work with such images."""
    try:
        out = model(images)
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot work with images of {tuple(images.shape[1:])}: {error}"
        ) from error
    _finite(model, out)


def output_agreement(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the images on which two networks have the same highest output."""
    return float((out.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).double().mean())


def output_divergence(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Kullback-Leibler divergence of softmaxed outputs from the expected ones, in nats; the mean over the images."""
    logits, wanted = (x.flatten(1).double().log_softmax(1) for x in (out, expected))
    return float(F.kl_div(logits, wanted, reduction="batchmean", log_target=True))
