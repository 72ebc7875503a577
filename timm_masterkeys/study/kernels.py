"""The depthwise kernels of dense networks, gathered for analysis and search."""

import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import load_state_dict
from torch import nn
from tqdm.auto import tqdm

from ..conversion.plan import converted_layers
from ..conversion.tags import is_masterkeys_tag
from ..errors import BankError
from ..hub.weights import COMPACT_NAME, FUSED_NAME, SECTION
from ..keys.banks import BankLike, get_bank
from ..keys.projection import constant_kernels

Array = torch.Tensor | np.ndarray
Source = str | os.PathLike[str] | nn.Module | Array | Sequence[Array]
CONTROL_BANK = "random8:0"  # as many random keys as the published bank has


@dataclass(frozen=True, eq=False)
class Kernels:
    """Kernels that are not constant, each with mean 0 and norm 1, and the networks they come from.

    Attributes:
        values: (N, kh * kw) float64.
        network: (N,) int64, indices into ``names``.
        names: The names of the networks.
        kernel_size: (height, width).
        constant: The number of kernels left out as constant (or zero): they have no R2.
        non_finite: The number of kernels left out as they hold NaN or Inf.
    """

    values: torch.Tensor
    network: torch.Tensor
    names: tuple[str, ...]
    kernel_size: tuple[int, int]
    constant: int
    non_finite: int

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: str | torch.device) -> "Kernels":
        """The same kernels on a device."""
        return replace(self, values=self.values.to(device), network=self.network.to(device))

    def weights(self, equal_networks: bool = True) -> torch.Tensor:
        """Weights (N,) with sum 1, equal for every network, or else for every kernel."""
        counts = torch.bincount(self.network, minlength=len(self.names)).double()
        each = 1 / counts[self.network] if equal_networks else torch.ones_like(counts[self.network])
        return each / each.sum()

    def fit(self, bank: BankLike) -> tuple[torch.Tensor, torch.Tensor]:
        """R2 (N,) of the least-squares fit ``a*x + b`` by the nearest key, and this key's index in the bank (N,)."""
        bank = get_bank(bank)
        r2, index = self.fit_keys(bank.keys_for(self.kernel_size).flatten(1).to(self.values))
        return r2, torch.tensor(bank.kept(self.kernel_size), device=index.device)[index]

    def fit_keys(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``fit``, by keys (K, kh * kw) of mean 0 and norm 1."""
        best = (self.values @ keys.T).square().max(1)
        return best.values, best.indices


def collect_kernels(
    sources: Mapping[str, Source] | Sequence[Source], kernel_size: int | tuple[int, int] = 7
) -> Kernels:
    """Gathers the depthwise kernels of one size from dense networks.

    Converted models are refused: their kernels are computed from keys, so a fit by these keys is perfect and says
    nothing. The same is true of a network that was fused after conversion. It cannot be told from a dense one: leave it
    out yourself.

    Args:
        sources: Dense networks by name, or a list of them: timm names (their pretrained weights), models, checkpoints
            (``.safetensors``, or ``.pth`` read without unpickling code), ``.npz`` files of arrays, or arrays of kernels
            (C, kh, kw) or (C, 1, kh, kw). Of a checkpoint all 4-D weights (C, 1, kh, kw) are taken.
        kernel_size: In taps; (height, width) if it is no square.

    Raises:
        BankError: Two sources of one name, a converted model, a source that holds no kernel of this size, or a file
            that cannot be read.

    Example:
        >>> kernels = collect_kernels({"a": timm.create_model("convnext_atto"), "b": torch.randn(96, 7, 7)})
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    named = name_sources(sources)
    values, network, constant, non_finite = [], [], 0, 0
    bar = tqdm(named.items(), desc="networks", leave=False, disable=None, delay=2)
    for index, (name, source) in enumerate(bar):
        arrays = read_kernels(source)
        matching = [array.flatten(1) for array in arrays if tuple(array.shape[1:]) == (height, width)]
        if not matching:
            sizes = ", ".join(sorted({f"{array.shape[1]}x{array.shape[2]}" for array in arrays})) or "none at all"
            raise BankError(
                f"'{name}' holds no depthwise kernel of {height}x{width}, but {sizes}. Leave it out, or take one."
            )
        kernels = torch.cat(matching)
        finite = kernels.isfinite().all(1)
        kernels = kernels[finite]
        varied = ~constant_kernels(kernels)
        centred = kernels[varied] - kernels[varied].mean(1, keepdim=True)
        non_finite += int((~finite).sum())
        constant += int((~varied).sum())
        values.append(centred / centred.norm(dim=1, keepdim=True))
        network.append(torch.full((len(values[-1]),), index, device="cpu"))
    return Kernels(torch.cat(values), torch.cat(network), tuple(named), (height, width), constant, non_finite)


def name_sources(sources: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Sources by name: a file's name (its path, if two files have one name), or the type and the place in the list.

    Raises:
        BankError: Two of one name, none at all, or one source without a list around it.
    """
    if isinstance(sources, (str, os.PathLike)):
        raise BankError(f"The sources are one string, '{sources}'. Give a list: ['{sources}'].")
    if isinstance(sources, (nn.Module, torch.Tensor, np.ndarray)):  # whose layers or channels are no networks
        raise BankError(f"The sources are one {type(sources).__name__}, expected a list of them, or names with them.")
    if not len(sources):
        raise BankError("There is no network to take kernels from.")
    if isinstance(sources, Mapping):
        return dict(sources)
    paths = [
        os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"{type(source).__name__} {place}"
        for place, source in enumerate(sources)
    ]
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):  # a/net.npz and b/net.npz
        names = paths
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise BankError(f"Two sources are called '{repeated[0]}'. Give them names: collect_kernels({{'a': ...}}).")
    return dict(zip(names, sources, strict=True))


def read_kernels(source: Source) -> list[torch.Tensor]:
    """The depthwise kernels of a network, layer by layer, as (C, kh, kw) float64; see ``collect_kernels``."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return list(read_file(path).values()) if os.path.isfile(path) else _read_name(path)
    if isinstance(source, nn.Module):
        if converted_layers(source):
            raise _converted(f"The {type(source).__name__}")
        layers = [m for m in source.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
        source = [layer.weight for layer in layers]
    arrays: Any = source if isinstance(source, (list, tuple)) else [source]
    return list(_stacks(dict(enumerate(arrays))).values())


def _read_name(name: str) -> list[torch.Tensor]:
    """The kernels of a timm name's pretrained weights; for anything else BankError says what to give instead."""
    if os.path.isdir(name):
        if _is_converted_folder(Path(name)):
            raise _converted(f"'{name}'")
        raise BankError(f"'{name}' is a folder. Give its file of dense weights, as model.safetensors.")
    if ":" not in name and is_masterkeys_tag(name.partition(".")[2]):
        raise _converted(f"'{name}'")
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError) as error:
        raise BankError(f"'{name}' is no file, and timm cannot make it: {error}") from error
    return read_kernels(model)


def read_file(path: str) -> dict[str, torch.Tensor]:
    """The kernels (C, kh, kw) in an ``.npz`` file or a checkpoint, by their names in it.

    Raises:
        BankError: It cannot be read, or belongs to a converted model.
    """
    arrays = path.endswith(".npz")
    try:
        if arrays:
            with zipfile.ZipFile(path), np.load(path) as file:  # np.load alone takes other files too
                state = dict(file.items())
        else:
            state = load_state_dict(path, use_ema=True, weights_only=True)
        state = {str(name): value for name, value in state.items()}
    except Exception as error:  # a damaged file: unpickling may raise anything
        raise BankError(f"Cannot read kernels from '{path}': {error!r}.") from error
    if any(name.endswith("key_index") for name in state) or _is_converted_folder(Path(path).absolute().parent, path):
        raise _converted(f"'{path}'")
    if not arrays:
        state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.ndim == 4}
    return _stacks(state)


def _is_converted_folder(folder: Path, file: str = FUSED_NAME) -> bool:
    """Whether a folder holds a converted model as ``save_pretrained`` writes it, and the file is part of it."""
    if os.path.basename(file) != FUSED_NAME:
        return False
    try:
        return SECTION in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return (folder / COMPACT_NAME).is_file()


def _converted(what: str) -> BankError:
    return BankError(
        f"{what} is a converted model: its kernels are computed from keys, so the fit would be perfect (R2 = 1) and "
        "say nothing. Give the dense model it was made from."
    )


def _stacks(arrays: Mapping[Any, Array]) -> dict[Any, torch.Tensor]:
    """The arrays of shape (C, kh, kw) or (C, 1, kh, kw), as tensors (C, kh, kw)."""
    try:
        tensors = {name: torch.as_tensor(array, device="cpu").detach().double() for name, array in arrays.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise BankError(f"Expected arrays of kernels (C, kh, kw): {error}.") from error
    return {
        name: kernels.flatten(0, -3)
        for name, kernels in tensors.items()
        if kernels.ndim == 3 or (kernels.ndim == 4 and kernels.shape[1] == 1)
    }
