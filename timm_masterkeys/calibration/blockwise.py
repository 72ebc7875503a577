"""Calibrates a converted network block by block, each fed with the outputs of the calibrated blocks before it."""

import time
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from .block_runner import BlockPair, BlockRunner
from .blocks import find_blocks
from .outputs import Output
from .pair import NetworkPair
from .stages import STAGES, Stage, StageReport, calibrate_block


def calibrate_blocks(
    pair: NetworkPair,
    batches: list[torch.Tensor],
    held_out: Sequence[int],
    stages: Sequence[Stage],
    time_budget: float | None,
    output: Output,
) -> tuple[tuple[StageReport, ...], torch.Tensor, torch.Tensor]:
    """Calibrates the converted network, block by block. In place.

    The batches with the indices ``held_out`` are not fitted to. After ``time_budget`` seconds the remaining blocks get
    only the stage "norms".

    Returns:
        A report of each stage; and the outputs for the held-out batches of the calibrated and of the dense network.

    Raises:
        CalibrationError: An output for any batch is not finite.
    """
    start = time.perf_counter()
    blocks, norms = find_blocks(pair.model, batches[0][:2])
    placed = {name for block in blocks for name in block.converted}
    left = {name: "runs not at all or more than once" for name in pair.layers if name not in placed}
    reports = {stage: StageReport(stage, left=dict(left)) for stage in STAGES if stage in stages}
    fitted = [i for i in range(len(batches)) if i not in held_out]
    runner, dense_runner = (BlockRunner(network, blocks, batches, output) for network in (pair.model, pair.dense))
    for index in tqdm(range(len(blocks)), desc="calibrate", unit="block", leave=False, disable=None):
        out_of_time = time_budget is not None and time.perf_counter() - start > time_budget
        block = BlockPair(index, runner, dense_runner, norms, fitted)
        runner.outputs = calibrate_block(block, reports, out_of_time)
        dense_runner.outputs = block.expected
    after, expected = (
        torch.cat([out for i, out in enumerate(network.results()) if i in held_out])
        for network in (runner, dense_runner)
    )
    return tuple(reports.values()), after, expected
