"""Runs the blocks of a model one at a time, over batches of images."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks import Block
from .outputs import Output, pick_output

Hook = Callable[[nn.Module, Any, Any], Any]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Reached(Exception):
    """Ends a forward pass that has gone far enough."""


class BlockRunner:
    """Runs a model block by block over batches of images, each block fed by the outputs of the block before it.

    The model runs up to a block, and everything before the block is skipped. Where the arguments then differ (a
    connection past several blocks), nothing is skipped. The caller sets ``outputs`` to those of the last block that
    ran, batch by batch.
    """

    def __init__(
        self, model: nn.Module, blocks: list[Block], batches: list[torch.Tensor], output: Output = None
    ) -> None:
        self.blocks, self.batches, self._model, self._output = blocks, batches, model, output
        self.modules = dict(model.named_modules())
        self.outputs: list[Any] = []

    def resume(self, index: int) -> Iterator[Any]:
        """The arguments of a block, or past the last block the model's output, batch by batch.

        A generator, as feature maps are large.
        """
        sample = self.batches[0][:1]
        skipping = index > 0 and isinstance(self.outputs[0], torch.Tensor)
        if skipping:
            try:
                calls = (self._forward(index, sample, out) for out in (self.outputs[0][:1], None))
                torch.testing.assert_close(*calls, rtol=1e-4, atol=1e-5, check_dtype=False)
            except Exception:  # they differ, or the first dimension is not that of the images
                skipping = False
        outputs = self.outputs if skipping else [None] * len(self.batches)
        return (self._forward(index, batch, out) for batch, out in zip(self.batches, outputs, strict=True))

    @torch.no_grad()
    def run(self, index: int, calls: Calls, hooks: Iterable[tuple[str, Hook]] = ()) -> list[Any]:
        """A block's outputs, with hooks on the named layers; None where a hook raised ``Reached``."""
        module, outputs = self.modules[self.blocks[index].name], []
        with hooked((self.modules[name], hook) for name, hook in hooks):
            for args, kwargs in calls:
                try:
                    outputs.append(module(*_copied(args), **_copied(kwargs)))
                except Reached:
                    outputs.append(None)
        return outputs

    @torch.no_grad()
    def _forward(self, index: int, batch: torch.Tensor, output: torch.Tensor | None) -> Any:
        """The arguments of block ``index``, or past the last block the model's output."""
        reached: list[Any] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            reached.append((args, kwargs))
            raise Reached

        skipped: dict[str, torch.Tensor] = {}
        if output is not None:
            before = self.blocks[index - 1]
            # NaN, so that a use of them shows even where the true outputs are zero
            skipped = {name: batch.new_full((len(batch), *shape), math.nan) for name, shape in before.done.items()}
            skipped[before.name] = output
        with ExitStack() as undo:
            if index < len(self.blocks):
                module = self.modules[self.blocks[index].name]
                undo.callback(module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True).remove)
            for name, out in skipped.items():
                undo.enter_context(_returning(self.modules[name], out))
            try:
                return pick_output(self._model, self._model(batch.clone()), self._output)  # it may change its images
            except Reached:
                return reached[0]


def _copied(value: Any) -> Any:
    """Arguments with copies of their tensors, as some blocks change them."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else value


@contextmanager
def _returning(module: nn.Module, out: torch.Tensor) -> Iterator[None]:
    """Makes a module return a copy of ``out`` instead of running; a copy, as later layers may work in place."""
    replaced_forward = module.__dict__.get("forward")
    try:
        module.forward = lambda *args, **kwargs: out.clone()
        yield
    finally:
        module.__dict__.pop("forward", None)
        if replaced_forward is not None:
            module.forward = replaced_forward


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Registers forward hooks until the context ends; their arguments include those given by keyword."""

    def call(hook: Hook, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return hook(module, (*args, *kwargs.values()), output)

    with ExitStack() as undo:
        for module, hook in hooks:
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            undo.callback(module.register_forward_hook(partial(call, hook), with_kwargs=True).remove)
        yield
