"""The order of a calibration: block by block, each fed with the outputs of the calibrated blocks before it."""

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
from .block_pair import BlockPair, MomentsObserver, RowsObserver
from .blocks import BlockwiseNetwork, Hook, find_blocks
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
    """What a stage did so far."""

    errors: list[tuple[float, float]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def report(self, stage: str) -> StageReport:
        errors = torch.tensor(self.errors or [(math.nan, math.nan)], dtype=torch.float64, device="cpu")
        before, after = errors.nanmean(0).tolist()
        return StageReport(stage, before, after, tuple(self.changed), self.left, self.seconds)


Ledgers = dict[Stage, _Ledger]
Outputs = Iterator[torch.Tensor]


def calibrate_blocks(
    model: nn.Module,
    dense: nn.Module,
    batches: list[torch.Tensor],
    held_out: Sequence[int],
    stages: Sequence[Stage],
    time_budget: float | None,
    output: Output,
) -> tuple[tuple[StageReport, ...], Outputs, Outputs]:
    """Calibrates the converted network, block by block. In place.

    The batches with the indices ``held_out`` are not fitted to, but give the reports' errors. After ``time_budget``
    seconds the blocks still to come get their statistics only.

    Returns:
        What each stage did; and the outputs of the converted and of the dense network, a batch each.
    """
    start = time.perf_counter()
    blocks, norms = find_blocks(model, batches[0][:2])
    converted, reference = (BlockwiseNetwork(network, blocks, batches, output) for network in (model, dense))
    ledgers: Ledgers = {stage: _Ledger() for stage in STAGES if stage in stages}
    found = {name for block in blocks for name in block.converted}
    unplaced = [n for n, m in model.named_modules() if isinstance(m, MasterKeyConv2d) and n not in found]
    for ledger in ledgers.values():
        ledger.left.update(dict.fromkeys(unplaced, "runs not at all or more than once"))
    for index, block in enumerate(tqdm(blocks, desc="calibrate", unit="block", leave=False, disable=None)):
        current = ledgers
        if time_budget is not None and time.perf_counter() - start > time_budget:
            for stage in ledgers.keys() - {"statistics"}:
                names = [block.pointwise] if stage == "absorption" and block.pointwise else block.converted
                ledgers[stage].left.update(dict.fromkeys(names, OVER))
            current = {stage: ledger for stage, ledger in ledgers.items() if stage == "statistics"}
        pair = BlockPair(index, converted, reference, norms, held_out)
        converted.outputs = _calibrate_block(pair, current, held_out)
        reference.outputs = pair.expected
    reports = tuple(ledger.report(stage) for stage, ledger in ledgers.items())
    return reports, converted.finish(), reference.finish()


def _calibrate_block(pair: BlockPair, ledgers: Ledgers, held_out: Sequence[int]) -> list[Any]:
    """All stages of a block; returns the outputs of the converted one afterwards, a batch each."""
    steps = _steps(pair, ledgers)
    ran, errors = [stage for stage in ledgers if steps[stage]], []
    for stage in ran:
        start, ledger = time.perf_counter(), ledgers[stage]
        errors.append(pair.error(held_out))
        for name, step in steps[stage].items():
            if why := step():
                ledger.left[name] = why
            else:
                ledger.changed.append(name)
        ledger.seconds += time.perf_counter() - start
    out = pair.run(range(len(pair.calls)))
    errors.append(pair.error(held_out, out))
    for stage, change in zip(ran, itertools.pairwise(errors), strict=True):
        ledgers[stage].errors.append(change)
    return out


def _steps(pair: BlockPair, ledgers: Ledgers) -> dict[Stage, dict[str, Callable[[], str]]]:
    """What is to be done in a block, by stage and layer, after the dense block ran under the observers for it."""
    steps: dict[Stage, dict[str, Callable[[], str]]] = {stage: {} for stage in STAGES}
    observed: list[tuple[str, list[int], Hook]] = []
    for name in pair.block.converted:
        if "statistics" in ledgers:
            batches, moments = pair.batches_for(name, ROWS), MomentsObserver()
            observed.append((name, batches, moments))
            steps["statistics"][name] = partial(match, pair, name, batches, moments)
        if "projection" in ledgers and not isinstance(pair.layer(name), ScaledKeyConv2d):
            batches = pair.batches_for(name, KERNEL_ROWS)
            rows = RowsObserver(None, KERNEL_ROWS // len(batches))
            observed.append((name, batches, rows))
            steps["projection"][name] = partial(project, pair, name, batches, rows)
    if (name := pair.block.pointwise) and "absorption" in ledgers:
        batches = pair.batches_for(name, ROWS)
        rows = RowsObserver(pair.layer(name), ROWS // len(batches))
        observed.append((name, batches, rows))
        steps["absorption"][name] = partial(absorb, pair, name, batches, rows)
    pair.run_dense(observed)
    return steps
