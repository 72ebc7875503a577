"""Hooks that keep or measure what a layer gives."""

from typing import Any

import torch
from torch import nn


class RowsObserver:
    """Keeps some positions of a layer's output (and input) at each call, as (images, positions, channels).

    Args:
        layer: The layer; a linear one has its channels last.
        rows: The most positions kept at a call, over all its images.
        inputs: Keep the inputs as well.
    """

    def __init__(self, layer: nn.Module, rows: int, inputs: bool = False) -> None:
        self.channels_last = isinstance(layer, nn.Linear)
        self.rows, self.with_inputs = rows, inputs
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.outputs.append(self.pick(output))
        if self.with_inputs:
            self.inputs.append(self.pick(args[0]))

    def pick(self, tensor: torch.Tensor, channels_last: bool | None = None) -> torch.Tensor:
        """Random positions of a tensor, the same for every tensor of its size."""
        last = self.channels_last if channels_last is None else channels_last
        rows = tensor.unsqueeze(1).flatten(1, -2) if last else tensor.flatten(2).transpose(1, 2)
        return rows[:, self.positions(rows.shape[1], len(rows)).to(rows.device)]

    def positions(self, count: int, images: int) -> torch.Tensor:
        """Indices of the positions kept in each image, out of ``count``, at a call with ``images`` images."""
        most = max(1, self.rows // max(1, images))
        if count <= most:
            return torch.arange(count, device="cpu")
        return torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")[:most]


class MomentsObserver:
    """Measures mean and variance of each channel of a convolution's output."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.add(output, 1)

    def add(self, tensor: torch.Tensor, channels: int) -> None:
        """Adds the values of a tensor; ``channels`` is the dimension of its channels."""
        others = [dim for dim in range(tensor.ndim) if dim != channels]
        variance, mean = (value.double() for value in torch.var_mean(tensor, others, correction=0))
        count = mean.new_full(mean.shape, tensor.numel() // len(mean))
        self.sums.append(torch.stack([count, count * mean, count * (variance + mean.square())]))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of all values."""
        count, total, squares = torch.stack(self.sums).sum(0)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp_min(0)
