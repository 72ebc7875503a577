"""The fewest keys with which a network still answers as the dense one does, chosen by what the network puts out."""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import CalibrationError, ConversionError
from ..keys.banks import DEFAULT_BANK, Bank, KeyBank, get_bank
from ..layers import MasterKeyConv2d, Trainable
from ..models.plan import Patterns
from ..models.surgery import convert_to_masterkeys, replace_layers
from ..models.wrapped import evaluating
from .blocks import hooked
from .calibrate import (
    calibrate_masterkeys,
    check_models,
    output_agreement,
    output_divergence,
    probe,
)
from .images import BUILTIN, COUNT, FEWEST, HELD_OUT, Images, builtin_images, load_images

_logger = logging.getLogger(__name__)

JUDGES = 32  # images by which layers are compared


@dataclass(frozen=True)
class Spending:
    """A network that was tried.

    Attributes:
        keys: Keys of all its kernels; of a dense kernel, its taps.
        agreement: Share of the held-out images on which it and the dense network have the same highest output.
        divergence: Kullback-Leibler divergence of its softmaxed outputs from the dense network's, on the same.
        keys_per_kernel: By the name of a layer; 0 where it stays dense.
    """

    keys: int
    agreement: float
    divergence: float
    keys_per_kernel: dict[str, int]


@dataclass(frozen=True)
class KeyBudget:
    """How few keys were enough; ``str()`` is a table.

    Attributes:
        asked: The agreement asked for.
        chosen: The network that was returned.
        tried: All networks that were repaired and measured, by their keys.
        kernels: Of each layer.
        images: The repair had.
        held_out: Images that gave the figures: nothing was fitted to them; which of the networks tried is returned was
            chosen by them.
        seconds: Time spent in all.
    """

    asked: float
    chosen: Spending
    tried: tuple[Spending, ...]
    kernels: dict[str, int]
    images: int
    held_out: int
    seconds: float

    def summary(self) -> str:
        """The figures in one line."""
        return (
            f"on {self.images} images: {self.chosen.keys:,} keys for {sum(self.kernels.values()):,} kernels agree with "
            f"the dense network on {self.chosen.agreement:.1%} of {self.held_out} held-out images, {self.asked:.1%} "
            "asked for"
        )

    def __str__(self) -> str:
        width = max(len(name) for name in [*self.kernels, "layer"])
        lines = [f"{'layer':<{width}}  kernels  keys per kernel"]
        for name, count in self.chosen.keys_per_kernel.items():
            lines.append(f"{name:<{width}}  {self.kernels[name]:>7,}  {count or 'dense':>15}")
        lines += ["", "     keys  per kernel  agreement  divergence"]
        total = sum(self.kernels.values())
        for one in self.tried:
            mark = "  chosen" if one == self.chosen else ""
            each = one.keys / total
            lines.append(f"{one.keys:>9,}  {each:>10.2f}  {one.agreement:>9.1%}  {one.divergence:>10.3f}{mark}")
        return "\n".join([*lines, f"repaired {self.summary()}, {self.seconds:.0f} s"])


@torch.no_grad()
def convert_to_agreement(
    dense: nn.Module,
    agreement: float = 0.95,
    images: Images = BUILTIN,
    *,
    bank: Bank = DEFAULT_BANK,
    include: Patterns = None,
    exclude: Patterns = None,
    trainable: Trainable = "shift",
    batch_size: int = 8,
    max_images: int = 300,
    time_budget: float | None = None,
) -> tuple[nn.Module, KeyBudget]:
    """Converts a model with as few keys as agree with it on so many images, and repairs it. ``dense`` stays as it is.

    Layers get one, two, four or all keys per kernel, or stay dense, which counts as a key a tap. First it is measured
    how far the network's output moves when one layer alone has so many keys. Where another key brings the output
    nearest, per key of a kernel, keys are spent first. How far along that order is found by bisection: each network
    tried is converted, repaired with ``calibrate_masterkeys`` and judged by images that neither chose its keys nor
    repaired it. About six are tried, so it takes about seven times as long as one repair.

    Args:
        dense: A timm model or any other that ``calibrate_masterkeys`` takes, not converted in any layer.
        agreement: In (0, 1]: the share of held-out images with the same highest output.
        images: As for ``calibrate_masterkeys``. Every fourth is held out (give no two of the same thing), of
            ``"builtin"`` all crops of every fourth photograph. At least 40. A network is less sure of the built-in
            crops than of photographs of its task, so the same keys agree on fewer of them: give photographs of the
            task to spend no more keys than it needs.
        bank: Anything ``get_bank`` takes.
        include: As for ``convert_to_masterkeys``.
        exclude: As for ``convert_to_masterkeys``.
        trainable: "none", "shift" or "affine", as for ``convert_to_masterkeys``.
        batch_size: Images at a time.
        max_images: At most so many repair; a third as many are held out, of ``"builtin"`` more.
        time_budget: As for ``calibrate_masterkeys``, of each repair.

    Returns:
        The repaired model, and the table of keys spent against agreement.

    Raises:
        BankError, ProjectionError, ConversionError: As ``convert_to_masterkeys``.
        CalibrationError: As ``calibrate_masterkeys``; an agreement out of range; or not reached, with what was.

    Example:
        >>> model, budget = convert_to_agreement(timm.create_model("convnext_tiny", pretrained=True), 0.95)
        >>> print(budget)
    """
    if isinstance(agreement, bool) or not isinstance(agreement, (int, float)) or not 0 < agreement <= 1:
        raise CalibrationError(f"agreement is {agreement!r}, expected more than 0, at most 1 (0.95 for 95 %).")
    if trainable == "scales":
        raise ConversionError("trainable is 'scales', which has one key per kernel: there is no number to choose.")
    bank = get_bank(bank)
    first = convert_to_masterkeys(dense, bank, include=include, exclude=exclude, trainable=trainable)
    check_models(first, dense)
    kernels = {name: m.out_channels for name, m in first.named_modules() if isinstance(m, MasterKeyConv2d)}
    fitted, held_out = split_images(images, dense, max_images)
    start = time.perf_counter()
    layers = {name: _choices(dense.get_submodule(name), bank) for name in kernels}
    with evaluating(dense):
        probe(dense, fitted[:2])
        wanted = _outputs(dense, held_out, batch_size)
        judges = fitted[:: max(1, len(fitted) // JUDGES)]
        steps = order_steps(kernels, _divergences(dense, layers, judges, batch_size))
    search = _Search(dense, bank, trainable, kernels, layers, fitted, held_out, wanted, batch_size, time_budget)
    nothing_left = all(None in choices.values() for choices in layers.values())  # after the last step
    best, tried = _fewest_steps(lambda taken: search.attempt(steps[:taken]), len(steps) - nothing_left, agreement)
    if best is None:
        top = max(tried, key=lambda one: one.agreement)
        raise CalibrationError(
            f"No network agrees on {agreement:.1%} of {len(held_out)} held-out images: the best, with {top.keys:,} "
            f"keys for {sum(kernels.values()):,} kernels, on {top.agreement:.1%}. Ask for less, or give more "
            "images."
        )
    model, chosen = best
    return model, KeyBudget(
        agreement,
        chosen,
        tuple(sorted(tried, key=lambda one: one.keys)),
        kernels,
        len(fitted),
        len(held_out),
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Search:
    """What all networks tried have in common: the dense one, each layer's choices, images to repair and to judge by."""

    dense: nn.Module
    bank: KeyBank
    trainable: Trainable
    kernels: Mapping[str, int]
    layers: Mapping[str, Mapping[int, MasterKeyConv2d | None]]
    fitted: torch.Tensor
    held_out: torch.Tensor
    wanted: torch.Tensor
    batch_size: int
    time_budget: float | None

    def attempt(self, steps: Sequence[tuple[str, int]]) -> tuple[nn.Module, Spending]:
        """The network after these steps, repaired and judged."""
        counts = {name: min(choices) for name, choices in self.layers.items()} | dict(steps)
        keyed = {name: count for name, count in counts.items() if self.layers[name][count] is not None}
        model = _converted(self.dense, keyed, self.bank, self.trainable)
        calibrate_masterkeys(model, self.dense, self.fitted, batch_size=self.batch_size, time_budget=self.time_budget)
        with evaluating(model):
            out = _outputs(model, self.held_out, self.batch_size)
        spent = sum(self.kernels[name] * count for name, count in counts.items())
        each = {name: count if name in keyed else 0 for name, count in counts.items()}
        return model, Spending(spent, output_agreement(out, self.wanted), output_divergence(out, self.wanted), each)


def _fewest_steps(
    attempt: Callable[[int], tuple[nn.Module, Spending]], most: int, agreement: float
) -> tuple[tuple[nn.Module, Spending] | None, list[Spending]]:
    """By bisection what the fewest steps give that agrees, None if nothing does; and the figures of all attempts."""
    best: tuple[nn.Module, Spending] | None = None
    tried: list[Spending] = []
    least = 0
    while best is None or least < most:
        taken = (least + most) // 2
        model, spending = attempt(taken)
        tried.append(spending)
        _logger.info("%d keys: agreement %.1f %%.", spending.keys, 100 * spending.agreement)
        if spending.agreement >= agreement:
            best, most = (model, spending), taken
        elif least == most:
            break
        else:
            least = taken + 1
    return best, tried


def order_steps(kernels: Mapping[str, int], divergences: Mapping[str, Mapping[int, float]]) -> list[tuple[str, int]]:
    """In what order layers get more keys: where the divergence falls most for each key spent comes first.

    Args:
        kernels: Of each layer.
        divergences: By layer and keys per kernel; each begins with the fewest.

    Returns:
        (layer, keys per kernel), until every layer has its most.
    """
    counts = {name: min(found) for name, found in divergences.items()}
    steps: list[tuple[str, int]] = []
    while True:
        gains = {
            (name, count): (found[counts[name]] - found[count]) / (kernels[name] * (count - counts[name]))
            for name, found in divergences.items()
            for count in found
            if count > counts[name]
        }
        if not gains:
            return steps
        steps.append(max(gains, key=lambda step: (gains[step], -step[1])))
        counts.update(steps[-1:])


def _choices(conv: Any, bank: KeyBank) -> dict[int, MasterKeyConv2d | None]:
    """A layer with one, two, four, ... and all keys per kernel, or dense (None), by the numbers that shape a kernel."""
    numbers = [2**power for power in range(len(bank).bit_length()) if 2**power < len(bank)]
    found = [MasterKeyConv2d.from_conv(conv, bank, number) for number in [*numbers, len(bank)]]
    choices: dict[int, MasterKeyConv2d | None] = {layer.keys_per_kernel: layer for layer in found}
    taps = conv.weight[0].numel()
    return {**choices, taps: None} if taps > max(choices) + 1 else choices  # else all keys and the shift are as good


def _converted(dense: nn.Module, counts: Mapping[str, int], bank: KeyBank, trainable: Trainable) -> nn.Module:
    model = copy.deepcopy(dense)
    convs: dict[str, Any] = {name: model.get_submodule(name) for name in counts}
    return replace_layers(
        model, {name: MasterKeyConv2d.from_conv(convs[name], bank, counts[name], trainable) for name in counts}
    )


def split_images(images: Images, dense: nn.Module, max_images: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to repair with, and images to judge by; of the built-in ones, crops of different photographs."""
    if isinstance(images, str) and images == BUILTIN:
        held = COUNT // HELD_OUT  # photographs, which give many crops each, as they judge only
        fitted = builtin_images(dense, min(COUNT - held, max_images), held_out=False)
        judging = builtin_images(dense, 8 * held, held_out=True)
        return load_images(fitted, dense, max_images), load_images(judging, dense, len(judging))
    least = HELD_OUT * FEWEST
    tensor = load_images(images, dense, max_images * HELD_OUT // (HELD_OUT - 1))
    if len(tensor) < least:
        raise CalibrationError(
            f"{len(tensor)} images, expected at least {least}, as every fourth is held out; some hundred are better."
        )
    held_out = torch.arange(len(tensor), device=tensor.device) % HELD_OUT == HELD_OUT - 1
    return tensor[~held_out], tensor[held_out]


def _outputs(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def _divergences(
    dense: nn.Module, layers: Mapping[str, Mapping[int, MasterKeyConv2d | None]], images: torch.Tensor, batch_size: int
) -> dict[str, dict[int, float]]:
    """How far the output moves when one layer has so many keys, by layer and number."""
    wanted = _outputs(dense, images, batch_size)
    found: dict[str, dict[int, float]] = {name: {} for name in layers}
    for name, choices in tqdm(layers.items(), desc="keys", unit="layer", leave=False, disable=None):
        for count, layer in choices.items():
            if layer is None:
                found[name][count] = 0.0
                continue

            def replace(module: nn.Module, args: Any, output: torch.Tensor, layer: MasterKeyConv2d = layer) -> Any:
                ours = layer.forward(args[0])  # without the hooks, which it has in common with the dense one
                (var, mean), (our_var, our_mean) = (
                    torch.var_mean(out, (0, 2, 3), correction=0, keepdim=True) for out in (output, ours)
                )
                return (ours - our_mean) * (var / our_var.clamp_min(1e-10)).sqrt() + mean  # as the repair will see to

            with hooked([(dense.get_submodule(name), replace)]):
                found[name][count] = output_divergence(_outputs(dense, images, batch_size), wanted)
    return found
