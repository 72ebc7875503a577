"""The unsupervised search for a bank of keys, by which the master keys were found, on any networks.

Not imported with the package: ``from timm_masterkeys.study.discovery import collect_kernels, discover_bank``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..conversion.table import number, table
from ..errors import BankError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank, get_bank
from .kernels import CONTROL_BANK, Kernels, collect_kernels

__all__ = [
    "Discovery",
    "Kernels",
    "collect_kernels",
    "discover_bank",
    "eliminate",
    "find_elbow",
    "fit_lines",
    "match_banks",
]

Found = tuple[dict[int, torch.Tensor], dict[int, float]]  # keys (count, taps) and their mean R2, by count

CODES = 50  # candidates along the autoencoder's code
LOCAL = 10  # candidates around which the second round samples
STEPS = 3000  # of training
BATCH = 512
STARTS = 4  # random starts of ``fit_lines``
FEWEST = 32  # kernels to search
MOST = 25  # keys on the curve


@dataclass(frozen=True)
class Discovery:
    """A discovered bank; ``str()`` says how well it fits.

    Attributes:
        bank: The keys, most used first; its source names the search and the networks.
        curve: Mean R2 by number of keys, on the searched kernels, in the last round of elimination.
        elbow: The number of keys at which the curve bends most.
        r2: Mean R2 of the nearest key, on the held-out kernels (without any, on the searched ones), by bank: this bank;
            as many lines fitted directly to the searched kernels; the published keys; random keys; and the ceiling, as
            many lines fitted to the held-out kernels themselves.
        searched: The number of searched kernels.
        held_out: The number of held-out kernels.
        constant: The number of kernels left out as constant.
        non_finite: The number of kernels left out as they hold NaN or Inf.
    """

    bank: KeyBank
    curve: dict[int, float]
    elbow: int
    r2: dict[str, float]
    searched: int
    held_out: int
    constant: int
    non_finite: int

    def __str__(self) -> str:
        lines = [f"{len(self.bank)} keys from {self.searched:,} kernels; the curve of R2 bends at {self.elbow}"]
        if self.constant or self.non_finite:
            lines.append(f"left out: {self.constant:,} constant kernels, {self.non_finite:,} with NaN or Inf")
        measured = f"{self.held_out:,} kernels held out" if self.held_out else "the same kernels"
        lines += ["", f"on {measured}, the share of a kernel's variance that its nearest key explains:"]
        lines += [table(("fitted by", "mean R2"), [(name, number(value)) for name, value in self.r2.items()]), ""]
        shown = sorted(count for count in self.curve if count <= max(2 * self.elbow, len(self.bank)))
        curve = ["mean R2", *(number(self.curve[count]) for count in shown)]
        return "\n".join([*lines, table(("keys", *map(str, shown)), [curve])])


def discover_bank(
    kernels: Kernels,
    *,
    keys: int | None = None,
    held_out: str | Sequence[str] = (),
    equal_networks: bool = True,
    method: Literal["autoencoder", "lines"] = "autoencoder",
    seed: int = 0,
    name: str = "discovered",
    device: str | torch.device = "cpu",
) -> Discovery:
    """Searches a bank of keys that fit kernels as ``a*x + b``; a kernel and its negative count as one.

    ``"autoencoder"`` is the paper's search (Babaiee et al., NeurIPS 2025, section 3). An autoencoder whose code is one
    number is trained with a cosine loss. Of 50 candidates along the code, the one whose removal costs the least mean
    R2 is removed, again and again; then the same is done with candidates sampled finely around the last ten.
    ``"lines"`` fits lines through the origin directly (``fit_lines``): close to the best fit of that many keys.

    Args:
        kernels: From ``collect_kernels``.
        keys: The number of keys, 1 to 25; None takes the elbow of the curve of 1 to 25 keys (``find_elbow``).
        held_out: Network(s) to hold out of the search, and to measure on.
        equal_networks: Whether every network has the same weight; else every kernel has.
        method: "autoencoder" or "lines", see above.
        seed: Of the training and the starts; the same seed gives the same bank on the same device.
        name: Of the bank. At smaller kernel sizes it is cropped: cropped keys fit real kernels better than folded ones.
        device: Where the search computes; kernels and bank stay on the CPU.

    Raises:
        BankError: An unknown network or method, too few kernels, keys out of range, or a device without float64.

    Example:
        >>> found = discover_bank(kernels, held_out=["b"])
        >>> found.bank.save("mine.safetensors")
        >>> convert_to_masterkeys(model, bank="mine.safetensors")
    """
    names = (held_out,) if isinstance(held_out, str) else tuple(held_out)
    _check_search(keys, method, device)
    searched, held_out_kernels = (part.to(device) for part in _split(kernels, names))
    weights = searched.weights(equal_networks)
    search = _search_lines if method == "lines" else _search_autoencoder
    with torch.autocast(searched.values.device.type, enabled=False):
        sets, curve = search(searched, weights, seed)
    elbow = find_elbow({count: value for count, value in curve.items() if count <= MOST})
    best = sets[keys or elbow]
    key_weights = _by_group(weights, searched.fit_keys(best)[1], len(best)).sum(0)
    best = best[key_weights.argsort(descending=True, stable=True)]
    lines = best if method == "lines" else fit_lines(searched.values, weights, len(best), seed)
    settings = f"{method}, seed {seed}, all {'networks' if equal_networks else 'kernels'} count the same"
    networks = ", ".join(network for network in kernels.names if network not in names)
    source = f"discovered ({settings}) in {len(searched):,} kernels of {networks}"
    source += f"; held out: {', '.join(names)}" if names else ""
    bank = KeyBank(name, best.cpu().unflatten(1, kernels.kernel_size).numpy(), source, resize="crop")
    r2 = _measure(best, lines, searched, held_out_kernels, equal_networks, seed)
    return Discovery(bank, curve, elbow, r2, len(searched), len(held_out_kernels), kernels.constant, kernels.non_finite)


def _check_search(keys: int | None, method: str, device: str | torch.device) -> None:
    if keys is not None and not 1 <= keys <= MOST:
        raise BankError(f"keys is {keys}, expected 1 to {MOST}.")
    if method not in ("autoencoder", "lines"):
        raise BankError(f"method is '{method}', expected 'autoencoder' or 'lines'.")
    if torch.device(device).type in ("meta", "mps"):
        raise BankError(f"device is '{device}'; the search takes float64, on CPU or CUDA.")


def _split(kernels: Kernels, held_out: tuple[str, ...]) -> tuple[Kernels, Kernels]:
    """The kernels to search and the held-out ones; raises BankError if there are too few."""
    for name in held_out:
        if name not in kernels.names:
            raise BankError(f"There is no network '{name}' to hold out; there are {', '.join(kernels.names)}.")
    out = torch.tensor([name in held_out for name in kernels.names], device="cpu")[kernels.network]
    searched, held_out_kernels = (
        replace(kernels, values=kernels.values[part], network=kernels.network[part]) for part in (~out, out)
    )
    if held_out and not len(held_out_kernels):
        raise BankError(f"All kernels of {', '.join(held_out)} are constant: nothing is held out.")
    if len(searched) < FEWEST:
        raise BankError(f"{len(searched)} kernels that are not constant are left to search, expected {FEWEST} or more.")
    return searched, held_out_kernels


def _measure(
    best: torch.Tensor, lines: torch.Tensor, searched: Kernels, held_out: Kernels, equal_networks: bool, seed: int
) -> dict[str, float]:
    """Mean R2 by bank, as in ``Discovery.r2``."""
    measured = held_out if len(held_out) else searched
    weights = measured.weights(equal_networks)
    published, random = (
        get_bank(bank).keys_for(measured.kernel_size).flatten(1) for bank in (DEFAULT_BANK, CONTROL_BANK)
    )
    banks = {"this bank": best, "lines fitted directly": lines, "published keys": published, "random keys": random}
    if len(held_out):
        banks["ceiling"] = fit_lines(measured.values, weights, len(best), seed)
    return {title: float(weights @ measured.fit_keys(keys.to(best))[0]) for title, keys in banks.items()}


def _search_lines(kernels: Kernels, weights: torch.Tensor, seed: int) -> Found:
    """Lines fitted for every number of keys, and their mean R2."""
    counts = tqdm(range(1, MOST + 1), desc="lines", leave=False, disable=None, delay=2)
    sets = {count: fit_lines(kernels.values, weights, count, seed) for count in counts}
    return sets, {count: float(weights @ kernels.fit_keys(lines)[0]) for count, lines in sets.items()}


def _search_autoencoder(kernels: Kernels, weights: torch.Tensor, seed: int) -> Found:
    """The keys left by elimination along the code, then around the last ten; and their mean R2."""
    decode = _train_autoencoder(kernels.values, weights, seed)
    codes = torch.linspace(0, 1, CODES, dtype=torch.float64, device=weights.device)
    order, _ = eliminate(kernels.values, weights, decode(codes))
    near = torch.linspace(-0.5, 0.5, CODES // LOCAL + 1, dtype=torch.float64, device=weights.device) / (CODES - 1)
    candidates = decode((codes[order[-LOCAL:], None] + near).flatten().clamp(0, 1).unique())
    order, curve = eliminate(kernels.values, weights, candidates)
    return {count: candidates[order[-count:]] for count in curve}, curve


@torch.no_grad()
def eliminate(
    kernels: torch.Tensor, weights: torch.Tensor, candidates: torch.Tensor
) -> tuple[list[int], dict[int, float]]:
    """Removes candidates (K, taps) one by one, each time the one that costs the least R2 (backward elimination).

    Returns the indices of the candidates in the order of removal (the last one is never removed); and the weighted mean
    R2 of the kernels (N, taps) by the number of candidates left.
    """
    left, removed = list(range(len(candidates))), []
    fits = (kernels @ candidates.T).square()
    curve = {len(left): float(weights @ fits.amax(1))}
    for count in tqdm(range(len(left) - 1, 0, -1), desc="eliminate", leave=False, disable=None, delay=2):
        best = fits[:, left].topk(2, 1)  # without its nearest candidate a kernel takes the second nearest
        lost = weights * (best.values[:, 0] - best.values[:, 1])
        means = (curve[count + 1] - _by_group(lost, best.indices[:, 0], len(left)).sum(0)).tolist()
        curve[count] = max(means)
        removed.append(left.pop(means.index(curve[count])))
    return [*removed, *left], curve


def find_elbow(curve: Mapping[int, float]) -> int:
    """The number of keys at which a curve lies farthest above the straight line between its ends."""
    counts = sorted(curve)
    low, high = counts[0], counts[-1]
    slope = (curve[high] - curve[low]) / max(1, high - low)
    return max(counts, key=lambda count: curve[count] - curve[low] - slope * (count - low))


@torch.no_grad()
def fit_lines(kernels: torch.Tensor, weights: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Fits lines through the origin to kernels, by directions (count, taps) of mean 0 and norm 1.

    Every kernel is assigned to the line it correlates with most, sign apart; every line takes a step of the power
    iteration towards the principal direction of its kernels; both are repeated, and neither lowers the mean R2. The
    best of four random starts is returned. In a start each line begins at a kernel that the earlier ones fit badly.

    Args:
        kernels: (N, taps), mean 0 and norm 1.
        weights: (N,), with sum 1.
        count: The number of lines; at most N are returned.
        seed: Of the starts.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = (_start(kernels, weights, count, generator) for _ in range(STARTS))
    return max((_improve(lines, kernels, weights) for lines in starts), key=lambda fit: fit[1])[0]


def _start(kernels: torch.Tensor, weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random kernels: the worse the earlier ones fit a kernel, the likelier it is chosen."""
    lines = kernels[_sample(weights, 1, generator=generator)]
    while len(lines) < min(count, len(kernels)):
        error = weights * (1 - (kernels @ lines.T).square().amax(1)).clamp_min(1e-12)
        lines = torch.cat([lines, kernels[_sample(error, 1, generator=generator)]])
    return lines


def _improve(lines: torch.Tensor, kernels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The lines after all steps that raise their mean R2, and this R2."""
    before = r2 = -1.0
    for _ in range(1000):
        projected = kernels @ lines.T
        nearest = projected.abs().argmax(1)
        responses = projected.gather(1, nearest[:, None])[:, 0]
        r2 = float(weights @ responses.square())
        if r2 < before + 1e-7:
            break
        before = r2
        step = _by_group(weights * responses, nearest, len(lines)).T @ kernels
        norm = step.norm(dim=1, keepdim=True)
        lines = torch.where(norm > 0, step / norm.clamp_min(1e-30), lines)
    return lines, r2


def _sample(
    weights: torch.Tensor, count: int, replacement: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random indices with these weights, from the CPU's generator, so that they are the same on every device."""
    return torch.multinomial(weights.cpu(), count, replacement, generator=generator).to(weights.device)


def _by_group(values: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """Each value (N,) in the column of its group, (N, count), so that sums are deterministic on GPUs too."""
    return values.new_zeros(len(values), count).scatter_(1, group[:, None], values[:, None])


def match_banks(bank: BankLike, other: BankLike, kernel_size: tuple[int, int] = (7, 7)) -> list[tuple[int, int, float]]:
    """Pairs the keys of two banks: (index, index in the other bank, absolute correlation), best first.

    The pairs have the largest sum of absolute correlations; every key is in one pair at most.

    Raises:
        BankError: No such bank, or no key at this size.
        ImportError: scipy is missing.

    Example:
        >>> match_banks("babaiee2025", "scale-space-b")[0]
        (7, 7, 0.9974...)
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Matching two banks needs scipy: pip install scipy") from error
    first, second = get_bank(bank), get_bank(other)
    keys, other_keys = (b.keys_for(kernel_size).flatten(1).double() for b in (first, second))
    correlation = (keys @ other_keys.T).abs().numpy()
    kept, other_kept = first.kept(kernel_size), second.kept(kernel_size)
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    pairs = [(kept[i], other_kept[j], float(correlation[i, j])) for i, j in zip(rows, columns, strict=True)]
    return sorted(pairs, key=lambda pair: -pair[2])


@torch.inference_mode(False)
@torch.enable_grad()
def _train_autoencoder(
    kernels: torch.Tensor, weights: torch.Tensor, seed: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Trains on kernels (N, taps); returns the decoder of codes (K,) in [0, 1] into keys (K, taps)."""
    taps = kernels.shape[1]
    largest = kernels.gather(1, kernels.abs().argmax(1, keepdim=True))
    data = (kernels * largest.sign()).float()  # a kernel and its negative count as one
    linear = partial(nn.Linear, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # initialised there, as the batches are chosen there
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        encoder = nn.Sequential(linear(taps, 128), nn.GELU(), linear(128, 64), nn.GELU(), linear(64, 1))
        decoder = nn.Sequential(linear(1, 64), nn.GELU(), linear(64, 128), nn.GELU(), linear(128, taps))
        encoder, decoder = encoder.to(data.device), decoder.to(data.device)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in tqdm(range(STEPS), desc="autoencoder", leave=False, disable=None, delay=2):
            batch = data[_sample(weights, BATCH, replacement=True)]
            out = decoder(encoder(batch).sigmoid())
            loss = 1 - F.cosine_similarity(out - out.mean(1, keepdim=True), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def decode(codes: torch.Tensor) -> torch.Tensor:
        out = decoder(codes.float().unsqueeze(1)).double()
        return F.normalize(out - out.mean(1, keepdim=True))

    return decode
