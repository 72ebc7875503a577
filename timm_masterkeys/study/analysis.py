"""Compares banks on several networks: how well their keys fit the kernels of each network, size by size.

Not imported with the package: ``from timm_masterkeys.study.analysis import compare_networks``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..conversion.report import R2_MEANS
from ..conversion.table import number, share, table
from ..errors import BankError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank, get_bank
from .kernels import CONTROL_BANK, Kernels, Source, collect_kernels, name_sources, read_kernels

DEFAULT_BANKS = DEFAULT_BANK, CONTROL_BANK


@dataclass(frozen=True)
class ComparedKernels:
    """How well one bank fits the depthwise kernels of one size of one network.

    Attributes:
        network: The network's name.
        kernel_size: (height, width).
        bank: The bank's name.
        kernels: The number of fitted kernels; the figures are of these, and NaN if there are none.
        left_out: The number of kernels left out, as they are constant or not finite.
        mean_r2: Mean R2 of the nearest key, in [0, 1].
        above_50: The share of kernels with R2 above 0.5.
        above_90: The share of kernels with R2 above 0.9.
        key_histogram: The number of kernels nearest to each key, by index in the bank.
    """

    network: str
    kernel_size: tuple[int, int]
    bank: str
    kernels: int
    left_out: int
    mean_r2: float
    above_50: float
    above_90: float
    key_histogram: tuple[int, ...]

    def cells(self) -> list[str]:
        """The cells of its row in the table."""
        size = "x".join(map(str, self.kernel_size))
        figures = number(self.mean_r2), share(self.above_50), share(self.above_90)
        histogram = " ".join(map(str, self.key_histogram))
        return [self.network, size, f"{self.kernels:,}", self.bank, *figures, histogram]


@dataclass(frozen=True)
class Comparison:
    """Rows by network, kernel size and bank; ``str()`` is a table."""

    rows: tuple[ComparedKernels, ...]

    def __str__(self) -> str:
        titles = ("network", "kernel", "kernels", "bank", "mean R2", "R2>.5", "R2>.9", "kernels by key")
        lines = [R2_MEANS, table(titles, (row.cells() for row in self.rows), "<>><>>><")]
        left_out = {(row.network, row.kernel_size): row.left_out for row in self.rows}
        if sum(left_out.values()):
            lines.append(f"left out: {sum(left_out.values()):,} kernels that are constant, or hold NaN or Inf")
        return "\n".join(lines)


def compare_networks(
    sources: Mapping[str, Source] | Sequence[Source], banks: Sequence[BankLike] = DEFAULT_BANKS
) -> Comparison:
    """Fits every depthwise kernel of the networks with its nearest key in each bank, size by size.

    Args:
        sources: Dense networks, as ``collect_kernels`` takes them: timm names, models, checkpoints, files and arrays
            of kernels. Converted models are refused. Leave out fused ones: they look dense, but fit perfectly.
        banks: Anything ``get_bank`` takes; random keys are the control.

    Raises:
        BankError: A source that is converted or has no depthwise kernels, two sources or banks of one name, no such
            bank.

    Example:
        >>> print(compare_networks({"a": timm.create_model("convnext_atto"), "b": "kernels.npz"}))
    """
    resolved = [get_bank(bank) for bank in banks]
    names = [bank.name for bank in resolved]
    if len(set(names)) < len(names):
        raise BankError(f"Two of the banks have one name: {', '.join(names)}. Save one of them under another.")
    rows = []
    bar = tqdm(name_sources(sources).items(), desc="networks", leave=False, disable=None, delay=2)
    for name, source in bar:
        layers = read_kernels(source)
        sizes = sorted({(layer.shape[1], layer.shape[2]) for layer in layers if layer.shape[1:].numel() > 1})
        if not sizes:
            raise BankError(f"'{name}' holds no depthwise kernels. Leave it out.")
        for size in sizes:
            kernels = collect_kernels({name: [layer for layer in layers if tuple(layer.shape[1:]) == size]}, size)
            rows += [_compare(name, kernels, bank) for bank in resolved]
    return Comparison(tuple(rows))


def _compare(network: str, kernels: Kernels, bank: KeyBank) -> ComparedKernels:
    """The fit of the kernels of one network by one bank."""
    r2, index = kernels.fit(bank)
    return ComparedKernels(
        network=network,
        kernel_size=kernels.kernel_size,
        bank=bank.name,
        kernels=len(kernels),
        left_out=kernels.constant + kernels.non_finite,
        mean_r2=float(r2.mean()),
        above_50=float((r2 > 0.5).double().mean()),
        above_90=float((r2 > 0.9).double().mean()),
        key_histogram=tuple(torch.bincount(index, minlength=len(bank)).tolist()),
    )
