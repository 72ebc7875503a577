"""Least squares of depthwise kernels on the keys of a bank: pure tensor functions."""

import itertools
import math
from dataclasses import dataclass

import torch

from ..errors import ProjectionError
from .banks import DEFAULT_BANK, BankLike, KeyBank, get_bank

_TIE = 1e-12  # closer correlations, relative to the norm of the kernel, are a tie: the lower index wins
_DEPENDENT = 1e-6  # a key with a smaller part outside the span of the keys before it adds only rounding errors
_MOST_SUBSETS = 2000  # sets of keys, up to which all are tried: any number of 8 or 12 keys, 4 of 16
_BLOCK = 1 << 22  # numbers at a time


@dataclass(frozen=True)
class Projection:
    """Kernels as affine images of keys: ``weight[c] ~ sum_j scale[c, j] * keys[key_index[c, j]] + shift[c]``.

    Attributes:
        key_index: (C, r) int64, rows of ``bank.keys_for(kernel_size)``. Of the chosen keys the one most correlated with
            the kernel comes first, then the one most correlated with the residual, and so on.
        scale: (C, r), in the dtype of the weight. 0 for a constant kernel, and for keys that a kernel does not need.
        shift: (C,), the constant added to every tap: the mean of the kernel.
        r2: (C,) float32 in [0, 1], the share of the kernel's variance over its taps that the fit explains; 1 for a
            constant kernel.
        constant: (C,) bool, True for constant kernels, see ``constant_kernels``.
    """

    key_index: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    r2: torch.Tensor
    constant: torch.Tensor


def unfilled_projection(weight: torch.Tensor, keys_per_kernel: int) -> Projection:
    """A fit on the meta device: shapes and dtypes only."""
    pairs = weight.new_empty(len(weight), keys_per_kernel)
    return Projection(pairs.long(), pairs, pairs[:, 0], pairs[:, 0].float(), pairs[:, 0].bool())


@torch.no_grad()
def constant_kernels(weight: torch.Tensor) -> torch.Tensor:
    """(C,) bool: True for kernels (C, ...) that are constant up to float64 rounding; they have no shape and no R2.

    Zeros are constant; a kernel with NaN or Inf is not.
    """
    kernels = _in_units(weight)[0]
    centred = (kernels - kernels.mean(1, keepdim=True)).norm(dim=1)
    return centred <= kernels.shape[1] * torch.finfo(kernels.dtype).eps * kernels.norm(dim=1)


@torch.no_grad()
def project_kernels(weight: torch.Tensor, bank: BankLike = DEFAULT_BANK, keys_per_kernel: int = 1) -> Projection:
    """Projects depthwise kernels on the nearest keys by least squares.

    With keys of mean 0 and norm 1 the best ``a*x + b`` of a kernel y has ``a = <x, y>`` and ``b = mean(y)``, so the
    nearest key is the one with the largest ``|<x, y>|`` (Babaiee et al., NeurIPS 2025, section 3). With several keys
    per kernel the best of all sets of r keys is taken; so projecting a fitted kernel again changes nothing. Of more
    than 2,000 sets (8 of 16 keys have more) the one found by orthogonal matching pursuit is taken. Computed in float64,
    or in float32 on devices without float64.

    Args:
        weight: Kernels (C, 1, kh, kw), any floating dtype and device. Not changed.
        bank: Anything ``get_bank`` takes.
        keys_per_kernel: r, from 1 to the number of keys in the bank. If the bank has fewer keys at this kernel size,
            all of them are used.

    Returns:
        A Projection on the device of the weight.

    Raises:
        BankError: No such bank, or no key at this kernel size.
        ProjectionError: Not a (C, 1, kh, kw) floating tensor, NaN or Inf in it, or keys_per_kernel out of range.

    Example:
        >>> p = project_kernels(torch.randn(96, 1, 7, 7), "babaiee2025")
        >>> p.key_index.shape, p.scale.shape, p.shift.shape
        (torch.Size([96, 1]), torch.Size([96, 1]), torch.Size([96]))
    """
    bank = get_bank(bank)
    _check_kernels(weight)
    check_keys_per_kernel(keys_per_kernel, bank)
    keys = bank.keys_for((weight.shape[2], weight.shape[3]))
    steps = min(keys_per_kernel, len(keys))
    if weight.is_meta:
        return unfilled_projection(weight, steps)
    kernels, unit = _in_units(weight)
    keys = keys.to(kernels).flatten(1)
    shift, constant = kernels.mean(1), constant_kernels(weight)
    centred = kernels - shift[:, None]
    variance = centred.square().sum(1)
    negligible = kernels.shape[1] * torch.finfo(kernels.dtype).eps * variance.sqrt()
    span = torch.linalg.qr(keys.T.cpu()).Q.to(keys.device)
    inside, keys = (centred @ span).where(~constant[:, None], 0), keys @ span  # orthonormal coordinates
    few = 1 < steps < len(keys) and math.comb(len(keys), steps) <= _MOST_SUBSETS
    sets = _best_sets(inside, keys, steps) if few else None
    key_index, scale, residual = _matching_pursuit(inside, keys, sets, steps, negligible)
    r2 = (inside.square().sum(1) - residual.square().sum(1)) / variance
    return Projection(
        key_index,
        (scale * unit[:, None]).to(weight.dtype),
        (shift * unit).to(weight.dtype),
        r2.where(~constant, 1).clamp(0, 1).float(),
        constant,
    )


def _check_kernels(weight: torch.Tensor) -> None:
    if weight.ndim != 4 or weight.shape[1] != 1 or 0 in weight.shape or not weight.is_floating_point():
        raise ProjectionError(
            f"Got a {weight.dtype} weight of shape {tuple(weight.shape)}, expected floating depthwise kernels "
            "(C, 1, kh, kw)."
        )
    check_finite(weight)


def _in_units(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernels (C, taps) in float64 (or float32) divided by powers of two near their largest taps; and the powers (C,).

    Squares of the result neither overflow nor vanish, and the division is exact. A power is not finite if a tap is not.
    """
    kernels = weight.detach().flatten(1).to(torch.float32 if weight.device.type == "mps" else torch.float64)
    peak = kernels.abs().amax(1)
    unit = torch.exp2(peak.clamp_min(torch.finfo(kernels.dtype).tiny).log2().floor())
    return kernels / unit[:, None], unit


def first_not_finite(weight: torch.Tensor) -> int | None:
    """The first channel of kernels (C, ...) with NaN or Inf; None without any, and on the meta device."""
    if weight.is_meta or weight.isfinite().all():
        return None
    return int((~weight.flatten(1).isfinite().all(1)).nonzero()[0])


def check_finite(weight: torch.Tensor) -> None:
    """Raises ProjectionError if a kernel holds NaN or Inf."""
    channel = first_not_finite(weight)
    if channel is not None:
        raise ProjectionError(f"Channel {channel} of the weight holds NaN or Inf; fix the checkpoint first.")


def check_keys_per_kernel(keys_per_kernel: int, bank: KeyBank) -> None:
    """Raises ProjectionError unless ``keys_per_kernel`` is a whole number from 1 to the number of keys in the bank."""
    whole = isinstance(keys_per_kernel, int) and not isinstance(keys_per_kernel, bool)
    if not whole or not 1 <= keys_per_kernel <= len(bank):
        raise ProjectionError(
            f"keys_per_kernel is {keys_per_kernel!r}, expected a whole number from 1 to {len(bank)}, the keys in "
            f"'{bank.name}'."
        )


def _best_sets(kernels: torch.Tensor, keys: torch.Tensor, steps: int) -> torch.Tensor:
    """For each kernel the set of ``steps`` keys that explains the most of its variance, (C, K) bool.

    Of equally good sets the first in the order of indices is taken.
    """
    members = torch.tensor(list(itertools.combinations(range(len(keys)), steps)), device=keys.device)
    first, second = torch.triu_indices(kernels.shape[1], kernels.shape[1], device=keys.device)
    forms = _projectors(keys[members])[:, first, second] * (2.0 - (first == second).to(keys.dtype))
    best = []
    for part in kernels.split(max(1, _BLOCK // len(members))):
        explained = (part[:, first] * part[:, second]) @ forms.T  # the quadratic forms of all sets
        least = explained.amax(1) - _TIE * part.square().sum(1)
        best.append((explained >= least[:, None]).to(torch.uint8).argmax(1))
    none = torch.zeros(len(kernels), len(keys), dtype=torch.bool, device=kernels.device)
    return none.scatter(1, members[torch.cat(best)], True)


def _projectors(keys: torch.Tensor) -> torch.Tensor:
    """The matrices (S, n, n) that project on the spans of sets of keys (S, r, n)."""
    left, sizes, _ = torch.linalg.svd(keys.mT.cpu(), full_matrices=False)
    left = left * (sizes > _DEPENDENT).unsqueeze(1)
    return (left @ left.mT).to(keys.device)


def _matching_pursuit(
    kernels: torch.Tensor, keys: torch.Tensor, sets: torch.Tensor | None, steps: int, negligible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit of kernels (C, n) over unit keys (K, n): index, scale (C, steps), residual.

    With ``sets`` (C, K) a kernel takes keys of its own set only. Correlations with the residual below ``negligible``
    (C,) are rounding errors. A kernel that is fitted exactly before the last step takes its remaining keys, lowest
    index first, with scale 0. A key that depends on those already chosen has scale 0 too.
    """
    count, size = kernels.shape
    index = torch.zeros(count, 0, dtype=torch.long, device=kernels.device)
    needed = torch.zeros(count, 0, dtype=torch.bool, device=kernels.device)
    basis = kernels.new_zeros(count, 0, size)  # the chosen keys, orthonormal; zeros for a key that is not needed
    free = torch.ones(count, len(keys), dtype=torch.bool, device=kernels.device) if sets is None else sets.clone()
    residual, tie = kernels, _TIE * kernels.norm(dim=1, keepdim=True)
    for _ in range(steps):
        match = (residual @ keys.T).abs()
        match = match.where(match > negligible[:, None], 0).masked_fill(~free, -1)
        best = match.amax(1, keepdim=True)
        chosen = (match >= best - tie).to(torch.uint8).argmax(1, keepdim=True)
        free.scatter_(1, chosen, False)
        index = torch.cat([index, chosen], 1)
        fresh = keys[chosen].mT
        for _ in range(2):  # Gram-Schmidt; twice is enough
            fresh = fresh - basis.mT @ (basis @ fresh)
        length = fresh.norm(dim=1)
        needed = torch.cat([needed, (best > 0) & (length > _DEPENDENT)], 1)
        basis = torch.cat([basis, (fresh / length[:, :, None]).mT.where(needed[:, -1:, None], 0)], 1)
        residual = kernels - (basis.mT @ (basis @ kernels[:, :, None]))[:, :, 0]
    used = keys[index]
    triangle = (basis @ used.mT).triu() + torch.diag_embed((~needed).to(keys.dtype))
    scale = torch.linalg.solve_triangular(triangle, basis @ kernels[:, :, None], upper=True)[:, :, 0]
    residual = kernels - torch.einsum("cj,cjn->cn", scale, used)
    return index, scale, residual
