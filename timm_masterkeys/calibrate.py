"""Repairs a converted network without labels, from some images and the dense network it was converted from."""

import copy
import logging
import math
import os
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, is_img_extension, resolve_model_data_config
from torch import nn
from tqdm.auto import tqdm

from .blocks import Calls, Hook, Part, PartwiseNetwork, Reached, copied, find_parts
from .errors import CalibrationError
from .layers import MasterKeyConv2d, ScaledKeyConv2d
from .memory import freed_memory_kept
from .report import CALIBRATION_NOTE, conversion_report

_logger = logging.getLogger(__name__)

Stage = Literal["projection", "statistics", "absorption", "healing"]
Images = torch.Tensor | Iterable[Any] | str | os.PathLike[str]
STAGES: tuple[Stage, ...] = get_args(Stage)
WITHOUT_GRADIENTS = STAGES[:3]

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # times the mean energy of a feature
HELD_OUT = 5  # every fifth batch is fitted to by nothing
FEWEST = 10  # images
ROWS = 100_000  # positions of all images together that a pointwise layer is fitted to
KERNEL_ROWS = 20_000  # and a kernel,
KERNEL_IMAGES = 64  # in so many images
HEALING_RATE = 1.5e-3, 1.5e-4  # of Adam, for what is 1-D and for weights
DEAD = 1e-10  # a channel that varies less than this is left alone


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        name: The stage.
        before: Squared error of a block's output relative to the variance of the reference's, on held-out images,
            before the stage; the mean over the blocks it worked on (NaN if there are none).
        after: The same after it.
        changed: Names of the layers it changed: kernels, norms (by the layer before them), pointwise layers.
        left: Layers it left as they were, and why.
        seconds: Time spent.
    """

    name: str
    before: float
    after: float
    changed: tuple[str, ...]
    left: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name:<10}  {self.before:>12.3f}  {self.after:>11.3f}  {len(self.changed):>7}  {len(self.left):>4}  "
            f"{self.seconds:>7.0f}"
        )


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did; ``str()`` is a table.

    Attributes:
        images: Images given.
        held_out: Those of them that nothing was fitted to: they only chose the ridges (and when to stop healing), and
            gave the figures.
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


@torch.no_grad()
def calibrate_masterkeys(
    model: nn.Module,
    reference: nn.Module,
    images: Images,
    *,
    stages: Sequence[Stage] = WITHOUT_GRADIENTS,
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
      its skip path, is that of the reference. A layer for which no ridge helps on held-out images is left as it is.
    - ``"healing"`` (not by default): gradient steps on all parameters of the block, scales included, towards the
      reference's output of the block; the best state on held-out images stays.

    Keys never change; leave out ``"absorption"`` and ``"healing"`` to keep every layer but the converted ones and
    their norms. How a block's output depends on its last pointwise layer is measured, not known by family: where it is
    not one factor a channel, the layer is fitted to its own output in the reference. Every fifth batch is kept out of
    all fitting: it chooses the ridges and gives the report's figures. Deterministic, but for healing and a time budget.

    Args:
        model: A converted model in float32 or float64.
        reference: The dense model it was converted from, on the same device and of the same type; unchanged.
        images: (N, channels, H, W), normalised as for the model; or an iterable of such batches, alone or first in a
            tuple (a DataLoader); or a folder of images, searched at all depths and prepared as the model's
            ``pretrained_cfg`` says. At least 10; some hundred are better.
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
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise CalibrationError(f"stages is {stages!r}, expected some of {', '.join(STAGES)}.")
    if "healing" in stages and not 0 < heal_minutes < math.inf:
        raise CalibrationError(f"heal_minutes is {heal_minutes}, expected more than 0.")
    _check_models(model, reference)
    tensor = _load(images, model, max_images)
    start = time.perf_counter()
    batches = list(tensor.split(max(1, min(batch_size, len(tensor) // HELD_OUT))))
    state = copy.deepcopy(model.state_dict())
    with _evaluating(model, reference), freed_memory_kept():
        for network in (reference, model):
            _probe(network, batches[0][:2])
        try:
            walk = _Walk(model, reference, batches, tuple(stages), heal_minutes, time_budget)
            before = torch.cat([_finite(model, model(batches[i])) for i in walk.held_out])
            after, expected = walk.run()
        except BaseException:
            model.load_state_dict(state)
            raise
    report = CalibrationReport(
        len(tensor),
        len(expected),
        tuple(walk.report(stage) for stage in STAGES if stage in stages),
        (_agreement(before, expected), _agreement(after, expected)),
        (_divergence(before, expected), _divergence(after, expected)),
        time.perf_counter() - start,
    )
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        notes = tuple(note for note in cfg.get("notes") or () if not note.startswith(CALIBRATION_NOTE))
        cfg["notes"] = (*notes, CALIBRATION_NOTE + report.summary())
    _logger.info("Calibrated:\n%s", report)
    return report


def _check_models(model: nn.Module, reference: nn.Module) -> None:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MasterKeyConv2d)}
    if not layers:
        raise CalibrationError(f"{type(model).__name__} holds no converted layer; convert_to_masterkeys comes first.")
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
    other = [name for name in own.keys() & given.keys() if not torch.equal(own[name], given[name])]
    if other and not conversion_report(model).calibration:
        _logger.warning(
            "%d parameters beside the kernels differ from the reference's, as %s. The reference should be the dense "
            "model that this one was converted from.",
            len(other),
            min(other),
        )


def _load(images: Images, model: nn.Module, max_images: int) -> torch.Tensor:
    """All images as one tensor like the model's parameters."""
    if max_images < FEWEST:
        raise CalibrationError(f"max_images is {max_images}, expected at least {FEWEST}.")
    if isinstance(images, (str, os.PathLike)):
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
    files = sorted(path for path in Path(folder).rglob("*") if is_img_extension(path.suffix.lower()))
    if not files:
        raise CalibrationError(f"There are no images in '{folder}'.")
    transform: Any = create_transform(**resolve_model_data_config(model))
    tensors = []
    for i in tqdm(_spread(len(files), max_images).tolist(), desc="images", leave=False, disable=None):
        with Image.open(files[i]) as image:
            tensors.append(transform(image.convert("RGB")))
    return torch.stack(tensors)


def _spread(count: int, most: int) -> torch.Tensor:
    """Indices, evenly spread, at most so many."""
    return torch.arange(min(count, most)) * count // min(count, most)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode; every module gets its own mode back."""
    training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _finite(model: nn.Module, out: Any) -> torch.Tensor:
    if not isinstance(out, torch.Tensor):
        raise CalibrationError(
            f"{type(model).__name__} puts out a {type(out).__name__}, expected one tensor: give the whole model, not "
            "a feature extractor."
        )
    if not out.isfinite().all():
        raise CalibrationError(f"{type(model).__name__} puts out NaN or Inf on these images.")
    return out


def _probe(model: nn.Module, images: torch.Tensor) -> None:
    """Fails if a model cannot work with such images."""
    try:
        out = model(images)
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot work with images of {tuple(images.shape[1:])}: {error}"
        ) from error
    _finite(model, out)


def _agreement(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).double().mean())


def _divergence(out: torch.Tensor, expected: torch.Tensor) -> float:
    logits, wanted = (x.flatten(1).double().log_softmax(1) for x in (out, expected))
    return float(F.kl_div(logits, wanted, reduction="batchmean", log_target=True))


@dataclass
class _Ledger:
    """What is written down of a stage during the walk."""

    errors: list[tuple[float, float]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class _Walk:
    """One way through both networks, block by block."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        batches: list[torch.Tensor],
        stages: tuple[str, ...],
        heal_minutes: float,
        time_budget: float | None,
    ) -> None:
        self.parts, self.norms = find_parts(model, batches[0][:2])
        self.ours, self.reference = (PartwiseNetwork(m, self.parts, batches) for m in (model, reference))
        self.models, self.time_budget = (model, reference), time_budget
        self.ledgers = {stage: _Ledger() for stage in stages}
        self.held_out = [i for i in range(len(batches)) if i % HELD_OUT == HELD_OUT - 1]
        self.fitted = [i for i in range(len(batches)) if i % HELD_OUT != HELD_OUT - 1]
        images = sum(len(batches[i]) for i in self.fitted)
        self.sampled = self.fitted[:: math.ceil(images / KERNEL_IMAGES)]
        self.rows, self.kernel_rows = ROWS // len(self.fitted), KERNEL_ROWS // len(self.sampled)  # a batch
        self.heal_seconds = 60 * heal_minutes / max(1, sum(bool(part.converted) for part in self.parts))
        found = {name for part in self.parts for name in part.converted}
        for name, layer in model.named_modules():
            if isinstance(layer, MasterKeyConv2d) and name not in found:
                for ledger in self.ledgers.values():
                    ledger.left[name] = "runs not at all or more than once"

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of both networks on the held-out images, after the repair."""
        start = time.perf_counter()
        for index, part in enumerate(tqdm(self.parts, desc="calibrate", unit="block", leave=False, disable=None)):
            stages = set(self.ledgers)
            if self.time_budget is not None and self._seconds(start) > self.time_budget:
                for stage in stages - {"statistics"}:
                    names = [part.pointwise] if stage == "absorption" and part.pointwise else part.converted
                    self.ledgers[stage].left.update(dict.fromkeys(names, "the time budget was over"))
                stages &= {"statistics"}
            self._repair(index, part, stages)
        outputs = [_finite(m, n.finish()) for m, n in zip(self.models, (self.ours, self.reference), strict=True)]
        sizes = [len(batch) for batch in self.ours.batches]
        ours, wanted = (torch.cat([out.split(sizes)[i] for i in self.held_out]) for out in outputs)
        return ours, wanted

    def _seconds(self, start: float) -> float:
        """Since the start, healing apart."""
        healing = self.ledgers.get("healing", _Ledger()).seconds
        return time.perf_counter() - start - healing

    def report(self, stage: str) -> StageReport:
        """What a stage has done."""
        ledger = self.ledgers[stage]
        errors = torch.tensor(ledger.errors or [(math.nan, math.nan)], dtype=torch.float64).nanmean(0).tolist()
        return StageReport(stage, errors[0], errors[1], tuple(ledger.changed), ledger.left, ledger.seconds)

    def _repair(self, index: int, part: Part, stages: set[str]) -> None:
        """Takes both networks one part further, ours repaired."""
        calls = self.ours.enter(index)
        target = _Rows(self.ours.modules.get(part.pointwise), self.rows)
        moments = {name: _Moments(self.fitted) for name in part.converted if "statistics" in stages}
        kernels = {
            name: _Rows(None, self.kernel_rows, self.sampled)
            for name in part.converted
            if "projection" in stages and not isinstance(self.ours.modules[name], ScaledKeyConv2d)
        }
        taps: list[tuple[str, Hook]] = [*moments.items(), *kernels.items()]
        if part.pointwise and "absorption" in stages:
            taps.append((part.pointwise, target))
        wanted = self.reference.run(index, self.reference.enter(index), taps)

        error = math.nan
        for stage, names in (("projection", kernels), ("statistics", moments)):
            if not names:
                continue
            start = time.perf_counter()
            before = self._error_now(index, calls, wanted) if math.isnan(error) else error
            for name in names:
                if stage == "projection":
                    self._project(index, calls, name, kernels[name])
                else:
                    self._match(index, calls, name, moments[name])
            error = self._error_now(index, calls, wanted)
            self.ledgers[stage].errors.append((before, error))
            self.ledgers[stage].seconds += time.perf_counter() - start
        if part.pointwise and "absorption" in stages:
            start = time.perf_counter()
            before, out = self._absorb(index, calls, target, wanted)
            self.ledgers["absorption"].errors.append((before, self._error(index, out, wanted)))
            self.ledgers["absorption"].seconds += time.perf_counter() - start
        else:
            out = self.ours.run(index, calls)
        if part.converted and "healing" in stages:
            start = time.perf_counter()
            before = self._error(index, out, wanted)
            out = self._heal(index, calls, out, wanted)
            self.ledgers["healing"].errors.append((before, self._error(index, out, wanted)))
            self.ledgers["healing"].seconds += time.perf_counter() - start
        self.ours.outputs, self.reference.outputs = out, wanted

    def _error_now(self, index: int, calls: Calls, wanted: list[Any]) -> float:
        out = dict(zip(self.held_out, self.ours.run(index, [calls[i] for i in self.held_out]), strict=True))
        return self._error(index, out, wanted)

    def _error(self, index: int, out: Any, wanted: list[Any]) -> float:
        """Of a part on the held-out images, over the variance of what is wanted.

        NaN for outputs that are not single tensors, and for a layer whose norm, outside of the part, has its share.
        """
        pairs = [(out[i], wanted[i]) for i in self.held_out]
        if self.parts[index].name in self.norms or not all(isinstance(x, torch.Tensor) for pair in pairs for x in pair):
            return math.nan
        ours, theirs = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return float((ours - theirs).square().mean() / theirs.var().clamp_min(1e-30))

    def _project(self, index: int, calls: Calls, name: str, wanted: "_Rows") -> None:
        """Chooses keys, scale and shift of a converted layer by what it puts out."""
        layer: Any = self.ours.modules[name]
        probes = torch.cat([torch.ones_like(layer.keys[:1]), layer.keys])
        count = len(probes)
        probe = layer.fuse()  # the same geometry and padding
        probe.weight = nn.Parameter(probes.repeat(layer.in_channels, 1, 1).unsqueeze(1), requires_grad=False)
        probe.bias = None
        targets = iter(wanted.outputs)
        grams: list[torch.Tensor] = []

        def gather(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            target = next(targets).flatten(0, 1)
            responses = wanted.pick(probe.forward(args[0])).flatten(0, 1).view(len(target), layer.in_channels, count)
            responses = responses.repeat_interleave(layer.out_channels // layer.in_channels, 1)
            rows = torch.cat([responses, target.unsqueeze(2), torch.ones_like(target).unsqueeze(2)], 2).transpose(0, 1)
            grams.append(rows.mT.double() @ rows.double())
            raise Reached

        self.ours.run(index, [calls[i] for i in self.sampled], [(name, gather)])
        gram = torch.stack(grams).sum(0)
        mean = gram[:, :-1, -1] / gram[:, -1:, -1]
        covariance = gram[:, :-1, :-1] / gram[:, -1:, -1:] - mean.unsqueeze(2) * mean.unsqueeze(1)
        keys, scale, shift = choose_keys(covariance, layer.keys_per_kernel)
        alive = (covariance[:, -1, -1] > DEAD) & (covariance[:, :-1, :-1].diagonal(dim1=1, dim2=2).amax(1) > DEAD)
        layer.key_index[alive] = keys[alive].to(layer.key_index)
        layer.scale.view(layer.out_channels, -1)[alive] = scale[alive].to(layer.scale.dtype)
        layer.shift[alive] = shift[alive].to(layer.shift.dtype)
        scales = scale.new_zeros(len(alive), count - 1).scatter_(1, keys, scale)
        self._shift_mean(name, mean[:, -1], (torch.cat([shift.unsqueeze(1), scales], 1) * mean[:, :-1]).sum(1), alive)
        stock = self.reference.modules[name].weight.flatten(1).double()
        missed = (stock - layer.compose_weight().flatten(1)).square().sum(1)
        fit = 1 - missed / (stock - stock.mean(1, keepdim=True)).square().sum(1)
        alive &= fit.isfinite()
        layer.r2[alive] = fit[alive].clamp(0, 1).to(layer.r2.dtype)
        self.ledgers["projection"].changed.append(name)

    def _shift_mean(self, name: str, wanted: torch.Tensor, ours: torch.Tensor, alive: torch.Tensor) -> None:
        """Corrects the mean of a layer's output, bias not counted in ours, by its norm or else its bias."""
        layer, norm, stock = self._with_norms(name)
        if norm is not None:
            bias = 0 if layer.bias is None else layer.bias
            norm.running_mean[alive] = (stock.running_mean + ours + bias - wanted)[alive].to(norm.running_mean.dtype)
            norm.running_var[alive] = stock.running_var[alive]
        elif layer.bias is not None:
            layer.bias[alive] = (wanted - ours)[alive].to(layer.bias.dtype)

    def _with_norms(self, name: str) -> tuple[Any, Any, Any]:
        """A layer of ours, the norm after it, and that norm in the reference."""
        norm = self.norms.get(name, "")
        layer = self.ours.modules[name]
        return (layer, self.ours.modules[norm], self.reference.modules[norm]) if norm else (layer, None, None)

    def _match(self, index: int, calls: Calls, name: str, wanted: "_Moments") -> None:
        """Gives what follows a converted layer the mean (and variance) it has in the reference."""
        found = _Moments()
        self.ours.run(index, [calls[i] for i in self.fitted], [(name, found)])
        (mean, variance), (our_mean, our_variance) = wanted.result(), found.result()
        layer, norm, stock = self._with_norms(name)
        if norm is not None:
            alive = (variance > DEAD) & (our_variance > DEAD)
            ratio = torch.where(alive, our_variance / variance.clamp_min(DEAD), 1.0).sqrt()
            norm.running_mean.copy_(our_mean - (mean - stock.running_mean) * ratio)
            norm.running_var.copy_(((stock.running_var + norm.eps) * ratio.square() - norm.eps).clamp_min(0))
        elif layer.bias is not None:
            layer.bias.add_((mean - our_mean).to(layer.bias.dtype))
        else:
            self.ledgers["statistics"].left[name] = "no BatchNorm follows and it has no bias"
            return
        self.ledgers["statistics"].changed.append(name)

    def _absorb(self, index: int, calls: Calls, target: "_Rows", wanted: list[Any]) -> tuple[float, list[Any]]:
        """Refits a part's last pointwise layer; the part's error before, and what it puts out afterwards."""
        name, ledger = self.parts[index].pointwise, self.ledgers["absorption"]
        layer, norm, stock = self._with_norms(name)
        rows = _Rows(layer, self.rows, inputs=True)
        out = self.ours.run(index, calls, [(name, rows)])
        before = self._error(index, out, wanted)
        offset = 0 if norm is None else norm.running_mean - stock.running_mean  # of the norms' means, where they count
        residual = [theirs - ours + offset for theirs, ours in zip(target.outputs, rows.outputs, strict=True)]
        factor = residual[0].new_ones(residual[0].shape[2])
        found = self._factor(index, calls, name, out[0]) if self.parts[index].name != name else None
        if found is not None:
            factor, channels_last = found
            pairs = zip(wanted, out, strict=True)
            residual = [rows.pick(theirs - ours, channels_last) / factor for theirs, ours in pairs]
        data = [(x.flatten(0, 1), r.flatten(0, 1)) for x, r in zip(rows.inputs, residual, strict=True)]
        intercept = layer.bias is not None or norm is not None
        solution = fit_ridge(
            [data[i] for i in self.fitted], [data[i] for i in self.held_out], factor.square(), intercept
        )
        if solution is None:
            ledger.left[name] = "no ridge helps on held-out images"
            return before, out
        weight, bias = solution
        changed = [t for t in (layer.weight, layer.bias, norm and norm.running_mean) if t is not None]
        state = [tensor.clone() for tensor in changed]
        layer.weight.add_(weight.T.reshape(layer.weight.shape).to(layer.weight.dtype))
        if norm is not None:
            norm.running_mean.sub_(bias.to(norm.running_mean.dtype))
        elif layer.bias is not None:
            layer.bias.add_(bias.to(layer.bias.dtype))
        repaired = self.ours.run(index, calls)
        if self._error(index, repaired, wanted) > before:  # of the block, where the layer was fitted to its own output
            for tensor, value in zip(changed, state, strict=True):
                tensor.copy_(value)
            ledger.left[name] = "the block comes no nearer on held-out images"
            return before, out
        ledger.changed.append(name)
        return before, repaired

    def _heal(self, index: int, calls: Calls, out: list[Any], wanted: list[Any]) -> list[Any]:
        """Trains a block towards the reference's output; what it puts out afterwards."""
        name, ledger = self.parts[index].name, self.ledgers["healing"]
        block = self.ours.modules[name]
        if not math.isfinite(self._error(index, out, wanted)):
            ledger.left[name] = "puts out more than a tensor, or does not vary"
            return out
        variance = sum(float(wanted[i].var()) for i in self.fitted) / len(self.fitted)
        least, best = self._error(index, out, wanted), copy.deepcopy(block.state_dict())
        generator, start, share = torch.Generator().manual_seed(0), time.perf_counter(), 0.0
        with _trainable(block) as tensors:
            small, large = ([t for t in tensors if (t.ndim > 1) == big] for big in (False, True))
            groups = [{"params": p, "lr": rate} for p, rate in zip((small, large), HEALING_RATE, strict=True)]
            optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
            while share < 1:
                for i in torch.randperm(len(self.fitted), generator=generator).tolist():
                    args, kwargs = calls[self.fitted[i]]
                    with torch.enable_grad():
                        error = block(*copied(args), **kwargs) - wanted[self.fitted[i]]
                        (error.square().mean() / variance).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    share = (time.perf_counter() - start) / self.heal_seconds
                    if share >= 1:
                        break
                    for group, rate in zip(optimizer.param_groups, HEALING_RATE, strict=True):
                        group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * share))
                found = self._error_now(index, calls, wanted)
                if found < least:
                    least, best = found, copy.deepcopy(block.state_dict())
            block.load_state_dict(best)
        ledger.changed.append(name)
        return self.ours.run(index, calls)

    def _factor(self, index: int, calls: Calls, name: str, out: Any) -> tuple[torch.Tensor, bool] | None:
        """By how much the part's output moves with each channel of the layer's, if by one factor a channel.

        With it, whether the part puts channels last.
        """
        nudges: list[torch.Tensor] = []

        def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            nudges.append(noise * output.std() / 8)
            return output + nudges[-1]

        moved = self.ours.run(index, calls[:1], [(name, nudge)])[0]
        if not isinstance(moved, torch.Tensor) or len(nudges) != 1:
            return None
        rows = _Rows(self.ours.modules[name], None)
        cause = rows.pick(nudges[0])
        for channels_last in (False, True):
            effect = rows.pick(moved - out, channels_last)
            if effect.shape != cause.shape:
                continue
            factor = (effect * cause).sum((0, 1)) / cause.square().sum((0, 1))
            error = (effect - factor * cause).square().sum() / effect.square().sum().clamp_min(1e-30)
            if error < 1e-3 and factor.abs().min() > 1e-6 * factor.abs().max() > 0:
                return factor, channels_last
        return None


@contextmanager
def _trainable(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """All that trains in a block, frozen scales and shifts included; afterwards only what trained before does."""
    layers = [layer for layer in block.modules() if isinstance(layer, MasterKeyConv2d)]
    tensors = [*block.parameters(), *(t for layer in layers for t in (layer.scale, layer.shift))]
    before = {tensor: tensor.requires_grad for tensor in tensors}
    try:
        yield [tensor.requires_grad_(True) for tensor in before]
    finally:
        for tensor, required in before.items():
            tensor.requires_grad_(required)
            tensor.grad = None


class _Rows:
    """A hook that gathers a layer's output (and input), a call each, (images, positions, channels).

    Args:
        layer: Whether channels come last is its kind's matter.
        rows: So many of a call at most, all images together.
        chosen: The calls to gather; all if None.
        inputs: Gather inputs as well.
    """

    def __init__(
        self, layer: nn.Module | None, rows: int | None, chosen: Container[int] | None = None, inputs: bool = False
    ) -> None:
        self.channels_last = isinstance(layer, nn.Linear)
        self.rows, self.chosen, self.with_inputs, self.calls = rows, chosen, inputs, 0
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.calls += 1
        if self.chosen is None or self.calls - 1 in self.chosen:
            self.outputs.append(self.pick(output))
            if self.with_inputs:
                self.inputs.append(self.pick(args[0]))

    def pick(self, tensor: torch.Tensor, channels_last: bool | None = None) -> torch.Tensor:
        """The same random positions of every tensor of a size."""
        last = self.channels_last if channels_last is None else channels_last
        rows = tensor.unsqueeze(1).flatten(1, -2) if last else tensor.flatten(2).transpose(1, 2)
        positions = rows.shape[1] if self.rows is None else max(1, self.rows // len(rows))
        if rows.shape[1] <= positions:
            return rows.clone()
        chosen = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))[:positions]
        return rows[:, chosen.to(rows.device)]


class _Moments:
    """A hook that measures mean and variance of each channel of a convolution's output.

    In the calls chosen, or in all, ending them there.
    """

    def __init__(self, chosen: Container[int] | None = None) -> None:
        self.chosen, self.calls = chosen, 0
        self.sums: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.calls += 1
        if self.chosen is None or self.calls - 1 in self.chosen:
            variance, mean = (value.double() for value in torch.var_mean(output, (0, 2, 3), correction=0))
            count = mean.new_full(mean.shape, output[:, 0].numel())
            self.sums.append(torch.stack([count, count * mean, count * (variance + mean.square())]))
        if self.chosen is None:
            raise Reached

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        count, total, squares = torch.stack(self.sums).sum(0)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0)


def choose_keys(covariance: torch.Tensor, keys_per_kernel: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys whose responses, with that of a constant kernel, come nearest to a layer's wanted output.

    Least squares by orthogonal matching pursuit: the key that leaves the smallest error joins, and all are refitted.

    Args:
        covariance: (C, K + 2, K + 2) float64, for each channel of the responses to a kernel of ones and to the K keys,
            and of the wanted output.
        keys_per_kernel: r.

    Returns:
        Keys (C, r), scale (C, r), shift (C,).
    """
    count, size = covariance.shape[0], covariance.shape[1] - 1
    matrix, right = covariance[:, :size, :size], covariance[:, :size, size]
    loading = 1e-6 * matrix.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    matrix = matrix + loading[:, None, None] * torch.eye(size).to(matrix)
    chosen = torch.zeros(count, 1, dtype=torch.long, device=matrix.device)
    every = torch.arange(1, size, device=matrix.device).expand(count, -1)
    for _ in range(keys_per_kernel):
        sets = torch.cat(
            [chosen.unsqueeze(1).expand(-1, size - 1, -1), every.unsqueeze(2)], 2
        )  # with each key, (C, K, .)
        among = matrix[torch.arange(count)[:, None, None, None], sets.unsqueeze(3), sets.unsqueeze(2)]
        towards = right[torch.arange(count)[:, None, None], sets]
        taken = (chosen.unsqueeze(1) == every.unsqueeze(2)).any(2)
        among = among + torch.diag_embed(taken.unsqueeze(2).expand(sets.shape).to(matrix))  # only to be solvable
        solutions = torch.linalg.solve(among, towards)
        gain = (solutions * towards).sum(2).masked_fill(taken, -math.inf)
        best = gain.argmax(1)
        chosen = sets[torch.arange(count), best]
        solution = solutions[torch.arange(count), best]
    return chosen[:, 1:] - 1, solution[:, 1:], solution[:, 0]


def fit_ridge(
    fitted: list[tuple[torch.Tensor, torch.Tensor]],
    held_out: list[tuple[torch.Tensor, torch.Tensor]],
    weight: torch.Tensor,
    intercept: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """D (inputs, outputs) and b (outputs,) for which features @ D + b comes near the residual, by ridge regression.

    Args:
        fitted: Pairs of features (rows, inputs) and residuals (rows, outputs).
        held_out: The same: the ridge with the smallest squared error on these is taken.
        weight: (outputs,), how much an output counts in that error.
        intercept: Fit b; else it is 0.

    Returns:
        D and b, or None if every ridge does worse than nothing on the held-out pairs.
    """
    gram, size = _gram(fitted), fitted[0][0].shape[1] + 1
    n = gram[0, 0]
    f, r = gram[0, 1:size] / n, gram[0, size:] / n
    if not intercept:
        f, r = torch.zeros_like(f), torch.zeros_like(r)
    matrix, right = gram[1:, 1:size] / n - torch.outer(f, f), gram[1:, size:] / n - torch.outer(f, r)
    identity = matrix.diagonal().mean().clamp_min(1e-30) * torch.eye(size - 1).to(matrix)
    test = _gram(held_out)
    power = torch.stack([r.square().sum(0, dtype=torch.float64) for _, r in held_out]).sum(0)

    best, least = None, float((weight * power).sum())
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if failed:  # too small for the rounding of the sums
            continue
        d = torch.cholesky_solve(right, factor)
        b = r - f @ d
        full = torch.cat([b.unsqueeze(0), d])
        error = float(
            (weight * (power - 2 * (full * test[:, size:]).sum(0) + (full * (test[:, :size] @ full)).sum(0))).sum()
        )
        if error < least:
            best, least = (d, b), error
    return best


def _gram(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sums of products of (1, features) with (1, features, residual); float32 in a pair, float64 over all."""
    total: Any = 0
    for features, residual in pairs:
        x = torch.cat([features.new_ones(len(features), 1), features], 1)
        total = total + torch.cat([x.T @ x, x.T @ residual], 1).double()
    return total
