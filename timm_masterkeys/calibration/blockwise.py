"""Calibrates a converted network block by block, each fed with the outputs of the calibrated blocks before it."""

import time
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from .block_runner import BlockPair, BlockRunner
from .blocks import find_blocks
from .pair import NetworkPair
from .stages import STAGES, Stage, StageReport, calibrate_block


def calibrate_blocks(
    networks: NetworkPair,
    batches: list[torch.Tensor],
    held_out_batches: Sequence[int],
    stages: Sequence[Stage],
    time_budget: float | None,
) -> tuple[StageReport, ...]:
    """Calibrates the converted network, block by block. In place. Returns a report of each stage.

    The batches with the indices ``held_out_batches`` are not fitted to. After ``time_budget`` seconds the remaining
    blocks get only the stage "norms".
    """
    start = time.perf_counter()
    layouts, norms = find_blocks(networks.model, batches[0][:2])
    placed = {name for layout in layouts for name in layout.converted}
    left = {name: "runs not at all or more than once" for name in networks.layers if name not in placed}
    reports = {stage: StageReport(stage) for stage in STAGES if stage in stages}
    for stage in reports.keys() - {"pointwise"}:
        reports[stage].left.update(left)
    fitted_batches = [i for i in range(len(batches)) if i not in held_out_batches]
    runner, dense_runner = (BlockRunner(model, layouts, batches) for model in (networks.model, networks.dense))
    for index in tqdm(range(len(layouts)), desc="calibrate", unit="block", leave=False, disable=None):
        out_of_time = time_budget is not None and time.perf_counter() - start > time_budget
        block = BlockPair(index, runner, dense_runner, norms, fitted_batches)
        runner.advance(calibrate_block(block, reports, out_of_time))
        dense_runner.advance(block.expected)
    return tuple(reports.values())
