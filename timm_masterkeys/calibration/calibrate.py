"""Calibrates a converted network: brings its outputs near those of its dense network, from unlabelled images."""

import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import timm
import torch
from torch import nn

from ..conversion.plan import converted_layers
from ..conversion.record import CalibrationRecord, entries_digest, read_record, structure_digest, write_record
from ..conversion.table import table
from ..conversion.wrapped import evaluating, is_sharded, quantised_entry, unwrapped
from ..errors import CalibrationError
from ..layers import MasterKeyConv2d
from ..version import __version__
from .blocks import is_pointwise
from .blockwise import OVER, STAGES, Stage, StageReport, calibrate_blocks
from .images import Images, Pixels, Size, origin_of, split_images
from .memory import check_memory, freed_memory_kept
from .metrics import Metric, MetricLike, choose_metric, share_intervals
from .outputs import Output, gives_features, pick_output

_logger = logging.getLogger(__name__)

STAGE_TITLES = "stage", "changed", "left", "seconds"


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
        return "\n".join(
            [
                table(STAGE_TITLES, (stage.cells() for stage in self.stages)),
                *(f"left by {stage.name}: {name}: {why}" for stage in self.stages for name, why in stage.left.items()),
                f"metric: {self.record.metric}",
                f"calibrated {self.summary()}, {self.seconds:.0f} s",
            ]
        )


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

    - ``"kernels"``: each converted layer gets new key indices, scales and shifts, by least squares on the *outputs* of
      the layer instead of its kernels: the nearest key under the second moments of the layer's inputs.
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
        max_images: The most images used: evenly spread over a folder or a tensor, the first of an iterable. All are
            kept in memory, with one block's inputs and outputs in both networks (EfficientNet-Lite0 with 250 images:
            3 GB in all). Each layer is fitted to at most 100,000 positions.
        time_budget: Seconds after which the remaining blocks get only ``"norms"``; the record has the number of
            steps left out. None for no limit.

    Returns:
        The figures of the metric before and after, and what each stage did.

    Raises:
        CalibrationError: Nothing converted, a dense model of another architecture, too few or non-finite images, a
            folder for a model without a ``pretrained_cfg``, outputs that are not finite or hold no tensor, or too
            little memory. The model is then unchanged, as after any other error or interruption.

    Example:
        >>> dense = timm.create_model("convnext_tiny", pretrained=True)
        >>> model = convert_to_masterkeys(dense)
        >>> print(calibrate_masterkeys(model, dense, "folder/of/images"))
    """
    start = time.perf_counter()
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise CalibrationError(f"stages is {stages!r}, expected some of {', '.join(STAGES)}.")
    if batch_size < 1:
        raise CalibrationError(f"batch_size is {batch_size}, expected at least 1.")
    model, dense = unwrapped(model), unwrapped(dense)
    check_models(model, dense)
    batches, held = split_images(images, held_out, model, max_images, Pixels(mean, std, size), batch_size)
    state, record = copy.deepcopy(model.state_dict()), read_record(model)
    full_precision = torch.autocast(batches[0].device.type, enabled=False)
    with evaluating(model, dense), full_precision, freed_memory_kept():
        chosen_metric = find_metric(dense, batches[0][:2], metric, output)
        find_metric(model, batches[0][:2], metric, output)  # raises if the converted model cannot take the images
        check_memory(dense, torch.cat(batches))
        try:
            before = torch.cat([_finite(model, pick_output(model, model(batches[i].clone()), output)) for i in held])
            reports, outputs, dense_outputs = calibrate_blocks(model, dense, batches, held, stages, time_budget, output)
            after = _held_out_outputs(model, outputs, held)
            expected = _held_out_outputs(dense, dense_outputs, held)
            figures = chosen_metric.measure(before, expected), chosen_metric.measure(after, expected)
            measured = CalibrationRecord(
                chosen_metric.name,
                *figures,
                images=sum(map(len, batches)),
                held_out=len(expected),
                origin=origin_of(images),
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
                left_out=sum(why == OVER for stage in reports for why in stage.left.values()),
                entries=entries_digest(model),
                intervals=share_intervals(chosen_metric.name, figures[1], len(expected)),
                structure=structure_digest(model),
            )
            report = CalibrationReport(measured, reports, time.perf_counter() - start)
            write_record(model, replace(record, calibration=measured))
        except BaseException:
            model.load_state_dict(state)
            raise
    _logger.info("Calibrated:\n%s", report)
    return report


def check_models(model: nn.Module, dense: nn.Module) -> None:
    """Raises CalibrationError unless the converted model can be calibrated with this dense one."""
    layers = converted_layers(model)
    if not layers:
        raise CalibrationError(
            f"The first model, a {type(model).__name__}, holds no converted layer. The order is (converted, dense); "
            "convert_to_masterkeys makes the converted one."
        )
    if is_sharded(model) or is_sharded(dense):
        raise CalibrationError("The parameters are sharded, expected whole ones. Calibrate first, then shard.")
    if entry := quantised_entry(model) or quantised_entry(dense):
        raise CalibrationError(f"{entry}, expected ordinary tensors. Calibrate first, then quantise.")
    dense_modules = dict(dense.named_modules())
    for name, layer in layers.items():
        dense_layer = dense_modules.get(name)
        if isinstance(dense_layer, MasterKeyConv2d):
            raise CalibrationError(f"The second model is converted too, as at {name}: give the dense one.")
        kind, shape = type(dense_layer).__name__, getattr(getattr(dense_layer, "weight", None), "shape", None)
        if not isinstance(dense_layer, nn.Conv2d) or shape != layer.weight.shape:
            raise CalibrationError(
                f"The dense model has a {kind} with a weight of {shape} at {name}, expected the Conv2d that was "
                f"converted, {layer.weight.shape}."
            )
    missing = [name for name, _ in model.named_modules() if name not in dense_modules]
    if missing:
        raise CalibrationError(f"The dense model has no {missing[0]}: give the one this model was converted from.")
    _check_parameters(model, dense)
    if changed := _unexplained_changes(model, dense):
        _logger.warning(
            "Parameters beside the kernels differ from the dense model's (%d of them, for example %s). The dense model "
            "should be the one that this model was converted from.",
            len(changed),
            min(changed),
        )


def _check_parameters(model: nn.Module, dense: nn.Module) -> None:
    """Raises CalibrationError unless the parameters of both models have the same shapes, dtypes and devices."""
    params, dense_params = (dict(m.named_parameters()) for m in (model, dense))
    for name in params.keys() & dense_params.keys():
        a, b = params[name], dense_params[name]
        if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype:
            raise CalibrationError(
                f"The dense model has {tuple(b.shape)} {b.dtype} on {b.device} at {name}, the converted one "
                f"{tuple(a.shape)} {a.dtype} on {a.device}: give the one this model was converted from, in the same "
                "place."
            )
    first = next(dense.parameters())
    if first.device.type in ("meta", "mps") or first.dtype not in (torch.float32, torch.float64):
        raise CalibrationError(
            f"The models are {first.dtype} on {first.device}; calibrate in float32 on CPU or CUDA, then cast and move."
        )
    if any(parameter.is_inference() for parameter in (*model.parameters(), *dense.parameters())):
        raise CalibrationError("The models were made in inference mode, which allows no change. Make them outside.")


def _unexplained_changes(model: nn.Module, dense: nn.Module) -> list[str]:
    """The parameters beside the kernels that differ from the dense model's for no recorded reason.

    A calibration changes pointwise layers and the biases of converted ones. Training may change all of them.
    """
    params, dense_params = (dict(m.named_parameters()) for m in (model, dense))
    records = [read_record(part) for part in model.modules()]
    calibrated = [record for record in records if record.was_calibrated]
    if records[0].was_calibrated:  # the whole model was calibrated after its parts
        calibrated = records[:1]
    if any(record.calibration is None for record in calibrated):
        return []
    names = params.keys() & dense_params.keys()
    if calibrated:
        fitted = {n for n, m in model.named_modules() if is_pointwise(m) or isinstance(m, MasterKeyConv2d)}
        names = {name for name in names if name.rpartition(".")[0] not in fitted}
    return [n for n in names if not torch.allclose(params[n], dense_params[n], rtol=0, atol=0, equal_nan=True)]


def _held_out_outputs(model: nn.Module, outputs: Iterable[torch.Tensor], batches: Sequence[int]) -> torch.Tensor:
    """The outputs of the held-out batches. All batches are computed, and all outputs must be finite."""
    return torch.cat([out for i, out in enumerate(_finite(model, out) for out in outputs) if i in batches])


def _finite(model: nn.Module, out: torch.Tensor) -> torch.Tensor:
    if not out.isfinite().all():
        raise CalibrationError(f"{type(model).__name__} returns NaN or Inf on these images.")
    return out


def find_metric(model: nn.Module, images: torch.Tensor, metric: MetricLike = None, output: Output = None) -> Metric:
    """The metric for a model's outputs; raises CalibrationError if the model cannot take these images."""
    try:
        raw = model(images.clone())  # some models change their images
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot work with images of {tuple(images.shape[1:])}: {error}"
        ) from error
    out = _finite(model, pick_output(model, raw, output))
    return choose_metric(metric, out, gives_features(model, raw, out))
