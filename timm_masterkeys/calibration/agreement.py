"""Converts a network with as few keys as a required agreement with the dense network needs."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..conversion.config import LayerSettings, MasterKeysConfig, Patterns
from ..conversion.convert import apply, convert, make_layer
from ..conversion.copies import copy_model
from ..conversion.record import CalibrationRecord, Record, write_record
from ..conversion.table import table
from ..conversion.wrapped import evaluating
from ..errors import CalibrationError, ConversionError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank
from ..layers import MasterKeyConv2d, Trainable
from .block_runner import hooked
from .calibrate import calibrate_masterkeys
from .images import BUILTIN, Images, Pixels, Size, origin_of, split_for_choice
from .memory import check_memory
from .metrics import Metric, MetricLike, choose_metric
from .outputs import Output, first_output, output_of
from .pair import checked_pair

_logger = logging.getLogger(__name__)

JUDGES = 32  # images by which layers are compared


@dataclass(frozen=True)
class TriedNetwork:
    """A network that ``convert_to_agreement`` calibrated and measured.

    Attributes:
        keys: Keys of all its kernels; a dense kernel counts as many as its taps.
        score: The number compared with the target, on the held-out images; 1 for the dense network.
        figures: All of the metric's figures, by name, on the same images.
        keys_per_kernel: By the name of a layer; 0 for a layer that stays dense.
    """

    keys: int
    score: float
    figures: Mapping[str, float]
    keys_per_kernel: dict[str, int]


@dataclass(frozen=True)
class KeyBudget:
    """How few keys were enough; ``str()`` is a table.

    Attributes:
        target: The least score that is enough.
        score_name: The name of the score: "agreement", "R2", or a callable's name.
        record: Of the chosen network's calibration: the metric, its figures before and after on the held-out images,
            by which the network was chosen, and the numbers of all images and of the held-out ones.
        chosen: The network that was returned.
        tried: All networks that were calibrated and measured, in the order of their keys.
        kernels: The number of kernels of each layer.
        seconds: Time spent in all.
    """

    target: float
    score_name: str
    record: CalibrationRecord
    chosen: TriedNetwork
    tried: tuple[TriedNetwork, ...]
    kernels: dict[str, int]
    seconds: float

    def summary(self) -> str:
        """The figures in one line."""
        record, kernels = self.record, sum(self.kernels.values())
        interval = record.intervals.get(self.score_name)
        note = f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
        return (
            f"with {record.images - record.held_out} images: {self.chosen.keys:,} keys for {kernels:,} kernels give "
            f"{self.score_name} {self.chosen.score:.1%}{note} with the dense network on {record.held_out} held-out "
            f"images, {self.target:.1%} asked for"
        )

    def __str__(self) -> str:
        counts = self.chosen.keys_per_kernel.items()
        layers = [(name, f"{self.kernels[name]:,}", str(count or "dense")) for name, count in counts]
        names = [n for n in self.chosen.figures if n not in (self.score_name, "sure images", "sure positions")]
        total, rows = sum(self.kernels.values()), []
        for net in self.tried:
            figures = [f"{net.figures[n]:.1%}" if n.endswith("agreement") else f"{net.figures[n]:.3f}" for n in names]
            mark = "chosen" if net == self.chosen else ""
            rows.append([f"{net.keys:,}", f"{net.keys / total:.2f}", f"{net.score:.1%}", *figures, mark])
        lines = [table(("layer", "kernels", "keys per kernel"), layers), ""]
        lines.append(table(("keys", "per kernel", self.score_name, *names, ""), rows, ">"))
        lines.append(f"metric: {self.record.metric}")
        return "\n".join([*lines, f"calibrated {self.summary()}, {self.seconds:.0f} s"])


@torch.inference_mode(False)
def convert_to_agreement(
    dense: nn.Module,
    agreement: float = 0.95,
    images: Images = BUILTIN,
    *,
    bank: BankLike = DEFAULT_BANK,
    include: Patterns = None,
    exclude: Patterns = None,
    trainable: Trainable = "shift",
    metric: MetricLike = None,
    output: Output = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Size = None,
    batch_size: int = 8,
    max_images: int = 300,
    time_budget: float | None = None,
) -> tuple[nn.Module, KeyBudget]:
    """Converts a model with as few keys as a required agreement needs, and calibrates it. ``dense`` is not changed.

    A layer gets one, two, four or all keys per kernel, or stays dense, which counts as one key per tap. First each
    layer is converted alone, with each number of keys, and the change of the network's output is measured. This orders
    the steps: another key per kernel goes first to the layer where it brings the output nearest. The number of steps
    is found by bisection. About six networks are converted, calibrated with ``calibrate_masterkeys`` and measured on
    held-out images, which neither order the steps nor calibrate; all of it takes about seven times as long as one
    calibration. ``KeyBudget.record`` has the returned model's figures on the held-out images.

    Args:
        dense: A timm model or any other that ``calibrate_masterkeys`` takes, not converted in any layer.
        agreement: In (0, 1], the least score on the held-out images. For classes (classification, dense prediction) the
            score is the share of images or positions with the same top class; for anything else R2, the share of the
            variance of the dense network's outputs that is explained, 1 - relative error, not below 0; for a callable
            ``metric`` its first figure.
        images: As for ``calibrate_masterkeys``. Every fourth image is held out (no two should show the same thing); of
            ``"builtin"`` all crops of every fourth photograph. At least 40. A network is less sure of the built-in
            crops than of photographs of its task, so the same keys agree on fewer of them. With photographs of the task
            fewer keys are enough.
        bank: Anything ``get_bank`` takes.
        include: As for ``convert_to_masterkeys``.
        exclude: As for ``convert_to_masterkeys``.
        trainable: "none", "shift" or "affine", as for ``convert_to_masterkeys``.
        metric: As for ``calibrate_masterkeys``; larger figures of a callable have to be better.
        output: As for ``calibrate_masterkeys``.
        mean: As for ``calibrate_masterkeys``.
        std: As for ``calibrate_masterkeys``.
        size: As for ``calibrate_masterkeys``.
        batch_size: Images at a time.
        max_images: The most images to calibrate with; a third as many are held out, of ``"builtin"`` more.
        time_budget: As for ``calibrate_masterkeys``, for each calibration.

    Returns:
        The calibrated model, and the table of keys spent against agreement.

    Raises:
        BankError, ProjectionError, ConversionError: As ``convert_to_masterkeys``.
        CalibrationError: As ``calibrate_masterkeys``; or no network reaches the agreement (the best one is named).

    Example:
        >>> model, budget = convert_to_agreement(timm.create_model("convnext_tiny", pretrained=True), 0.95)
        >>> print(budget)
    """
    config = MasterKeysConfig(bank, trainable=trainable, include=include, exclude=exclude, agreement=agreement)
    return convert_by_agreement(
        dense,
        config,
        images,
        metric=metric,
        output=output,
        mean=mean,
        std=std,
        size=size,
        batch_size=batch_size,
        max_images=max_images,
        time_budget=time_budget,
    )


@torch.inference_mode(False)
@torch.no_grad()
def convert_by_agreement(
    dense: nn.Module,
    config: MasterKeysConfig,
    images: Images,
    *,
    flat_names: bool = False,
    metric: MetricLike = None,
    output: Output = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Size = None,
    batch_size: int = 8,
    max_images: int = 300,
    time_budget: float | None = None,
) -> tuple[nn.Module, KeyBudget]:
    """``convert_to_agreement`` by a configuration; ``flat_names`` is as for ``convert``."""
    start, target = time.perf_counter(), config.agreement
    if target is None:
        raise ConversionError("agreement is None, expected more than 0, at most 1 (0.95 for 95 %).")
    first = convert(dense, config, "project", flat_names=flat_names)
    networks = checked_pair(first, dense)
    kernels = {name: layer.out_channels for name, layer in networks.layers.items()}
    fitted_images, held_out_images = split_for_choice(images, dense, max_images, Pixels(mean, std, size))
    layers = {name: _choices(dense.get_submodule(name), config.bank) for name in kernels}
    options = {"metric": metric, "output": output, "batch_size": batch_size, "time_budget": time_budget}
    options["max_images"] = max(len(fitted_images), len(held_out_images))
    with evaluating(dense), torch.autocast(fitted_images.device.type, enabled=False):
        sample_output, headless = first_output(dense, fitted_images[:2], output)
        chosen_metric = choose_metric(metric, sample_output, headless)
        check_memory(dense, fitted_images[:2], len(fitted_images) + len(held_out_images))
        search = _Search(
            dense, config, networks.record, kernels, layers, fitted_images, held_out_images, chosen_metric, options
        )
        steps = order_steps(kernels, search.distances(fitted_images[:: max(1, len(fitted_images) // JUDGES)]))
    nothing_left = all(None in choices.values() for choices in layers.values())  # after the last step
    best, tried = search.fewest_steps(steps, len(steps) - nothing_left, target)
    if best is None:
        top = max(tried, key=lambda tried_network: tried_network.score)
        raise CalibrationError(
            f"No network reaches {chosen_metric.score_name} {target:.1%} on {len(held_out_images)} held-out images: "
            f"the best, with {top.keys:,} keys for {sum(kernels.values()):,} kernels, {top.score:.1%}. Ask for less, "
            "or give more images."
        )
    model, chosen, record = best
    record = replace(record, origin=origin_of(images))
    write_record(model, replace(networks.record, calibration=record, converted_since=False))
    by_keys, seconds = tuple(sorted(tried, key=lambda tried_network: tried_network.keys)), time.perf_counter() - start
    return model, KeyBudget(target, chosen_metric.score_name, record, chosen, by_keys, kernels, seconds)


Attempt = tuple[nn.Module, TriedNetwork, CalibrationRecord]
Choices = Mapping[str, Mapping[int, MasterKeyConv2d | None]]  # by layer and keys per kernel; None for a dense layer


@dataclass(frozen=True)
class _Search:
    """The inputs that all tried networks share."""

    dense: nn.Module
    config: MasterKeysConfig
    record: Record  # of a network converted by it
    kernels: Mapping[str, int]  # the number of each layer
    layers: Choices
    fitted_images: torch.Tensor
    held_out_images: torch.Tensor
    metric: Metric
    options: Mapping[str, Any]  # of calibrate_masterkeys

    def distances(self, images: torch.Tensor) -> dict[str, dict[int, float]]:
        """The distance from the dense output when one layer alone is converted, by layer and keys per kernel."""
        expected = self._outputs(images)
        by_layer: dict[str, dict[int, float]] = {name: {} for name in self.layers}
        for name, choices in tqdm(self.layers.items(), desc="compare layers", unit="layer", leave=False, disable=None):
            for count, layer in choices.items():
                if layer is None:
                    by_layer[name][count] = 0.0
                else:
                    with hooked([(self.dense.get_submodule(name), partial(_matched_output, layer))]):
                        by_layer[name][count] = self.metric.distance(self._outputs(images), expected)
        return by_layer

    def fewest_steps(
        self, steps: Sequence[tuple[str, int]], most: int, agreement: float
    ) -> tuple[Attempt | None, list[TriedNetwork]]:
        """The network of the fewest steps that agrees, by bisection (None if none does); and all that were tried."""
        best: Attempt | None = None
        tried: list[TriedNetwork] = []
        least = 0
        while best is None or least < most:
            taken = (least + most) // 2
            attempt = self._attempt(steps[:taken])
            tried.append(attempt[1])
            _logger.info("%d keys: %.1f %%.", tried[-1].keys, 100 * tried[-1].score)
            if tried[-1].score >= agreement:
                best, most = attempt, taken
            elif least == most:
                break
            else:
                least = taken + 1
        return best, tried

    def _attempt(self, steps: Sequence[tuple[str, int]]) -> Attempt:
        """The network after these steps, calibrated and measured."""
        counts = {name: min(choices) for name, choices in self.layers.items()} | dict(steps)
        keyed = {name: count for name, count in counts.items() if self.layers[name][count] is not None}
        layers = {name: LayerSettings(self.config.bank, n, self.config.trainable) for name, n in keyed.items()}
        model = apply(copy_model(self.dense), layers)
        write_record(model, self.record)
        report = calibrate_masterkeys(
            model, self.dense, self.fitted_images, held_out=self.held_out_images, **self.options
        )
        spent = sum(self.kernels[name] * count for name, count in counts.items())
        each = {name: count if name in keyed else 0 for name, count in counts.items()}
        return model, TriedNetwork(spent, self.metric.score(report.after), report.after, each), report.record

    def _outputs(self, images: torch.Tensor) -> torch.Tensor:
        """The dense network's outputs, as it is now."""
        batches = images.split(self.options["batch_size"])
        return torch.cat([output_of(self.dense, batch, self.options["output"]) for batch in batches])


def order_steps(kernels: Mapping[str, int], distances: Mapping[str, Mapping[int, float]]) -> list[tuple[str, int]]:
    """Steps (layer, keys per kernel) until every layer has its most keys, the largest gain for each key first.

    ``kernels`` has the number of kernels of each layer, ``distances`` those of ``_Search.distances``.
    """
    counts = {name: min(by_count) for name, by_count in distances.items()}
    steps: list[tuple[str, int]] = []
    while True:
        gains = {
            (name, count): (by_count[counts[name]] - by_count[count]) / (kernels[name] * (count - counts[name]))
            for name, by_count in distances.items()
            for count in by_count
            if count > counts[name]
        }
        if not gains:
            return steps
        steps.append(max(gains, key=lambda step: (gains[step], -step[1])))
        counts.update(steps[-1:])


def _choices(conv: Any, bank: KeyBank) -> dict[int, MasterKeyConv2d | None]:
    """A layer with one, two, four, ... and all keys per kernel, and dense (None), by the numbers each kernel needs."""
    numbers = [2**power for power in range(len(bank).bit_length()) if 2**power < len(bank)]
    layers = [make_layer(conv, LayerSettings(bank, number)) for number in [*numbers, len(bank)]]
    choices: dict[int, MasterKeyConv2d | None] = {layer.keys_per_kernel: layer for layer in layers}
    taps = conv.weight[0].numel()
    return {**choices, taps: None} if taps > max(choices) + 1 else choices  # else all keys and the shift fit as well


def _matched_output(layer: MasterKeyConv2d, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The layer's output with the channel means and variances of ``output``, as after a calibration; for a hook."""
    new = layer.forward(args[0])  # without its hooks, which it shares with the dense layer
    (var, mean), (new_var, new_mean) = (
        torch.var_mean(out, (0, 2, 3), correction=0, keepdim=True) for out in (output, new)
    )
    return (new - new_mean) * (var / new_var.clamp_min(1e-10)).sqrt() + mean
