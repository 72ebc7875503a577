"""The order of a calibration: block by block, each fed with what the calibrated blocks before it put out."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from ..conversion.table import number
from ..layers import MasterKeyConv2d, ScaledKeyConv2d
from .block_pair import BlockPair
from .blocks import BlockwiseNetwork, find_blocks
from .observers import MomentsObserver, RowsObserver
from .outputs import Output
from .stages import absorb, match, project

Stage = Literal["projection", "statistics", "absorption"]
STAGES: tuple[Stage, ...] = get_args(Stage)

OVER = "the time budget was over"
ROWS = 100_000  # positions of all images together that a pointwise layer and a norm are fitted to,
KERNEL_ROWS = 20_000  # and a kernel


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        name: The stage.
        before: Squared error of a block's output relative to the variance of the dense one's, on held-out images,
            before the stage; the mean over the blocks it worked on (NaN if there are none).
        after: The same after it.
        changed: Names of the layers it changed: kernels, norms (by the layer before them), pointwise layers.
        left: Layers it left as they were, and why.
        seconds: Time spent.
    """

    name: str
    before: float
    after: float
    changed: tuple[str, ...]
    left: dict[str, str]
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """A row of the table in a CalibrationReport."""
        counts = str(len(self.changed)), str(len(self.left))
        return self.name, number(self.before), number(self.after), *counts, f"{self.seconds:.0f}"


@dataclass
class _Ledger:
    """What is written down of a stage on the way."""

    errors: list[tuple[float, float]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def report(self, stage: str) -> StageReport:
        errors = torch.tensor(self.errors or [(math.nan, math.nan)], dtype=torch.float64, device="cpu")
        before, after = errors.nanmean(0).tolist()
        return StageReport(stage, before, after, tuple(self.changed), self.left, self.seconds)


Steps = dict[str, dict[str, Callable[[], str]]]  # by stage and layer


class BlockwiseCalibration:
    """One way through both networks, block by block.

    Args:
        model: The converted network, which is changed.
        dense: The dense network.
        batches: Of images.
        held_out: Indices of the batches that the report's figures come from alone.
        stages: What to do in each block.
        time_budget: Seconds after which the blocks still to come get their statistics only; None for no limit.
        output: Which of what the networks put out counts, see ``pick_output``.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        batches: list[torch.Tensor],
        held_out: Sequence[int],
        stages: Sequence[Stage],
        time_budget: float | None = None,
        output: Output = None,
    ) -> None:
        self.blocks, self.norms = find_blocks(model, batches[0][:2])
        self.converted, self.dense = (BlockwiseNetwork(m, self.blocks, batches, output) for m in (model, dense))
        self.time_budget = time_budget
        self.held_out = held_out
        self._ledgers = {stage: _Ledger() for stage in STAGES if stage in stages}
        found = {name for block in self.blocks for name in block.converted}
        for name, layer in model.named_modules():
            if isinstance(layer, MasterKeyConv2d) and name not in found:
                for ledger in self._ledgers.values():
                    ledger.left[name] = "runs not at all or more than once"

    def run(self) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
        """Calibrates all blocks; then what both networks put out, a batch each, the dense one's second."""
        start = time.perf_counter()
        for index, block in enumerate(tqdm(self.blocks, desc="calibrate", unit="block", leave=False, disable=None)):
            ledgers: dict[Stage, _Ledger] = self._ledgers
            if self.time_budget is not None and time.perf_counter() - start > self.time_budget:
                for stage in ledgers.keys() - {"statistics"}:
                    names = [block.pointwise] if stage == "absorption" and block.pointwise else block.converted
                    ledgers[stage].left.update(dict.fromkeys(names, OVER))
                ledgers = {stage: ledger for stage, ledger in ledgers.items() if stage == "statistics"}
            pair = BlockPair(index, self.converted, self.dense, self.norms, self.held_out)
            self.converted.outputs = self._calibrate(pair, ledgers)
            self.dense.outputs = pair.expected
        return self.converted.finish(), self.dense.finish()

    def reports(self) -> tuple[StageReport, ...]:
        """What each stage did, in their order."""
        return tuple(ledger.report(stage) for stage, ledger in self._ledgers.items())

    def _calibrate(self, pair: BlockPair, ledgers: dict[Stage, _Ledger]) -> list[Any]:
        """All stages of a block; what the converted one puts out afterwards, a batch each."""
        steps = self._steps(pair, ledgers)
        ran, errors = [stage for stage in ledgers if steps[stage]], []
        for stage in ran:
            start, ledger = time.perf_counter(), ledgers[stage]
            errors.append(pair.error(self.held_out))
            for name, step in steps[stage].items():
                if why := step():
                    ledger.left[name] = why
                else:
                    ledger.changed.append(name)
            ledger.seconds += time.perf_counter() - start
        out = pair.run(range(len(pair.calls)))
        errors.append(pair.error(self.held_out, out))
        for stage, change in zip(ran, itertools.pairwise(errors), strict=True):
            ledgers[stage].errors.append(change)
        return out

    def _steps(self, pair: BlockPair, ledgers: dict[Stage, _Ledger]) -> Steps:
        """What there is to do in a block, after the dense one ran under all the observers that it takes."""
        block = pair.block
        matched = block.converted if "statistics" in ledgers else []
        moments = {name: pair.observe(name, lambda _: MomentsObserver(), ROWS) for name in matched}
        kernels = {
            name: pair.observe(name, partial(RowsObserver, None), KERNEL_ROWS)
            for name in block.converted
            if "projection" in ledgers and not isinstance(pair.layer(name), ScaledKeyConv2d)
        }
        ends = [block.pointwise] if block.pointwise and "absorption" in ledgers else []
        rows = {name: pair.observe(name, partial(RowsObserver, pair.layer(name)), ROWS) for name in ends}
        pair.run_dense([*moments.values(), *kernels.values(), *rows.values()])
        return {
            "projection": {name: partial(project, pair, one) for name, one in kernels.items()},
            "statistics": {name: partial(match, pair, one) for name, one in moments.items()},
            "absorption": {name: partial(absorb, pair, one) for name, one in rows.items()},
        }
