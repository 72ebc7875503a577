"""A part of two networks side by side: a converted one and the dense one it came from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .blocks import Hook, PartwiseNetwork

IMAGES = 64  # that a layer is fitted to at least, whatever its number of positions,
FOLDS = 4  # in so many batches at least

H = TypeVar("H", bound=Hook)


@dataclass(frozen=True)
class Tap(Generic[H]):
    """A hook on a layer that sees some of the batches only.

    Attributes:
        name: The layer.
        hook: What sees its output.
        batches: Their indices.
    """

    name: str
    hook: H
    batches: list[int]


class Pair:
    """A part of both networks: what reaches it in ours, and what it puts out in the reference.

    Attributes:
        calls: Its arguments in ours, a batch each.
        wanted: What it puts out in the reference, a batch each.
        fitted: Indices of the batches to work with; the others are held out.
    """

    def __init__(
        self,
        index: int,
        ours: PartwiseNetwork,
        reference: PartwiseNetwork,
        norms: dict[str, str],
        held_out: Sequence[int],
    ) -> None:
        self.part, self.norms = ours.parts[index], norms
        self._index, self._ours, self._reference = index, ours, reference
        self.fitted = [i for i in range(len(ours.batches)) if i not in held_out]
        self.calls = ours.enter(index)
        self.wanted: list[Any] = []

    def layer(self, name: str) -> Any:
        """A layer of ours."""
        return self._ours.modules[name]

    def stock(self, name: str) -> Any:
        """The same layer of the reference."""
        return self._reference.modules[name]

    def norm(self, name: str) -> tuple[Any, Any]:
        """The norm after a layer, in ours and in the reference, if there is one."""
        norm = self.norms.get(name)
        return (self.layer(norm), self.stock(norm)) if norm else (None, None)

    def tap(self, name: str, hook: Callable[[int], H], rows: int) -> Tap[H]:
        """A tap on as few batches, evenly spread, as have so many positions of a layer; its hook is told each one's."""
        images = max(IMAGES, rows / self.part.positions[name])
        every = sum(len(self._ours.batches[i]) for i in self.fitted) / images
        batches = self.fitted[:: max(1, min(int(every), len(self.fitted) // FOLDS))]
        return Tap(name, hook(rows // len(batches)), batches)

    def run(self, batches: Iterable[int], *hooks: tuple[str, Hook]) -> list[Any]:
        """What ours puts out for some of the batches; None where a hook raised ``Reached``."""
        return self._ours.run(self._index, [self.calls[i] for i in batches], hooks)

    def run_reference(self, taps: Sequence[Tap[Any]]) -> None:
        """Finds what is wanted, seen by taps."""
        for i, call in enumerate(self._reference.enter(self._index)):
            hooks = [(tap.name, tap.hook) for tap in taps if i in tap.batches]
            self.wanted += self._reference.run(self._index, [call], hooks)

    def error(self, batches: Sequence[int], out: list[Any] | None = None) -> float:
        """Of what ours puts out (now, unless given), over the variance of what is wanted.

        NaN for outputs that are not single tensors, and for a layer whose norm, outside of the part, has its share.
        """
        found = self.run(batches) if out is None else [out[i] for i in batches]
        pairs = list(zip(found, [self.wanted[i] for i in batches], strict=True))
        if self.part.name in self.norms or not all(isinstance(x, torch.Tensor) for pair in pairs for x in pair):
            return float("nan")
        ours, theirs = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return float((ours - theirs).square().mean() / theirs.var().clamp_min(1e-30))
