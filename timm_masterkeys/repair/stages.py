"""The stages of a repair, each on one part of two networks; they return why they changed nothing, or ""."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers import MasterKeyConv2d
from .blocks import Reached, copied
from .gather import Moments, Rows
from .least_squares import Gram, choose_keys, fit_ridge
from .pair import FOLDS, Pair, Tap

HEALING_RATE = 1.5e-3, 1.5e-4  # of Adam, for what is 1-D and for weights
DEAD = 1e-10  # a channel that varies less than this is left alone


def project(pair: Pair, wanted: Tap[Rows]) -> str:
    """Chooses keys, scale and shift of a converted layer by what it puts out."""
    name, layer = wanted.name, pair.layer(wanted.name)
    probes = torch.cat([torch.ones_like(layer.keys[:1]), layer.keys]).flatten(1)
    count, per_input = len(probes), layer.out_channels // layer.in_channels
    targets = iter(wanted.hook.outputs)
    grams: list[torch.Tensor] = []

    def gather(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        target = next(targets).flatten(0, 1).T
        positions = wanted.hook.positions(output[0, 0].numel(), len(output))
        windows = layer.windows(args[0], positions.to(output.device)).flatten(0, 1)
        responses = (probes @ windows).permute(2, 0, 1)  # (in_channels, positions, probes)
        rows = responses.new_empty(layer.in_channels, per_input, len(target[0]), count + 2)
        rows[..., :count] = responses.unsqueeze(1)
        rows[..., count] = target.unflatten(0, (-1, per_input))
        rows[..., count + 1] = 1
        rows = rows.flatten(0, 1)
        grams.append((rows.mT @ rows).double())
        raise Reached

    pair.run(wanted.batches, (name, gather))
    gram = torch.stack(grams).sum(0)
    mean = gram[:, :-1, -1] / gram[:, -1:, -1]
    covariance = gram[:, :-1, :-1] / gram[:, -1:, -1:] - mean.unsqueeze(2) * mean.unsqueeze(1)
    keys, scale, shift = choose_keys(covariance, layer.keys_per_kernel)
    alive = (covariance[:, -1, -1] > DEAD) & (covariance[:, :-1, :-1].diagonal(dim1=1, dim2=2).amax(1) > DEAD)
    layer.key_index[alive] = keys[alive].to(layer.key_index)
    layer.scale.view(layer.out_channels, -1)[alive] = scale[alive].to(layer.scale.dtype)
    layer.shift[alive] = shift[alive].to(layer.shift.dtype)
    scales = scale.new_zeros(len(alive), count - 1).scatter_(1, keys, scale)
    _shift_mean(pair, name, mean[:, -1], (torch.cat([shift.unsqueeze(1), scales], 1) * mean[:, :-1]).sum(1), alive)
    stock = pair.stock(name).weight.flatten(1).double()
    missed = (stock - layer.compose_weight().flatten(1)).square().sum(1)
    fit = 1 - missed / (stock - stock.mean(1, keepdim=True)).square().sum(1)
    alive &= fit.isfinite()
    layer.r2[alive] = fit[alive].clamp(0, 1).to(layer.r2.dtype)
    return ""


def _shift_mean(pair: Pair, name: str, wanted: torch.Tensor, ours: torch.Tensor, alive: torch.Tensor) -> None:
    """Corrects the mean of a layer's output, bias not counted in ours, by its norm or else its bias."""
    layer, (norm, stock) = pair.layer(name), pair.norm(name)
    if norm is not None:
        bias = 0 if layer.bias is None else layer.bias
        norm.running_mean[alive] = (stock.running_mean + ours + bias - wanted)[alive].to(norm.running_mean.dtype)
        norm.running_var[alive] = stock.running_var[alive]
    elif layer.bias is not None:
        layer.bias[alive] = (wanted - ours)[alive].to(layer.bias.dtype)


def match(pair: Pair, wanted: Tap[Moments]) -> str:
    """Gives what follows a converted layer the mean (and variance) it has in the reference."""

    def stop(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise Reached

    found = Moments()
    pair.run(wanted.batches, (wanted.name, found), (wanted.name, stop))
    (mean, variance), (our_mean, our_variance) = wanted.hook.result(), found.result()
    layer, (norm, stock) = pair.layer(wanted.name), pair.norm(wanted.name)
    if norm is not None:
        alive = (variance > DEAD) & (our_variance > DEAD)
        ratio = torch.where(alive, our_variance / variance.clamp_min(DEAD), 1.0).sqrt()
        norm.running_mean.copy_(our_mean - (mean - stock.running_mean) * ratio)
        norm.running_var.copy_(((stock.running_var + norm.eps) * ratio.square() - norm.eps).clamp_min(0))
    elif layer.bias is not None:
        layer.bias.add_((mean - our_mean).to(layer.bias.dtype))
    else:
        return "no BatchNorm follows and it has no bias"
    return ""


def absorb(pair: Pair, target: Tap[Rows]) -> str:
    """Refits a part's last pointwise layer, to what the part puts out or else to what the layer itself does."""
    name = target.name
    layer, (norm, stock) = pair.layer(name), pair.norm(name)
    offset = 0 if norm is None else norm.running_mean - stock.running_mean  # of the norms' means, where they count
    found = _factor(pair, name) if pair.part.name != name else None
    factor, channels_last = found or (layer.weight.new_ones(len(layer.weight)), None)
    folds: dict[int, Gram] = {}
    for k, (i, theirs) in enumerate(zip(target.batches, target.hook.outputs, strict=True)):
        rows = Rows(layer, target.hook.rows, inputs=True)
        (out,) = pair.run([i], (name, rows))
        if found is None:
            residual = theirs - rows.outputs[0] + offset
        else:
            residual = rows.pick(pair.wanted[i] - out, channels_last) / factor
        gram = Gram.of(rows.inputs[0].flatten(0, 1), residual.flatten(0, 1))
        folds[k % FOLDS] = folds[k % FOLDS] + gram if k >= FOLDS else gram
    solution = fit_ridge(list(folds.values()), factor.square().double(), layer.bias is not None or norm is not None)
    if solution is None:
        return "no ridge helps on images it was not fitted to"
    weight, bias = solution
    inner = found is None and pair.part.name != name  # fitted to its own output: does the block's come nearer?
    before = pair.error(target.batches) if inner else math.nan
    changed = [t for t in (layer.weight, layer.bias, norm and norm.running_mean) if t is not None]
    state = [tensor.clone() for tensor in changed]
    layer.weight.add_(weight.T.reshape(layer.weight.shape).to(layer.weight.dtype))
    if norm is not None:
        norm.running_mean.sub_(bias.to(norm.running_mean.dtype))
    elif layer.bias is not None:
        layer.bias.add_(bias.to(layer.bias.dtype))
    if inner and pair.error(target.batches) > before:
        for tensor, value in zip(changed, state, strict=True):
            tensor.copy_(value)
        return "the block comes no nearer"
    return ""


def _factor(pair: Pair, name: str) -> tuple[torch.Tensor, bool] | None:
    """By how much the part's output moves with each channel of the layer's, if by one factor a channel.

    With it, whether the part puts channels last.
    """
    nudges: list[torch.Tensor] = []

    def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
        nudges.append(noise * output.std() / 8)
        return output + nudges[-1]

    (out,), (moved,) = pair.run([0]), pair.run([0], (name, nudge))
    if not isinstance(moved, torch.Tensor) or len(nudges) != 1:
        return None
    rows = Rows(pair.layer(name), moved.numel())
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


def heal(pair: Pair, seconds: float) -> str:
    """Trains a block towards the reference's output; the state that does best on every fourth batch stays."""
    block = pair.layer(pair.part.name)
    judges, trained = pair.fitted[FOLDS - 1 :: FOLDS], [i for k, i in enumerate(pair.fitted) if (k + 1) % FOLDS]
    least, best = pair.error(judges), copy.deepcopy(block.state_dict())
    if not math.isfinite(least):
        return "puts out more than a tensor, or does not vary"
    variance = sum(float(pair.wanted[i].var()) for i in trained) / len(trained)
    generator, start, share = torch.Generator().manual_seed(0), time.perf_counter(), 0.0
    with _trainable(block) as tensors:
        small, large = ([t for t in tensors if (t.ndim > 1) == big] for big in (False, True))
        groups = [{"params": p, "lr": rate} for p, rate in zip((small, large), HEALING_RATE, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        while share < 1:
            for k in torch.randperm(len(trained), generator=generator, device="cpu").tolist():
                args, kwargs = pair.calls[trained[k]]
                with torch.enable_grad():
                    error = block(*copied(args), **kwargs) - pair.wanted[trained[k]]
                    (error.square().mean() / variance).backward()
                optimizer.step()
                optimizer.zero_grad()
                share = (time.perf_counter() - start) / seconds
                if share >= 1:
                    break
                for group, rate in zip(optimizer.param_groups, HEALING_RATE, strict=True):
                    group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * share))
            found = pair.error(judges)
            if found < least:
                least, best = found, copy.deepcopy(block.state_dict())
        block.load_state_dict(best)
    return ""


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
