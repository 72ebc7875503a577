"""The stages of a calibration, each on one layer of a block of two networks.

Each takes the batches that the layer was observed in and the observer that saw the dense layer there, and returns why
it changed nothing, or "".
"""

import math
from typing import Any

import torch
from torch import nn

from .block_pair import FOLDS, BlockPair, MomentsObserver, RowsObserver
from .blocks import Reached
from .least_squares import Gram, choose_keys, fit_ridge

DEAD = 1e-10  # a channel that varies less than this is left alone


def project(pair: BlockPair, name: str, batches: list[int], dense: RowsObserver) -> str:
    """Chooses keys, scale and shift of a converted layer by its output, of each channel that comes nearer."""
    layer, (norm, _) = pair.layer(name), pair.norm(name)
    entries = layer.key_index, layer.scale.view(layer.out_channels, -1), layer.shift, layer.r2, layer.bias
    changed = [t for t in (*entries, *((norm.running_mean, norm.running_var) if norm else ())) if t is not None]
    state, before = [tensor.clone() for tensor in changed], _error_variance(pair, name, batches, dense)
    gram = _response_gram(pair, name, batches, dense)
    mean = gram[:, :-1, -1] / gram[:, -1:, -1]
    covariance = gram[:, :-1, :-1] / gram[:, -1:, -1:] - mean.unsqueeze(2) * mean.unsqueeze(1)
    keys, scale, shift = choose_keys(covariance, layer.keys_per_kernel)
    alive = (covariance[:, -1, -1] > DEAD) & (covariance[:, :-1, :-1].diagonal(dim1=1, dim2=2).amax(1) > DEAD)
    layer.key_index[alive] = keys[alive].to(layer.key_index)
    layer.scale.view(layer.out_channels, -1)[alive] = scale[alive].to(layer.scale.dtype)
    layer.shift[alive] = shift[alive].to(layer.shift.dtype)
    scales = scale.new_zeros(len(alive), len(layer.keys)).scatter_(1, keys, scale)
    _shift_mean(pair, name, mean[:, -1], (torch.cat([shift.unsqueeze(1), scales], 1) * mean[:, :-1]).sum(1), alive)
    _refit_r2(layer, pair.dense_layer(name), alive)
    farther = _error_variance(pair, name, batches, dense) > before  # many keys cancel each other: rounding errors
    for tensor, value in zip(changed, state, strict=True):
        tensor[farther] = value[farther]
    return "no channel comes nearer" if (farther | ~alive).all() else ""


def _refit_r2(layer: Any, conv: Any, channels: torch.Tensor) -> None:
    """Measures R2 of the layer's kernels anew."""
    kernels = conv.weight.flatten(1).double()
    missed = (kernels - layer.compose_weight().flatten(1)).square().sum(1)
    fit = 1 - missed / (kernels - kernels.mean(1, keepdim=True)).square().sum(1)
    channels = channels & fit.isfinite() & ~layer.constant_kernels()
    layer.r2[channels] = fit[channels].clamp(0, 1).to(layer.r2.dtype)


def _error_variance(pair: BlockPair, name: str, batches: list[int], dense: RowsObserver) -> torch.Tensor:
    """(C,), of the difference between the outputs of the layer and of the dense layer."""
    targets, errors = iter(dense.outputs), MomentsObserver()

    def compare(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        error = dense.pick(output) - next(targets)
        errors(module, args, error.movedim(2, 1).unsqueeze(3))
        raise Reached

    pair.run(batches, (name, compare))
    return errors.result()[1]


def _response_gram(pair: BlockPair, name: str, batches: list[int], dense: RowsObserver) -> torch.Tensor:
    """(C, K + 3, K + 3), for each channel the sums of products over positions.

    Of the responses to a kernel of ones and to the K keys, of the dense layer's output, and of 1.
    """
    layer = pair.layer(name)
    kernels = torch.cat([torch.ones_like(layer.keys[:1]), layer.keys]).flatten(1)
    count, per_input = len(kernels), layer.out_channels // layer.in_channels
    targets = iter(dense.outputs)
    grams: list[torch.Tensor] = []

    def gather(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        target = next(targets).flatten(0, 1).T
        positions = dense.positions(output[0, 0].numel(), len(output))
        windows = layer.windows(args[0], positions.to(output.device)).flatten(0, 1)
        responses = (kernels @ windows).permute(2, 0, 1)  # (in_channels, positions, kernels)
        rows = responses.new_empty(layer.in_channels, per_input, len(target[0]), count + 2)
        rows[..., :count] = responses.unsqueeze(1)
        rows[..., count] = target.unflatten(0, (-1, per_input))
        rows[..., count + 1] = 1
        rows = rows.flatten(0, 1)
        grams.append((rows.mT @ rows).double())
        raise Reached

    pair.run(batches, (name, gather))
    return torch.stack(grams).sum(0)


def _shift_mean(pair: BlockPair, name: str, expected: torch.Tensor, got: torch.Tensor, alive: torch.Tensor) -> None:
    """Corrects the mean of a layer's output, which is ``got`` without its bias, by its norm or else its bias."""
    layer, (norm, dense_norm) = pair.layer(name), pair.norm(name)
    if norm is not None:
        bias = 0 if layer.bias is None else layer.bias
        norm.running_mean[alive] = (dense_norm.running_mean + got + bias - expected)[alive].to(norm.running_mean.dtype)
        norm.running_var[alive] = dense_norm.running_var[alive]
    elif layer.bias is not None:
        layer.bias[alive] = (expected - got)[alive].to(layer.bias.dtype)


def match(pair: BlockPair, name: str, batches: list[int], dense: MomentsObserver) -> str:
    """Gives what follows a converted layer the mean (and variance) it has in the dense network."""

    def stop(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise Reached

    found = MomentsObserver()
    pair.run(batches, (name, found), (name, stop))
    (mean, variance), (new_mean, new_variance) = dense.result(), found.result()
    layer, (norm, dense_norm) = pair.layer(name), pair.norm(name)
    if norm is not None:
        alive = (variance > DEAD) & (new_variance > DEAD)
        ratio = torch.where(alive, new_variance / variance.clamp_min(DEAD), 1.0).sqrt()
        norm.running_mean.copy_(new_mean - (mean - dense_norm.running_mean) * ratio)
        norm.running_var.copy_(((dense_norm.running_var + norm.eps) * ratio.square() - norm.eps).clamp_min(0))
    elif layer.bias is not None:
        layer.bias.add_((mean - new_mean).to(layer.bias.dtype))
    else:
        return "no BatchNorm follows and it has no bias"
    return ""


def absorb(pair: BlockPair, name: str, batches: list[int], dense: RowsObserver) -> str:
    """Refits a block's last pointwise layer to the dense block's output, or else to the dense layer's."""
    layer, (norm, _) = pair.layer(name), pair.norm(name)
    found = _factor(pair, name) if pair.block.name != name else None
    factor = found[0] if found else layer.weight.new_ones(len(layer.weight))
    folds = _residual_folds(pair, name, batches, dense, found)
    solution = fit_ridge(folds, factor.square().double(), layer.bias is not None or norm is not None)
    if solution is None:
        return "no ridge helps on images it was not fitted to"
    weight, bias = solution
    to_itself = found is None and pair.block.name != name  # does the block's output come nearer?
    before = pair.error(batches) if to_itself else math.nan
    changed = [t for t in (layer.weight, layer.bias, norm and norm.running_mean) if t is not None]
    state = [tensor.clone() for tensor in changed]
    layer.weight.add_(weight.T.reshape(layer.weight.shape).to(layer.weight.dtype))
    if norm is not None:
        norm.running_mean.sub_(bias.to(norm.running_mean.dtype))
    elif layer.bias is not None:
        layer.bias.add_(bias.to(layer.bias.dtype))
    if to_itself and pair.error(batches) > before:
        for tensor, value in zip(changed, state, strict=True):
            tensor.copy_(value)
        return "the block comes no nearer"
    return ""


def _residual_folds(
    pair: BlockPair, name: str, batches: list[int], dense: RowsObserver, found: tuple[torch.Tensor, bool] | None
) -> list[Gram]:
    """The layer's inputs, with what the block's output lacks, or, without a factor, what the layer's own does."""
    layer, (norm, dense_norm) = pair.layer(name), pair.norm(name)
    offset = 0 if norm is None else norm.running_mean - dense_norm.running_mean  # of the norms' means
    folds: dict[int, Gram] = {}
    for k, (i, expected) in enumerate(zip(batches, dense.outputs, strict=True)):
        rows = RowsObserver(layer, dense.rows, inputs=True)
        (out,) = pair.run([i], (name, rows))
        if found is None:
            residual = expected - rows.outputs[0] + offset
        else:
            factor, channels_last = found
            residual = rows.pick(pair.expected[i] - out, channels_last) / factor
        gram = Gram.of(rows.inputs[0].flatten(0, 1), residual.flatten(0, 1))
        folds[k % FOLDS] = folds[k % FOLDS] + gram if k >= FOLDS else gram
    return list(folds.values())


def _factor(pair: BlockPair, name: str) -> tuple[torch.Tensor, bool] | None:
    """One factor a channel by which the block's output moves with the layer's, and whether it has channels last."""
    nudges: list[torch.Tensor] = []

    def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
        nudges.append(noise * output.std() / 8)
        return output + nudges[-1]

    (out,), (moved,) = pair.run([0]), pair.run([0], (name, nudge))
    if not isinstance(moved, torch.Tensor) or len(nudges) != 1:
        return None
    rows = RowsObserver(pair.layer(name), moved.numel())
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
