"""Calibrates a converted network: brings its outputs near those of its dense network, from unlabelled images."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import timm
import torch
from torch import nn

from ..conversion.record import CalibrationRecord, entries_digest, structure_digest, write_record
from ..conversion.table import table
from ..conversion.wrapped import evaluating
from ..errors import CalibrationError
from ..version import __version__
from .blockwise import calibrate_blocks
from .images import Images, Pixels, Size, origin_of, split_images
from .memory import check_memory, freed_memory_kept
from .metrics import Metric, MetricLike, choose_metric, share_intervals
from .outputs import Output, first_output, output_of
from .pair import checked_pair
from .stages import OVER, STAGES, Stage, StageReport

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did; ``str()`` is a table.

    Attributes:
        record: What was measured: the metric, its figures before and after, on how many images. The model keeps it.
        stages: One StageReport a stage, in their order.
        seconds: Time spent in all.
    """

    record: CalibrationRecord
    stages: tuple[StageReport, ...]
    seconds: float

    @property
    def before(self) -> Mapping[str, float]:
        """The metric's figures before calibration, by name."""
        return self.record.before

    @property
    def after(self) -> Mapping[str, float]:
        """The same figures after it."""
        return self.record.after

    def summary(self) -> str:
        """The figures in one line."""
        refitted = sum(len(stage.changed) for stage in self.stages if stage.name == "pointwise")
        return f"{self.record.summary()}, {refitted} pointwise layers refitted"

    def __str__(self) -> str:
        stages = table(("stage", "changed", "left", "seconds"), (stage.cells() for stage in self.stages))
        left = [f"left by {stage.name}: {name}: {why}" for stage in self.stages for name, why in stage.left.items()]
        last = f"metric: {self.record.metric}", f"calibrated {self.summary()}, {self.seconds:.0f} s"
        return "\n".join([stages, *left, *last])


@torch.inference_mode(False)
@torch.no_grad()
def calibrate_masterkeys(
    model: nn.Module,
    dense: nn.Module,
    images: Images,
    *,
    held_out: Images | None = None,
    stages: Stage | Sequence[Stage] = STAGES,
    metric: MetricLike = None,
    output: Output = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: Size = None,
    batch_size: int = 8,
    max_images: int = 400,
    time_budget: float | None = None,
) -> CalibrationReport:
    """Brings a converted network's outputs near the dense network's, from unlabelled images. In place.

    Walks both networks block by block, in the order of execution; each block is fed with the outputs of the calibrated
    blocks before it. In each block, in this order:

    - ``"kernels"``: each converted layer without sigmas gets new key indices, scales and shifts, by least squares on
      the *outputs* of the layer instead of its kernels: the nearest key under the second moments of the layer's inputs.
    - ``"norms"``: the BatchNorm after a converted layer gets the mean and variance that give its output the mean
      and variance it has in the dense network; without a BatchNorm of its own, the layer's bias gets the mean.
    - ``"pointwise"``: the block's last pointwise layer (and every pointwise layer outside of blocks, such as the
      classifier) is refitted by ridge least squares, so that the block's output, with the drift of its skip path, comes
      near the dense network's. A layer stays as it is if no ridge lowers the error on the folds left out of the fit.

    The bank never changes; without ``"pointwise"`` only the converted layers and their norms do. How a block's output
    depends on its last pointwise layer is measured on each block. Where that is not one factor per channel, the layer
    is fitted to its own output in the dense network. Each ridge is chosen by cross-validation on four folds of the
    images; the held-out images give the report's figures only. The same call with as many threads gives the same model
    bit for bit on the same machine, unless the time budget runs out. During a calibration freed memory stays with the
    process (``memory.freed_memory_kept``).

    Args:
        model: A converted model in float32 or float64. If this or the dense model is compiled or wrapped, the plain
            model inside is used.
        dense: The dense model it was converted from, of the same device and dtype. Not changed.
        images: (N, channels, H, W), normalised as for the model. Or an iterable of such batches (a DataLoader), each
            alone, first in a tuple, or in a dictionary under ``pixel_values``, ``image``, ``images`` or ``input``. Or
            one such dictionary, as an image processor gives it. Or a folder, searched at all depths and through
            symbolic links but without hidden files; a model of one channel gets grey images; files that cannot be read
            or exceed PIL's 90 megapixels are left out with a warning. Or ``"builtin"``: crops of the photographs that
            ship, every fourth photograph held out. At least 10 images; some hundred are better.
        held_out: Held-out images, which give the figures, in any of these forms. If None, every fifth batch of
            ``images`` is held out.
        stages: The stages to run in each block, always in the order above.
        metric: None for the figures that suit the dense model's output, a name of ``choose_metric``'s, or a callable on
            outputs and expected outputs that returns a number, or numbers by name.
        output: Which part of the model's output is compared, where it is not a tensor: a key, an index, an attribute,
            or a callable on it. None takes ``logits``, ``out``, ``image_embeds``, ``image_features``,
            ``last_hidden_state`` or the last of ``feature_maps``, or else the first tensor; of a ``features_only``
            model the last.
        mean: Mean of each channel, for pixels from 0 to 1; used for a folder and ``"builtin"``. None takes it from the
            ``pretrained_cfg`` of the model, or of the one timm model in it. Without a ``pretrained_cfg`` all of
            ``mean``, ``std`` and ``size`` are needed.
        std: Standard deviation of each channel, the same way.
        size: Height and width, or one number for both, the same way.
        batch_size: Images per batch.
        max_images: The most of ``images`` used, and of ``held_out``: evenly spread over a folder or a tensor, the first
            of an iterable. All are kept in memory, with one block's inputs and outputs in both networks
            (EfficientNet-Lite0 with 250 images: 3 GB in all). Each layer is fitted to at most 100,000 positions.
        time_budget: Seconds after which the remaining blocks get only ``"norms"``; the record has the number of
            steps left out. None for no limit.

    Returns:
        The figures of the metric before and after, and what each stage did.

    Raises:
        CalibrationError: Nothing converted, a dense model of another architecture or that shares tensors with the
            converted one, too few or non-finite images, a folder for a model without a ``pretrained_cfg``, outputs that
            are not finite or hold no tensor, or too little memory. The model is then unchanged, as after any other
            error or interruption.
        ConversionError: The model has an attribute ``masterkeys`` of its own.

    Example:
        >>> dense = timm.create_model("convnext_tiny", pretrained=True)
        >>> model = convert_to_masterkeys(dense)
        >>> print(calibrate_masterkeys(model, dense, "folder/of/images"))
    """
    start = time.perf_counter()
    stages = _checked_stages(stages)
    if batch_size < 1:
        raise CalibrationError(f"batch_size is {batch_size}, expected at least 1.")
    networks = checked_pair(model, dense)
    model, dense = networks.model, networks.dense
    batches, held_out_batches = split_images(images, held_out, model, max_images, Pixels(mean, std, size), batch_size)
    sample, count = batches[0][:2], sum(map(len, batches))
    state = copy.deepcopy(model.state_dict())
    full_precision = torch.autocast(sample.device.type, enabled=False)
    with evaluating(model, dense), full_precision, freed_memory_kept():
        sample_output, headless = first_output(dense, sample, output)
        chosen_metric = choose_metric(metric, sample_output, headless)
        first_output(model, sample, output)  # raises if the converted model cannot take the images
        check_memory(dense, sample, count)
        try:
            held_out_images = [batches[i] for i in held_out_batches]
            expected, before = (_outputs(network, held_out_images, output) for network in (dense, model))
            reports = calibrate_blocks(networks, batches, held_out_batches, stages, time_budget)
            after = _outputs(model, held_out_images, output)
            counts = count, sum(map(len, held_out_images))
            record = _calibrated_record(
                model, chosen_metric, before, after, expected, reports, counts, origin_of(images)
            )
            write_record(model, networks.record.calibrated(record))
            report = CalibrationReport(record, reports, time.perf_counter() - start)
        except BaseException:
            model.load_state_dict(state)
            raise
    _logger.info("Calibrated:\n%s", report)
    return report


def _checked_stages(stages: Stage | Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages as a tuple; CalibrationError if there is none, or an unknown one."""
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise CalibrationError(f"stages is {stages!r}, expected some of {', '.join(STAGES)}.")
    return stages


def _outputs(model: nn.Module, batches: Sequence[torch.Tensor], output: Output) -> torch.Tensor:
    return torch.cat([output_of(model, batch, output) for batch in batches])


def _calibrated_record(
    model: nn.Module,
    metric: Metric,
    before: torch.Tensor,
    after: torch.Tensor,
    expected: torch.Tensor,
    reports: Sequence[StageReport],
    counts: tuple[int, int],
    origin: str,
) -> CalibrationRecord:
    """The record of a calibrated model, from its outputs for the held-out images, before and after.

    ``expected`` are those of the dense network, ``counts`` the numbers of all images and of the held-out ones, as an
    output may have several rows an image.
    """
    figures_after = metric.measure(after, expected)
    return CalibrationRecord(
        metric.name,
        metric.measure(before, expected),
        figures_after,
        images=counts[0],
        held_out=counts[1],
        origin=origin,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
        left_out=sum(why == OVER for stage in reports for why in stage.left.values()),
        entries=entries_digest(model),
        intervals=share_intervals(metric.name, figures_after, len(expected)),
        structure=structure_digest(model),
    )
