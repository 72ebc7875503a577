"""Networks and banks side by side: do a bank's keys meet the kernels of every network, at every size?

Not imported with the package: ``from timm_masterkeys.study.analysis import compare_networks``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..errors import BankError
from ..keys.banks import DEFAULT_BANK, Bank, get_bank
from .kernels import Source, collect_kernels, name_sources, read_kernels


@dataclass(frozen=True)
class ComparedKernels:
    """How one bank meets the depthwise kernels of one size of one network.

    Attributes:
        network: Its name.
        kernel_size: (height, width).
        bank: The bank's name.
        kernels: With a shape; the numbers are of these, and NaN if there is none.
        left_out: Kernels that are constant or not finite.
        mean_r2: Mean R^2 of the nearest key, in [0, 1].
        above_50: Share with R^2 above 0.5.
        above_90: Share with R^2 above 0.9.
        key_histogram: How many kernels are nearest to each key, by index in the bank.
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


@dataclass(frozen=True)
class Comparison:
    """Rows by network, kernel size and bank; ``str()`` is a table."""

    rows: tuple[ComparedKernels, ...]

    def overlap(self, first: str, second: str, kernel_size: tuple[int, int], bank: str = DEFAULT_BANK) -> float:
        """How alike two networks use the keys at a size: 1 if in the same shares, 0 if they have no key in common.

        Raises:
            BankError: One of them has no such row.
        """
        histograms = {r.network: r.key_histogram for r in self.rows if (r.kernel_size, r.bank) == (kernel_size, bank)}
        for name in (first, second):
            if name not in histograms:
                raise BankError(f"'{name}' has no kernels of {kernel_size} compared with bank '{bank}'.")
        counts = torch.tensor([histograms[first], histograms[second]], dtype=torch.float64, device="cpu")
        return float((counts / counts.sum(1, keepdim=True).clamp_min(1)).amin(0).sum())

    def __str__(self) -> str:
        width = max(len(row.network) for row in self.rows)
        bank = max(len(row.bank) for row in self.rows)
        lines = [f"{'network':<{width}}  kernel  kernels  {'bank':<{bank}}  mean R2  R2>.5  R2>.9  kernels by key"]
        for row in self.rows:
            lines.append(
                f"{row.network:<{width}}  {'x'.join(map(str, row.kernel_size)):>6}  {row.kernels:>7,}  "
                f"{row.bank:<{bank}}  {row.mean_r2:>7.3f}  {row.above_50:>5.0%}  {row.above_90:>5.0%}  "
                + " ".join(str(count) for count in row.key_histogram)
            )
        left_out = {(row.network, row.kernel_size): row.left_out for row in self.rows}
        if sum(left_out.values()):
            lines.append(f"left out: {sum(left_out.values()):,} kernels that are constant, or hold NaN or Inf")
        names = list(dict.fromkeys(row.network for row in self.rows))
        if len(names) == 2:
            common = {row.kernel_size for row in self.rows if row.network == names[0]}
            common &= {row.kernel_size for row in self.rows if row.network == names[1]}
            for size in sorted(common):
                share = self.overlap(names[0], names[1], size, self.rows[0].bank)
                lines.append(f"{size[0]}x{size[1]}: the two use the keys of {self.rows[0].bank} {share:.0%} alike")
        return "\n".join(lines)


def compare_networks(
    sources: Mapping[str, Source] | Sequence[Source], banks: Sequence[Bank] = (DEFAULT_BANK, "random8:0")
) -> Comparison:
    """Fits every depthwise kernel of some networks with the nearest key of some banks, size by size.

    Args:
        sources: As ``collect_kernels`` takes them: timm names, models, checkpoints, files and arrays of kernels.
        banks: Anything ``get_bank`` takes; random keys are the control.

    Raises:
        BankError: A source without depthwise kernels, two sources or banks of one name, no such bank.

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
            for bank in resolved:
                r2, index = kernels.fit(bank)
                rows.append(
                    ComparedKernels(
                        name,
                        size,
                        bank.name,
                        len(kernels),
                        kernels.constant + kernels.non_finite,
                        float(r2.mean()),
                        float((r2 > 0.5).double().mean()),
                        float((r2 > 0.9).double().mean()),
                        tuple(torch.bincount(index, minlength=len(bank)).tolist()),
                    )
                )
    return Comparison(tuple(rows))
