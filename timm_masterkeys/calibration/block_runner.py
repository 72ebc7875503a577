"""Runs the blocks of a model one at a time, over batches of images; or a block of two models side by side."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from .blocks import BlockLayout

_logger = logging.getLogger(__name__)

Hook = Callable[[nn.Module, Any, Any], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by keyword


class Reached(Exception):
    """Ends a forward pass that has gone far enough; may carry the arguments of the module it reached."""


def stop(*arguments: Any) -> None:
    """A hook that ends the forward pass."""
    raise Reached


class BlockRunner:
    """Runs a model block by block over batches of images, each block fed by the outputs of the block before it.

    For each block in turn, ``arguments(i)`` gives its calls, ``run(i, calls)`` its outputs, and ``advance(outputs)``
    stores these for the next block. For the arguments of a block the whole model is called: the block before returns
    its stored outputs, what came earlier returns NaN at once, and a hook on the block ends the call. Where the
    arguments then differ (a connection past several blocks), nothing is skipped.
    """

    def __init__(self, model: nn.Module, layouts: list[BlockLayout], batches: list[torch.Tensor]) -> None:
        self.layouts, self.batches, self._model = layouts, batches, model
        self.modules = dict(model.named_modules())
        self._outputs: list[Any] = []

    def advance(self, outputs: list[Any]) -> None:
        """Stores the outputs of a block, batch by batch, which the next block is then fed from."""
        self._outputs = outputs

    @torch.no_grad()
    def arguments(self, index: int) -> Iterator[Call]:
        """The arguments of a block, batch by batch. A generator, as feature maps are large."""
        name = self.layouts[index].name
        fed = index > 0 and isinstance(self._outputs[0], torch.Tensor) and self._can_be_fed(index)
        for i, batch in enumerate(self.batches):
            with self._skipped(index, batch, self._outputs[i]) if fed else nullcontext():
                call = self._run_up_to(name, batch)
            yield call

    @torch.no_grad()
    def run(self, index: int, calls: Iterable[Call], hooks: Iterable[tuple[str, Hook]] = ()) -> list[Any]:
        """A block's outputs, with hooks on the named layers; None where a hook raised ``Reached``."""
        module, outputs = self.modules[self.layouts[index].name], []
        with hooked((self.modules[name], hook) for name, hook in hooks):
            for args, kwargs in calls:
                try:
                    outputs.append(module(*_copied(args), **_copied(kwargs)))
                except Reached:
                    outputs.append(None)
        return outputs

    def _can_be_fed(self, index: int) -> bool:
        """Whether a block gets the same arguments for one image if what comes before it is skipped."""
        name, image, output = self.layouts[index].name, self.batches[0][:1], self._outputs[0][:1]
        try:
            with self._skipped(index, image, output):
                call = self._run_up_to(name, image)
            torch.testing.assert_close(call, self._run_up_to(name, image), rtol=1e-4, atol=1e-5, check_dtype=False)
        except Exception:  # they differ, or the first dimension is not that of the images
            _logger.debug("The network runs as a whole up to %s, which costs time.", name, exc_info=True)
            return False
        return True

    @contextmanager
    def _skipped(self, index: int, batch: torch.Tensor, output: torch.Tensor) -> Iterator[None]:
        """Makes the block before block ``index`` return ``output`` at once, and the modules before that return NaN.

        NaN, so that a use of them shows even where the true outputs are zero.
        """
        before = self.layouts[index - 1]
        with ExitStack() as undo:
            for name, shape in before.done.items():
                undo.enter_context(_returning(self.modules[name], batch.new_full((len(batch), *shape), math.nan)))
            undo.enter_context(_returning(self.modules[before.name], output))
            yield

    def _run_up_to(self, name: str, batch: torch.Tensor) -> Call:
        """Runs the model until it calls the named block; returns the arguments of that call."""

        def reach(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise Reached(args, kwargs)

        handle = self.modules[name].register_forward_pre_hook(reach, prepend=True, with_kwargs=True)
        try:
            self._model(batch.clone())
        except Reached as reached:
            args, kwargs = reached.args
            return args, kwargs
        finally:
            handle.remove()
        raise CalibrationError(f"{type(self._model).__name__} runs {name} on some of the images only.")


class BlockPair:
    """A block of the converted and of the dense network.

    Attributes:
        layout: Its name and layers.
        norms: The norm after a layer, by the layer's name.
        fitted_batches: Indices of the batches to fit to.
        calls: Its arguments in the converted network, batch by batch.
        expected: Its outputs in the dense network, batch by batch; empty before ``run_dense``.
    """

    def __init__(
        self,
        index: int,
        runner: BlockRunner,
        dense_runner: BlockRunner,
        norms: dict[str, str],
        fitted_batches: list[int],
    ) -> None:
        self.layout, self.norms, self.fitted_batches = runner.layouts[index], norms, fitted_batches
        self.index, self.runner, self.dense_runner = index, runner, dense_runner
        self.calls = list(runner.arguments(index))
        self.expected: list[Any] = []

    def outputs(self, batches: Iterable[int], *hooks: tuple[str, Hook]) -> list[Any]:
        """The converted block's outputs for some of the batches; None where a hook raised ``Reached``."""
        return self.runner.run(self.index, [self.calls[i] for i in batches], hooks)

    def run_dense(self, observed: Sequence[tuple[str, Hook, list[int]]]) -> None:
        """Runs the dense block on all batches and sets ``expected``; a layer gets its hook in some of the batches."""
        for i, call in enumerate(self.dense_runner.arguments(self.index)):
            hooks = [(name, hook) for name, hook, batches in observed if i in batches]
            self.expected += self.dense_runner.run(self.index, [call], hooks)

    def error(self, batches: Sequence[int]) -> float:
        """The mean squared error of the converted block's outputs over the variance of the expected ones.

        NaN if the outputs are not tensors, or if a norm follows the block.
        """
        both = list(zip(self.outputs(batches), [self.expected[i] for i in batches], strict=True))
        if self.layout.name in self.norms or not all(isinstance(x, torch.Tensor) for two in both for x in two):
            return math.nan
        out, expected = (torch.cat(tensors) for tensors in zip(*both, strict=True))
        return float((out - expected).square().mean() / expected.var().clamp_min(1e-30))


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
