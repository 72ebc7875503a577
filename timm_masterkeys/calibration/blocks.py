"""Finds the blocks of a model around its converted layers, by running it."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers import MasterKeyConv2d


@dataclass
class BlockLayout:
    """The name and layers of a block around converted layers, or of a pointwise layer outside of all blocks."""

    name: str
    converted: list[str] = field(default_factory=list)  # its converted layers, in their order
    pointwise: str = ""  # its last pointwise layer; empty if it has none
    positions: dict[str, int] = field(default_factory=dict)  # of each layer, in its output for one image
    done: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The outermost modules that end before the block begins, with the shape of their output for one image."""


@dataclass
class _Trace:
    """The order, output sizes and norms of the modules in one forward pass, by their names."""

    ran: list[str] = field(default_factory=list)  # pointwise and converted layers, in their order, once per call
    positions: dict[str, int] = field(default_factory=dict)  # as in BlockLayout
    clock: list[str] = field(default_factory=list)  # a name when a module begins, and again when it ends
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of one image's output
    norms: dict[str, str] = field(default_factory=dict)  # the norm after a layer, by the layer's name


def find_blocks(model: nn.Module, images: torch.Tensor) -> tuple[list[BlockLayout], dict[str, str]]:
    """The blocks' layouts in the order of execution, and the name of the BatchNorm, frozen or not, after each layer.

    A block is the smallest module with a converted layer and a later pointwise layer that runs at more than one
    position, unless it holds several blocks of other layers. Layers and norms that run more than once are left out.
    """
    modules = dict(model.named_modules())
    trace = _trace(model, modules, images)
    once = [name for name in trace.ran if trace.ran.count(name) == 1]
    owners = _owning_blocks(modules, once, trace)
    layouts: dict[str, BlockLayout] = {}
    for name in once:
        owner = next((b for b in owners if name == b or _is_in(name, b)), name)
        layout = layouts.setdefault(owner, BlockLayout(owner))
        layout.positions[name] = trace.positions[name]
        if isinstance(modules[name], MasterKeyConv2d):
            layout.converted.append(name)
        elif owner == name or trace.positions[name] > 1:
            layout.pointwise = name  # the last one stays
    for layout in layouts.values():
        before = trace.clock[: trace.clock.index(layout.name)]
        done = [name for name in dict.fromkeys(before) if trace.clock.count(name) == before.count(name) == 2 and name]
        layout.done = {name: trace.shapes[name] for name in _outermost(done) if name in trace.shapes}
    return list(layouts.values()), {name: n for name, n in trace.norms.items() if trace.clock.count(n) == 2}


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
            # The norm reads this very output: same storage, not written to since, channels on the same axis.
            same_channels = x.shape[1] == output.shape[axis] and x.stride(1) == output.stride(axis)
            if x._version == version and x.numel() == output.numel() and same_channels:
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
    owner_of: dict[str, str] = {}
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
            owner_of[layer] = next(fitting, layer)
    # A layer whose block holds two or more other blocks stands alone, and counts as a block for the layers after it.
    for layer, owner in owner_of.items():
        inside = {other for other in owner_of.values() if _is_in(other, owner) and not _is_in(layer, other)}
        if len(_outermost(inside)) > 1:
            owner_of[layer] = layer
    return set(_outermost(set(owner_of.values())))


def _is_in(name: str, module: str) -> bool:
    """Whether a module is inside of another, by their names."""
    return name.startswith(f"{module}.")


def _outermost(names: Collection[str]) -> list[str]:
    """The modules that are inside none of the other ones."""
    return [name for name in names if not any(_is_in(name, other) for other in names)]


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer applies one matrix at every position: a linear layer or a 1x1 convolution.

    A layer whose weight is computed, as by ``weight_norm``, is none: its matrix cannot be set.
    """
    if "weight" not in module._parameters:
        return False
    if type(module) is nn.Conv2d:
        return module.kernel_size == module.stride == (1, 1) and module.groups == 1 and module.padding in (0, (0, 0))
    return isinstance(module, nn.Linear)
