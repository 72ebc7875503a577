"""The stages of a calibration: each changes layers of one block, from what the dense block's layers gave."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from .block_runner import BlockPair, Hook, stop
from .least_squares import Gram, choose_keys, fit_ridge
from .observers import MomentsObserver, RowsObserver

Stage = Literal["kernels", "norms", "pointwise"]
STAGES: tuple[Stage, ...] = get_args(Stage)

OVER = "the time budget was over"
SIGMAS_STAY = "its sigmas are not refitted"
ROWS = 100_000  # positions, over all images, to which a pointwise layer or a norm is fitted
KERNEL_ROWS = 20_000  # positions to which a kernel is fitted
IMAGES = 64  # the fewest images a layer is fitted to, whatever its number of positions
FOLDS = 4  # of the cross-validation that chooses a ridge; a layer is fitted to at least as many batches
DEAD = 1e-10  # a channel whose variance is below this stays as it is


@dataclass
class StageReport:
    """What one stage did.

    Attributes:
        name: The stage.
        changed: Names of the layers it changed: kernels, norms (by the layer before them), pointwise layers.
        left: Layers it left as they were, and why.
        seconds: Time spent.
    """

    name: str
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """A row of the table in a CalibrationReport."""
        return self.name, str(len(self.changed)), str(len(self.left)), f"{self.seconds:.0f}"


class LayerPair:
    """A layer of a block in the converted and in the dense network, each with the norm after it, or None.

    Attributes:
        batches: Indices of the batches to fit to: every n-th fitted batch, n as large as leaves ``rows`` positions,
            ``IMAGES`` images and ``FOLDS`` batches.
        observer: The hook on the dense layer: one that measures moments if ``moments``, else one that keeps rows.
    """

    def __init__(self, block: BlockPair, name: str, rows: int, moments: bool) -> None:
        self.block, self.name, norm = block, name, block.norms.get(name)
        modules, dense = block.runner.modules, block.dense_runner.modules
        self.layer: Any = modules[name]
        self.dense_layer: Any = dense[name]
        self.norm: Any = modules[norm] if norm else None
        self.dense_norm: Any = dense[norm] if norm else None
        images = max(IMAGES, rows / block.layout.positions[name])
        step = sum(len(block.runner.batches[i]) for i in block.fitted_batches) / images
        self.batches = block.fitted_batches[:: max(1, min(int(step), len(block.fitted_batches) // FOLDS))]
        self.observer: Any = MomentsObserver() if moments else RowsObserver(self.layer, rows // len(self.batches))

    def observe(self, hook: Hook) -> None:
        """Runs the converted block on the pair's batches as far as the layer, with a hook on that."""
        self.block.outputs(self.batches, (self.name, hook), (self.name, stop))


def calibrate_block(block: BlockPair, reports: dict[Stage, StageReport], out_of_time: bool) -> list[Any]:
    """Runs the stages on a block; returns the outputs of the converted block afterwards, batch by batch."""
    run: dict[Stage, Callable[[LayerPair], str]]
    run = {"kernels": _fit_kernels, "norms": _match_norms, "pointwise": _refit_pointwise}
    layers: dict[Stage, list[LayerPair]] = {}
    for stage, report in reports.items():
        layers[stage], left = _layers(block, stage, out_of_time)
        report.left.update(left)
    block.run_dense([(pair.name, pair.observer, pair.batches) for pairs in layers.values() for pair in pairs])
    for stage, pairs in layers.items():
        start, report = time.perf_counter(), reports[stage]
        for pair in pairs:
            if reason := run[stage](pair):
                report.left[pair.name] = reason
            else:
                report.changed.append(pair.name)
        report.seconds += time.perf_counter() - start
    return block.outputs(range(len(block.calls)))


def _layers(block: BlockPair, stage: Stage, out_of_time: bool) -> tuple[list[LayerPair], dict[str, str]]:
    """The layers of a block that a stage changes; and those it leaves as they are, and why."""
    if stage == "pointwise":
        names = [block.layout.pointwise] if block.layout.pointwise else []
    else:
        names = block.layout.converted
    left = dict.fromkeys(names, OVER) if out_of_time and stage != "norms" else {}
    if stage == "kernels":
        left.update((name, SIGMAS_STAY) for name in names if block.runner.modules[name].has_sigmas)
    rows = KERNEL_ROWS if stage == "kernels" else ROWS
    return [LayerPair(block, name, rows, stage == "norms") for name in names if name not in left], left


# The stages. Each returns the reason if it changed nothing, else "".


def _fit_kernels(pair: LayerPair) -> str:
    """Chooses keys, scale and shift by the layer's output; only channels whose output comes nearer are changed."""
    layer, norm = pair.layer, pair.norm
    entries = layer.key_index, layer.scale.view(layer.out_channels, -1), layer.shift, layer.r2, layer.bias
    changed = [t for t in (*entries, *((norm.running_mean, norm.running_var) if norm else ())) if t is not None]
    state, before = [tensor.clone() for tensor in changed], _error_variance(pair)
    gram = _response_gram(pair)
    mean = gram[:, :-1, -1] / gram[:, -1:, -1]
    # (C, K + 2, K + 2), without the last factor, 1
    covariance = gram[:, :-1, :-1] / gram[:, -1:, -1:] - mean.unsqueeze(2) * mean.unsqueeze(1)
    keys, scale, shift = choose_keys(covariance, layer.keys_per_kernel)
    varying = (covariance[:, -1, -1] > DEAD) & (covariance[:, :-1, :-1].diagonal(dim1=1, dim2=2).amax(1) > DEAD)
    layer.key_index[varying] = keys[varying].to(layer.key_index)
    layer.scale.view(layer.out_channels, -1)[varying] = scale[varying].to(layer.scale.dtype)
    layer.shift[varying] = shift[varying].to(layer.shift.dtype)
    scales = scale.new_zeros(len(varying), len(layer.keys)).scatter_(1, keys, scale)
    _shift_mean(pair, mean[:, -1], (torch.cat([shift.unsqueeze(1), scales], 1) * mean[:, :-1]).sum(1), varying)
    _refit_r2(layer, pair.dense_layer, varying)
    farther = _error_variance(pair) > before  # by rounding errors, where many keys cancel each other
    for tensor, value in zip(changed, state, strict=True):
        tensor[farther] = value[farther]
    return "no channel comes nearer" if (farther | ~varying).all() else ""


def _refit_r2(layer: Any, conv: Any, channels: torch.Tensor) -> None:
    """Measures R2 of some channels' kernels again. In place."""
    kernels = conv.weight.flatten(1).double()
    missed = (kernels - layer.compose_weight().flatten(1)).square().sum(1)
    fit = 1 - missed / (kernels - kernels.mean(1, keepdim=True)).square().sum(1)
    channels = channels & fit.isfinite() & ~layer.constant_kernels()
    layer.r2[channels] = fit[channels].clamp(0, 1).to(layer.r2.dtype)


def _error_variance(pair: LayerPair) -> torch.Tensor:
    """The variance (C,) of the difference between the outputs of the layer and of the dense layer."""
    targets, errors = iter(pair.observer.outputs), MomentsObserver()

    def compare(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        errors.add(pair.observer.pick(output) - next(targets), 2)

    pair.observe(compare)
    return errors.result()[1]


def _response_gram(pair: LayerPair) -> torch.Tensor:
    """For each channel the sums of products over positions, (C, K + 3, K + 3).

    The factors are the responses to a kernel of ones and to the K keys, the dense layer's output, and 1.
    """
    layer, observer = pair.layer, pair.observer
    kernels = torch.cat([torch.ones_like(layer.keys[:1]), layer.keys]).flatten(1)
    count, per_input = len(kernels), layer.out_channels // layer.in_channels
    targets = iter(observer.outputs)
    grams: list[torch.Tensor] = []

    def gather(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        target = next(targets).flatten(0, 1).T
        positions = observer.positions(output[0, 0].numel(), len(output))
        windows = layer.windows(args[0], positions.to(output.device)).flatten(0, 1)
        responses = (kernels @ windows).permute(2, 0, 1)  # (in_channels, positions, kernels)
        rows = responses.new_empty(layer.in_channels, per_input, len(target[0]), count + 2)
        rows[..., :count] = responses.unsqueeze(1)
        rows[..., count] = target.unflatten(0, (-1, per_input))
        rows[..., count + 1] = 1
        rows = rows.flatten(0, 1)
        grams.append((rows.mT @ rows).double())

    pair.observe(gather)
    return torch.stack(grams).sum(0)


def _shift_mean(pair: LayerPair, expected_mean: torch.Tensor, mean: torch.Tensor, channels: torch.Tensor) -> None:
    """Brings the mean of a layer's output, ``mean`` without its bias, to the dense one's, by the norm or the bias."""
    layer, norm = pair.layer, pair.norm
    if norm is not None:
        bias = 0 if layer.bias is None else layer.bias
        norm.running_mean[channels] = (pair.dense_norm.running_mean + mean + bias - expected_mean)[channels].to(
            norm.running_mean.dtype
        )
        norm.running_var[channels] = pair.dense_norm.running_var[channels]
    elif layer.bias is not None:
        layer.bias[channels] = (expected_mean - mean)[channels].to(layer.bias.dtype)


def _match_norms(pair: LayerPair) -> str:
    """Gives the norm's output the mean and variance it has in the dense network; without a norm, the bias the mean."""
    moments = MomentsObserver()
    pair.observe(moments)
    (mean, variance), (new_mean, new_variance) = pair.observer.result(), moments.result()
    layer, norm = pair.layer, pair.norm
    if norm is not None:
        varying = (variance > DEAD) & (new_variance > DEAD)
        ratio = torch.where(varying, new_variance / variance.clamp_min(DEAD), 1.0).sqrt()
        norm.running_mean.copy_(new_mean - (mean - pair.dense_norm.running_mean) * ratio)
        norm.running_var.copy_(((pair.dense_norm.running_var + norm.eps) * ratio.square() - norm.eps).clamp_min(0))
    elif layer.bias is not None:
        layer.bias.add_((mean - new_mean).to(layer.bias.dtype))
    else:
        return "no BatchNorm of its own follows and it has no bias"
    return ""


def _refit_pointwise(pair: LayerPair) -> str:
    """Refits a block's last pointwise layer to the output of the dense block, or else of the dense layer."""
    layer, norm = pair.layer, pair.norm
    in_block = pair.block.layout.name != pair.name  # else the layer is the whole block
    block_factor = _block_factor(pair) if in_block else None
    factor = block_factor[0] if block_factor else layer.weight.new_ones(len(layer.weight))
    folds = _residual_folds(pair, block_factor)
    if not folds:
        return "it runs at other positions than in the dense network"
    solution = fit_ridge(folds, factor.square().double(), layer.bias is not None or norm is not None)
    if solution is None:
        return "a refit does not help on images it was not fitted to"
    weight, bias = solution
    fits_own_output = block_factor is None and in_block  # so the block's output may come no nearer
    before = pair.block.error(pair.batches) if fits_own_output else math.inf
    changed = [t for t in (layer.weight, layer.bias, norm and norm.running_mean) if t is not None]
    state = [tensor.clone() for tensor in changed]
    layer.weight.add_(weight.T.reshape(layer.weight.shape).to(layer.weight.dtype))
    if norm is not None:
        norm.running_mean.sub_(bias.to(norm.running_mean.dtype))
    elif layer.bias is not None:
        layer.bias.add_(bias.to(layer.bias.dtype))
    if fits_own_output and pair.block.error(pair.batches) > before:  # NaN, an error that is not known, keeps the refit
        for tensor, value in zip(changed, state, strict=True):
            tensor.copy_(value)
        return "the block comes no nearer"
    return ""


def _residual_folds(pair: LayerPair, block_factor: tuple[torch.Tensor, bool] | None) -> list[Gram]:
    """Sums over the layer's inputs and the residual of the block's output; without a factor, of the layer's output.

    Empty if the two networks run the layer at different positions, as where they choose regions.
    """
    layer, norm = pair.layer, pair.norm
    offset = 0 if norm is None else norm.running_mean - pair.dense_norm.running_mean  # taken away by the norm
    folds: dict[int, Gram] = {}
    for k, (i, expected) in enumerate(zip(pair.batches, pair.observer.outputs, strict=True)):
        rows = RowsObserver(layer, pair.observer.rows, inputs=True)
        (out,) = pair.block.outputs([i], (pair.name, rows))
        if block_factor is None and expected.shape != rows.outputs[0].shape:
            return []
        if block_factor is None:
            residual = expected - rows.outputs[0] + offset
        else:
            factor, channels_last = block_factor
            residual = rows.pick(pair.block.expected[i] - out, channels_last) / factor
        gram = Gram.of(rows.inputs[0].flatten(0, 1), residual.flatten(0, 1))
        folds[k % FOLDS] = folds[k % FOLDS] + gram if k >= FOLDS else gram
    return list(folds.values())


def _block_factor(pair: LayerPair) -> tuple[torch.Tensor, bool] | None:
    """How the block's output follows the layer's: a factor per channel, and whether its channels are last; or None."""
    nudges: list[torch.Tensor] = []

    def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu").to(output)
        nudges.append(noise * output.std() / 8)
        return output + nudges[-1]

    (out,), (nudged_out,) = pair.block.outputs([0]), pair.block.outputs([0], (pair.name, nudge))
    if not isinstance(nudged_out, torch.Tensor) or len(nudges) != 1:
        return None
    rows = RowsObserver(pair.layer, nudged_out.numel())
    cause = rows.pick(nudges[0])
    for channels_last in (False, True):
        effect = rows.pick(nudged_out - out, channels_last)
        if effect.shape != cause.shape:
            continue
        factor = (effect * cause).sum((0, 1)) / cause.square().sum((0, 1))
        error = (effect - factor * cause).square().sum() / effect.square().sum().clamp_min(1e-30)
        if error < 1e-3 and factor.abs().min() > 1e-6 * factor.abs().max() > 0:
            return factor, channels_last
    return None
