"""Finds the blocks of a model around its converted layers by running it, and runs them one at a time."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers import MasterKeyConv2d
from .outputs import Output, pick_output

Hook = Callable[[nn.Module, Any, Any], Any]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Block:
    """A block with converted layers, or a pointwise layer outside of all blocks."""

    name: str
    converted: list[str] = field(default_factory=list)  # its converted layers, in their order
    pointwise: str = ""  # its last pointwise layer; empty if it has none
    positions: dict[str, int] = field(default_factory=dict)  # of each layer, in its output for one image
    done: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The outermost modules that end before the block begins, with the shape of their output for one image."""


class Reached(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass
class _Trace:
    """The order, output sizes and norms of the modules in one forward pass, by their names."""

    ran: list[str] = field(default_factory=list)  # pointwise and converted layers, in their order, once per call
    positions: dict[str, int] = field(default_factory=dict)  # as in Block
    clock: list[str] = field(default_factory=list)  # a name when a module begins, and again when it ends
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of one image's output
    norms: dict[str, str] = field(default_factory=dict)  # the norm after a layer, by the layer's name


def find_blocks(model: nn.Module, images: torch.Tensor) -> tuple[list[Block], dict[str, str]]:
    """The blocks in the order of execution, and the name of the BatchNorm, frozen or not, after each layer.

    A block is the smallest module with a converted layer and a later pointwise layer that runs at more than one
    position, unless it holds several blocks of other layers. Layers that run more than once are left out.
    """
    modules = dict(model.named_modules())
    trace = _trace(model, modules, images)
    once = [name for name in trace.ran if trace.ran.count(name) == 1]
    owners = _owning_blocks(modules, once, trace)
    blocks: dict[str, Block] = {}
    for name in once:
        owner = next((b for b in owners if name == b or _is_in(name, b)), name)
        block = blocks.setdefault(owner, Block(owner))
        block.positions[name] = trace.positions[name]
        if isinstance(modules[name], MasterKeyConv2d):
            block.converted.append(name)
        elif owner == name or trace.positions[name] > 1:
            block.pointwise = name  # the last one stays
    for block in blocks.values():
        before = trace.clock[: trace.clock.index(block.name)]
        done = [name for name in dict.fromkeys(before) if trace.clock.count(name) == before.count(name) == 2 and name]
        block.done = {name: trace.shapes[name] for name in _outermost(done) if name in trace.shapes}
    return list(blocks.values()), trace.norms


@torch.no_grad()
def _trace(model: nn.Module, modules: dict[str, nn.Module], images: torch.Tensor) -> _Trace:
    """Runs the model, and returns what its hooks recorded."""
    trace = _Trace()
    outputs: dict[int, tuple[str, torch.Tensor, int, int]] = {}  # by storage, as a norm may read a view

    def note_start(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.clock.append(name)
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            x = next(iter((*args, *kwargs.values())))
            layer, output, version, axis = outputs.get(x.untyped_storage().data_ptr(), ("", x, -1, 1))
            same_channels = x.shape[1] == output.shape[axis] and x.stride(1) == output.stride(axis)
            if x._version == version and x.numel() == output.numel() and same_channels:  # not written to since
                trace.norms[layer] = name

    def note_end(name: str, module: nn.Module, args: Any, output: Any) -> None:
        trace.clock.append(name)
        if isinstance(output, torch.Tensor):
            trace.shapes[name] = tuple(output.shape[1:])
        if (is_pointwise(module) or isinstance(module, MasterKeyConv2d)) and len(output):
            axis = -1 if isinstance(module, nn.Linear) else 1
            trace.ran.append(name)
            trace.positions[name] = output.numel() // output.shape[axis] // len(output)
            outputs[output.untyped_storage().data_ptr()] = name, output, output._version, axis  # no storage is reused

    with ExitStack() as undo:
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            undo.callback(module.register_forward_pre_hook(partial(note_start, name), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(partial(note_end, name)).remove)
        model(images.clone())
    return trace


def _owning_blocks(modules: dict[str, nn.Module], once: list[str], trace: _Trace) -> set[str]:
    """The names of the outermost blocks around the converted layers; each is called once, as not every parent is."""
    block_of: dict[str, str] = {}
    for i, layer in enumerate(once):
        if isinstance(modules[layer], MasterKeyConv2d):
            later = [name for name in once[i:] if is_pointwise(modules[name]) and trace.positions[name] > 1]
            parts = layer.split(".")
            above = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
            fitting = (
                name
                for name in above
                if not isinstance(modules[name], nn.Sequential)
                and trace.clock.count(name) == 2
                and any(_is_in(n, name) for n in later)
            )
            block_of[layer] = next(fitting, layer)
    for layer, block in block_of.items():  # the parent of several blocks is no block, whatever lies between them
        inside = {other for other in block_of.values() if _is_in(other, block) and not _is_in(layer, other)}
        if len(_outermost(inside)) > 1:
            block_of[layer] = layer
    return set(_outermost(set(block_of.values())))


def _is_in(name: str, module: str) -> bool:
    """Whether a module is inside of another, by their names."""
    return name.startswith(f"{module}.")


def _outermost(names: Collection[str]) -> list[str]:
    """The modules that are inside none of the other ones."""
    return [name for name in names if not any(_is_in(name, other) for other in names)]


class BlockwiseNetwork:
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


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer applies one matrix at every position: a linear layer or a 1x1 convolution.

    A layer whose weight is computed, as by ``weight_norm``, is none: its matrix cannot be set.
    """
    if "weight" not in module._parameters:
        return False
    if type(module) is nn.Conv2d:
        return module.kernel_size == module.stride == (1, 1) and module.groups == 1 and module.padding in (0, (0, 0))
    return isinstance(module, nn.Linear)


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
