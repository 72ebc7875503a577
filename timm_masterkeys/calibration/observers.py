"""Forward hooks that keep what a layer puts out: some positions of it, or its mean and variance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn


class RowsObserver:
    """Keeps a layer's output (and input), a call each, as (images, positions, channels).

    Args:
        layer: The layer; a linear one has its channels last.
        rows: So many positions of a call at most, of all its images together.
        inputs: Keep the inputs as well.
    """

    def __init__(self, layer: nn.Module | None, rows: int, inputs: bool = False) -> None:
        self.channels_last = isinstance(layer, nn.Linear)
        self.rows, self.with_inputs = rows, inputs
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.outputs.append(self.pick(output))
        if self.with_inputs:
            self.inputs.append(self.pick(args[0]))

    def pick(self, tensor: torch.Tensor, channels_last: bool | None = None) -> torch.Tensor:
        """The same random positions of every tensor of a size."""
        last = self.channels_last if channels_last is None else channels_last
        rows = tensor.unsqueeze(1).flatten(1, -2) if last else tensor.flatten(2).transpose(1, 2)
        return rows[:, self.positions(rows.shape[1], len(rows)).to(rows.device)]

    def positions(self, count: int, images: int) -> torch.Tensor:
        """Which of ``count`` positions of an image are kept, in a call with so many images."""
        most = max(1, self.rows // images)
        if count <= most:
            return torch.arange(count, device="cpu")
        return torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")[:most]


class MomentsObserver:
    """Measures mean and variance of each channel of a convolution's output."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        variance, mean = (value.double() for value in torch.var_mean(output, (0, 2, 3), correction=0))
        count = mean.new_full(mean.shape, output[:, 0].numel())
        self.sums.append(torch.stack([count, count * mean, count * (variance + mean.square())]))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over all calls."""
        count, total, squares = torch.stack(self.sums).sum(0)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0)


Observer = TypeVar("Observer", bound=Callable[[nn.Module, Any, Any], Any])


@dataclass(frozen=True)
class Observation(Generic[Observer]):
    """A layer that is observed in some of the batches.

    Attributes:
        name: The layer.
        observer: What sees its output.
        batches: Their indices.
    """

    name: str
    observer: Observer
    batches: list[int]
