"""A block of the converted and of the dense network side by side, and the forward hooks that observe its layers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import BlockwiseNetwork, Hook

IMAGES = 64  # that a layer is fitted to at least, whatever its number of positions,
FOLDS = 4  # in so many batches at least


class BlockPair:
    """A block of both networks: its arguments in the converted one, and its expected outputs, of the dense one.

    Attributes:
        block: The block.
        calls: Its arguments in the converted network, a batch each.
        expected: Its outputs in the dense network, a batch each; empty before ``run_dense``.
        fitted: Indices of the batches to fit to; the others are held out.
    """

    def __init__(
        self,
        index: int,
        converted: BlockwiseNetwork,
        dense: BlockwiseNetwork,
        norms: dict[str, str],
        held_out: Sequence[int],
    ) -> None:
        self.block, self.norms = converted.blocks[index], norms
        self._index, self._converted, self._dense = index, converted, dense
        self.fitted = [i for i in range(len(converted.batches)) if i not in held_out]
        self.calls = converted.enter(index)
        self.expected: list[Any] = []

    def layer(self, name: str) -> Any:
        """A layer of the converted network."""
        return self._converted.modules[name]

    def dense_layer(self, name: str) -> Any:
        """The same layer of the dense network."""
        return self._dense.modules[name]

    def norm(self, name: str) -> tuple[Any, Any]:
        """The norm after a layer, in the converted and in the dense network, if there is one."""
        norm = self.norms.get(name)
        return (self.layer(norm), self.dense_layer(norm)) if norm else (None, None)

    def batches_for(self, name: str, rows: int) -> list[int]:
        """As few batches to fit to, evenly spread, as have so many positions of a layer."""
        images = max(IMAGES, rows / self.block.positions[name])
        every = sum(len(self._converted.batches[i]) for i in self.fitted) / images
        return self.fitted[:: max(1, min(int(every), len(self.fitted) // FOLDS))]

    def run(self, batches: Iterable[int], *hooks: tuple[str, Hook]) -> list[Any]:
        """The converted block's outputs for some of the batches; None where a hook raised ``Reached``."""
        return self._converted.run(self._index, [self.calls[i] for i in batches], hooks)

    def run_dense(self, observed: Sequence[tuple[str, list[int], Hook]]) -> None:
        """Runs the dense block on all batches, with hooks on layers in some of them; sets ``expected``."""
        for i, call in enumerate(self._dense.enter(self._index)):
            hooks = [(name, hook) for name, batches, hook in observed if i in batches]
            self.expected += self._dense.run(self._index, [call], hooks)

    def error(self, batches: Sequence[int], out: list[Any] | None = None) -> float:
        """Squared error of the converted block's outputs (now, unless given), over the variance of the expected.

        NaN for outputs that are not single tensors, and for a layer with a norm after it, outside of the block.
        """
        found = self.run(batches) if out is None else [out[i] for i in batches]
        pairs = list(zip(found, [self.expected[i] for i in batches], strict=True))
        if self.block.name in self.norms or not all(isinstance(x, torch.Tensor) for pair in pairs for x in pair):
            return float("nan")
        got, expected = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return float((got - expected).square().mean() / expected.var().clamp_min(1e-30))


class RowsObserver:
    """Keeps some positions of a layer's output (and input), a call each, as (images, positions, channels).

    Args:
        layer: The layer, if it is pointwise; a linear one has its channels last.
        rows: Positions of a call at most, of all its images together.
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
