"""A block of two networks side by side: of the converted one, and of the dense one it came from."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .blocks import BlockwiseNetwork, Hook
from .observers import Observation, Observer

IMAGES = 64  # that a layer is fitted to at least, whatever its number of positions,
FOLDS = 4  # in so many batches at least


class BlockPair:
    """A block of both networks: what reaches it in the converted one, and what it puts out in the dense one.

    Attributes:
        block: The block.
        calls: Its arguments in the converted network, a batch each.
        expected: What it puts out in the dense network, a batch each.
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

    def observe(self, name: str, observer: Callable[[int], Observer], rows: int) -> Observation[Observer]:
        """Plans to observe a layer in as few batches, evenly spread, as have so many positions of it.

        Args:
            name: The layer.
            observer: Makes the observer, told how many positions it shall keep of a batch.
            rows: Positions of all batches together.
        """
        images = max(IMAGES, rows / self.block.positions[name])
        every = sum(len(self._converted.batches[i]) for i in self.fitted) / images
        batches = self.fitted[:: max(1, min(int(every), len(self.fitted) // FOLDS))]
        return Observation(name, observer(rows // len(batches)), batches)

    def run(self, batches: Iterable[int], *hooks: tuple[str, Hook]) -> list[Any]:
        """What the converted block puts out for some of the batches; None where a hook raised ``Reached``."""
        return self._converted.run(self._index, [self.calls[i] for i in batches], hooks)

    def run_dense(self, observations: Sequence[Observation[Any]]) -> None:
        """Finds what is expected, and lets the observers see it."""
        for i, call in enumerate(self._dense.enter(self._index)):
            hooks = [(one.name, one.observer) for one in observations if i in one.batches]
            self.expected += self._dense.run(self._index, [call], hooks)

    def error(self, batches: Sequence[int], out: list[Any] | None = None) -> float:
        """Squared error of what the converted block puts out (now, unless given), over the variance of the expected.

        NaN for outputs that are not single tensors, and for a layer whose norm, outside of the block, has its share.
        """
        found = self.run(batches) if out is None else [out[i] for i in batches]
        pairs = list(zip(found, [self.expected[i] for i in batches], strict=True))
        if self.block.name in self.norms or not all(isinstance(x, torch.Tensor) for pair in pairs for x in pair):
            return float("nan")
        got, expected = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return float((got - expected).square().mean() / expected.var().clamp_min(1e-30))
