"""The order of a repair: block by block, each fed with what the repaired blocks before it put out."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layers import MasterKeyConv2d, ScaledKeyConv2d
from .blocks import PartwiseNetwork, find_parts
from .gather import Moments, Rows
from .pair import Pair
from .stages import absorb, heal, match, project

OVER = "the time budget was over"
HELD_OUT = 5  # every fifth batch gives the report's figures: nothing is fitted to it or chosen by it
ROWS = 100_000  # positions of all images together that a pointwise layer and a norm are fitted to,
KERNEL_ROWS = 20_000  # and a kernel


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        name: The stage.
        before: Squared error of a block's output relative to the variance of the reference's, on held-out images,
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

    def __str__(self) -> str:
        return (
            f"{self.name:<10}  {self.before:>12.3f}  {self.after:>11.3f}  {len(self.changed):>7}  {len(self.left):>4}  "
            f"{self.seconds:>7.0f}"
        )


@dataclass
class Ledger:
    """What is written down of a stage during the walk."""

    errors: list[tuple[float, float]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def report(self, stage: str) -> StageReport:
        """What the stage has done."""
        errors = torch.tensor(self.errors or [(math.nan, math.nan)], dtype=torch.float64, device="cpu")
        before, after = errors.nanmean(0).tolist()
        return StageReport(stage, before, after, tuple(self.changed), self.left, self.seconds)


class Walk:
    """One way through both networks, block by block.

    Attributes:
        held_out: Indices of the batches that only the report's figures come from.
        ledgers: What each stage did.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        batches: list[torch.Tensor],
        stages: tuple[str, ...],
        heal_minutes: float,
        time_budget: float | None,
    ) -> None:
        self.parts, self.norms = find_parts(model, batches[0][:2])
        self.ours, self.reference = (PartwiseNetwork(m, self.parts, batches) for m in (model, reference))
        self.time_budget = time_budget
        self.ledgers = {stage: Ledger() for stage in stages}
        self.held_out = [i for i in range(len(batches)) if i % HELD_OUT == HELD_OUT - 1]
        self.heal_seconds = 60 * heal_minutes / max(1, sum(bool(part.converted) for part in self.parts))
        found = {name for part in self.parts for name in part.converted}
        for name, layer in model.named_modules():
            if isinstance(layer, MasterKeyConv2d) and name not in found:
                for ledger in self.ledgers.values():
                    ledger.left[name] = "runs not at all or more than once"

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What both networks put out for all images, after the repair."""
        start = time.perf_counter()
        for index, part in enumerate(tqdm(self.parts, desc="calibrate", unit="block", leave=False, disable=None)):
            ledgers = self.ledgers
            if self.time_budget is not None and self._seconds(start) > self.time_budget:
                for stage in ledgers.keys() - {"statistics"}:
                    names = [part.pointwise] if stage == "absorption" and part.pointwise else part.converted
                    ledgers[stage].left.update(dict.fromkeys(names, OVER))
                ledgers = {stage: ledger for stage, ledger in ledgers.items() if stage == "statistics"}
            pair = Pair(index, self.ours, self.reference, self.norms, self.held_out)
            self.ours.outputs = self._repair(pair, ledgers)
            self.reference.outputs = pair.wanted
        return self.ours.finish(), self.reference.finish()

    def _seconds(self, start: float) -> float:
        """Since the start, healing apart."""
        healing = self.ledgers.get("healing", Ledger()).seconds
        return time.perf_counter() - start - healing

    def _repair(self, pair: Pair, ledgers: dict[str, Ledger]) -> list[Any]:
        """All stages of a block; what ours puts out afterwards, a batch each."""
        part = pair.part
        matched = part.converted if "statistics" in ledgers else []
        moments = {name: pair.tap(name, lambda _: Moments(), ROWS) for name in matched}
        kernels = {
            name: pair.tap(name, partial(Rows, None), KERNEL_ROWS)
            for name in part.converted
            if "projection" in ledgers and not isinstance(pair.layer(name), ScaledKeyConv2d)
        }
        ends = [part.pointwise] if part.pointwise and "absorption" in ledgers else []
        targets = {name: pair.tap(name, partial(Rows, pair.layer(name)), ROWS) for name in ends}
        pair.run_reference([*moments.values(), *kernels.values(), *targets.values()])
        steps: dict[str, dict[str, Callable[[], str]]] = {
            "projection": {name: partial(project, pair, tap) for name, tap in kernels.items()},
            "statistics": {name: partial(match, pair, tap) for name, tap in moments.items()},
            "absorption": {name: partial(absorb, pair, tap) for name, tap in targets.items()},
            "healing": {},
        }
        if part.converted and "healing" in ledgers:
            steps["healing"][part.name] = partial(heal, pair, self.heal_seconds)

        ran, errors = [stage for stage in steps if steps[stage]], []
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
