"""Banks of master keys, and their keys at any kernel size."""

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import BankError
from ..files import atomic_path
from .gaussian_banks import SIGMAS, scale_space_keys

DEFAULT_BANK = "babaiee2025"
COMPACT_BANK = "compact8"

_FORMAT = "timm_masterkeys.bank.1"
# At a kernel size a key is left out if it keeps a smaller share of its norm than the first number, or if its absolute
# correlation with an earlier key exceeds the second. (Keys 7 and 8 of the scale-space banks, .98 at 3x3, stay.)
_LIMITS = {"fold": (0.3, 0.98), "crop": (1e-6, 0.995)}

_AtSize = tuple[np.ndarray, list[int], dict[int, str]]  # normalised keys, the indices kept, the reasons for the rest


@dataclass(frozen=True, eq=False)
class KeyBank:
    """An immutable bank of master keys.

    Args:
        name: The bank's name in reports, configs and checkpoints.
        keys: The keys at their own size, shape (K, kh, kw). Kept exactly, as a read-only float64 array.
        source: Where the keys come from: a paper, an address, or how they were made.
        licence: The licence of the keys, as an SPDX name where there is one.
        resize: How keys are made smaller: "fold" (see ``keys_for``), or "crop" to their centre. A crop keeps random
            numbers independent, and samples of a function unchanged.

    Raises:
        BankError: The keys are not a finite (K, kh, kw) array, or one of them is constant.

    Example:
        >>> bank = KeyBank("mine", torch.randn(8, 7, 7), source="my search", licence="mit")
        >>> bank.keys_for((3, 3)).shape
        torch.Size([8, 3, 3])
    """

    name: str
    keys: np.ndarray
    source: str = ""
    licence: str = ""
    resize: str = "fold"
    _sizes: dict[tuple[int, int], _AtSize] = field(default_factory=dict, init=False, repr=False)  # computed once

    def __post_init__(self) -> None:
        array = self.keys.detach().cpu().double().numpy() if isinstance(self.keys, torch.Tensor) else self.keys
        keys = np.array(array, dtype=np.float64)
        if keys.ndim != 3 or 0 in keys.shape:
            raise BankError(f"Bank '{self.name}' has keys of shape {keys.shape}, expected (keys, height, width).")
        if self.resize not in _LIMITS:
            raise BankError(f"Bank '{self.name}' has resize='{self.resize}', expected 'fold' or 'crop'.")
        if not np.isfinite(keys).all():
            raise BankError(f"Bank '{self.name}' holds NaN or Inf; every key must be finite.")
        flat = keys.reshape(len(keys), -1)
        constant = np.flatnonzero(np.ptp(flat, axis=1) == 0)
        if constant.size:
            raise BankError(f"Bank '{self.name}': key {constant[0]} is constant; the shift b covers it. Remove it.")
        keys.flags.writeable = False
        object.__setattr__(self, "keys", keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.keys.shape[1:]))
        return f"KeyBank('{self.name}', {len(self)} keys {size}, digest {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyBank) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyBank":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return KeyBank, (self.name, np.array(self.keys), self.source, self.licence, self.resize)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of shape, values (little-endian float64) and ``resize``: equal for equal banks."""
        values = self.keys.astype("<f8")
        rule = "" if self.resize == "fold" else self.resize
        return hashlib.sha256(repr(values.shape).encode() + values.tobytes() + rule.encode()).hexdigest()

    def keys_for(self, kernel_size: tuple[int, int]) -> torch.Tensor:
        """The keys at a kernel size, each with mean 0 and norm 1.

        For a smaller window, each tap outside is added to the nearest tap inside, or shared between two at equal
        distance. A larger window is filled with the mean of the key's edges. So a smaller key responds as the key
        itself to an image that continues unchanged beyond the window, and a larger key is the same filter up to a
        constant. Of nine rules for smaller sizes this one fits the kernels of seven networks best
        (``examples/compare_key_sizes.py``). Keys that vanish or repeat an earlier one are left out; see ``left_out``.

        Args:
            kernel_size: (height, width) in taps.

        Returns:
            (K', height, width) float32 with 1 <= K' <= len(bank). A new tensor at every call.

        Raises:
            BankError: The size is not two positive integers with more than one tap, or no key has a shape there.

        Example:
            >>> get_bank("babaiee2025").keys_for((1, 11)).shape
            torch.Size([5, 1, 11])
        """
        keys, kept, _ = self._at(kernel_size)
        return torch.from_numpy(keys[kept]).float()

    def kept(self, kernel_size: tuple[int, int]) -> tuple[int, ...]:
        """The indices in the bank of the keys that ``keys_for(kernel_size)`` returns, in order."""
        return tuple(self._at(kernel_size)[1])

    def left_out(self, kernel_size: tuple[int, int]) -> dict[int, str]:
        """The reason for each key left out at a kernel size, by its index in the bank.

        Example:
            >>> get_bank("babaiee2025").left_out((1, 7))
            {2: 'repeats key 0', 5: 'vanishes', 7: 'repeats key 0'}
        """
        return dict(self._at(kernel_size)[2])

    def _at(self, kernel_size: tuple[int, int]) -> _AtSize:
        whole = np.shape(kernel_size) == (2,) and np.asarray(kernel_size).dtype.kind in "iu"
        if not whole or min(kernel_size) < 1 or max(kernel_size) < 2:
            raise BankError(f"No keys for kernel size {kernel_size}: expected (height, width) with more than one tap.")
        size = int(kernel_size[0]), int(kernel_size[1])
        if size not in self._sizes:
            self._sizes[size] = self._resized(*size)
        return self._sizes[size]

    def _resized(self, height: int, width: int) -> _AtSize:
        own_height, own_width = self.keys.shape[1:]
        shrink = _fold if self.resize == "fold" else _crop
        keys = _normalised(self.keys)[0]
        keys = shrink(own_height, min(own_height, height)) @ keys @ shrink(own_width, min(own_width, width)).T
        edges = [keys[:, (0, -1), :].reshape(len(keys), -1)] if height > own_height else []
        edges += [keys[:, :, (0, -1)].reshape(len(keys), -1)] if width > own_width else []
        if edges:
            keys = keys - np.concatenate(edges, 1).mean(1)[:, None, None]
            keys = _fold(keys.shape[1], height) @ keys @ _fold(keys.shape[2], width).T
        keys, norms = _normalised(keys)
        vanished, repeated = _LIMITS[self.resize]
        flat = keys.reshape(len(keys), -1)
        kept: list[int] = []
        left_out: dict[int, str] = {}
        for index in range(len(keys)):
            twins = [k for k in kept if abs(flat[k] @ flat[index]) > repeated] if keys.shape != self.keys.shape else []
            if norms[index] < vanished:
                left_out[index] = "vanishes"
            elif twins:
                left_out[index] = f"repeats key {twins[0]}"
            else:
                kept.append(index)
        if not kept:
            raise BankError(f"Bank '{self.name}' has no key with a shape at {height}x{width}. Exclude such layers.")
        return keys, kept, left_out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the bank as safetensors, atomically, with name, source, licence and digest in the metadata.

        Raises:
            OSError: The folder does not exist or cannot be written.
        """
        names = ("name", "source", "licence", "resize", "digest")
        metadata = {"format": _FORMAT, **{name: getattr(self, name) for name in names}}
        with atomic_path(path) as tmp:
            save_file({"keys": np.ascontiguousarray(self.keys)}, tmp, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KeyBank":
        """Reads a bank written by ``save``, or any safetensors file with one tensor ``keys`` (K, kh, kw).

        Raises:
            BankError: Not a safetensors file, no tensor ``keys``, or values that do not match the digest.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                keys = file.get_tensor("keys") if "keys" in names else None
        except (OSError, SafetensorError) as error:
            raise BankError(f"Cannot read a bank from '{path}': {error}. Expected a safetensors file.") from error
        if keys is None:
            raise BankError(f"'{path}' holds {names[:5]}, expected a tensor 'keys' of shape (keys, height, width).")
        fmt = metadata.get("format", _FORMAT)
        if fmt != _FORMAT:
            raise BankError(f"'{path}' has format '{fmt}', this version reads '{_FORMAT}'. Upgrade timm_masterkeys.")
        settings = {name: metadata[name] for name in ("licence", "resize") if name in metadata}
        bank = cls(metadata.get("name", Path(path).stem), keys, metadata.get("source", str(path)), **settings)
        if metadata.get("digest", bank.digest) != bank.digest:
            raise BankError(f"'{path}' does not match its digest: the file was altered. Download it again.")
        return bank


def list_banks() -> list[str]:
    """The names that ``get_bank`` knows; ``<seed>`` stands for any whole number."""
    return [DEFAULT_BANK, COMPACT_BANK, *(f"scale-space-{method}" for method in SIGMAS), "random8:<seed>"]


BankLike = str | os.PathLike[str] | KeyBank | torch.Tensor | np.ndarray  # what ``get_bank`` takes


def get_bank(bank: BankLike = DEFAULT_BANK) -> KeyBank:
    """Returns a bank by name, from a file, or from a tensor.

    Args:
        bank: A name of ``list_banks()``, the path of a ``.safetensors`` file, a tensor or array (K, kh, kw), or a
            KeyBank, which is returned unchanged. ``compact8`` has eight keys discovered in four compact networks.
            ``scale-space-a`` to ``-d2`` are models of the published keys, differences of discrete Gaussians sampled at
            each size. ``random8:<seed>`` has eight Gaussian random 7x7 keys, as a control.

    Raises:
        BankError: No such name, or a file or tensor that is no bank.

    Example:
        >>> get_bank("babaiee2025")
        KeyBank('babaiee2025', 8 keys 7x7, digest 821782a20dfd)
    """
    if isinstance(bank, KeyBank):
        return bank
    if isinstance(bank, (torch.Tensor, np.ndarray)):
        custom = KeyBank("custom", bank, source="given as a tensor")  # type: ignore[arg-type]  # __post_init__ takes both
        return replace(custom, name=f"custom-{custom.digest[:8]}")
    if not isinstance(bank, (str, os.PathLike)):
        raise BankError(f"Got a bank of type {type(bank).__name__}, expected a name, a path, a tensor or a KeyBank.")
    name = os.fspath(bank)
    if name == DEFAULT_BANK:
        return _babaiee2025()
    if name == COMPACT_BANK:
        with resources.as_file(resources.files(__package__).joinpath("data/compact8.safetensors")) as path:
            return KeyBank.load(path)
    method = name.removeprefix("scale-space-")
    if method in SIGMAS and method != name:
        source = "Lindeberg et al., Modelling and analysis of the 8 filters, JMIV 68(3), 2026, arXiv:2509.12746"
        return KeyBank(name, scale_space_keys(method), source, "cc-by-4.0", resize="crop")
    control = re.fullmatch(r"random8:(\d+)", name)
    if control:
        seed = int(control[1])
        if seed >= 2**32:
            raise BankError(f"Bank '{name}' has a seed too large for numpy, expected less than {2**32}.")
        keys = np.random.RandomState(seed).standard_normal((8, 7, 7))  # numpy never changes this stream
        return KeyBank(name, keys, f"Gaussian random numbers, seed {control[1]}", "cc0-1.0", resize="crop")
    if name.endswith(".safetensors"):
        return KeyBank.load(name)
    raise BankError(f"Unknown bank '{name}'. Known: {', '.join(list_banks())}, or a path that ends in .safetensors.")


def _babaiee2025() -> KeyBank:
    text = resources.files(__package__).joinpath("data/babaiee2025.txt").read_text()
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("Filter")]
    return KeyBank(
        DEFAULT_BANK,
        np.array(rows, dtype=np.float64).reshape(8, 7, 7),
        source="Babaiee et al., The Quest for Universal Master Key Filters in DS-CNNs, NeurIPS 2025, arXiv:2509.11711, "
        "published with Lindeberg et al., JMIV 68(3), 2026 at github.com/tonylindeberg/masterfiltmodel",
        licence="cc-by-4.0",
    )


def _fold(taps: int, window: int) -> np.ndarray:
    """The matrix (window, taps) that adds each tap to its place in a centred window, or to the window's edge."""
    place = np.clip(np.arange(taps) - (taps - 1) / 2 + (window - 1) / 2, 0, window - 1)
    low = np.floor(place).astype(int)
    fold = np.zeros((window, taps))
    np.add.at(fold, (low, np.arange(taps)), 1 - (place - low))
    np.add.at(fold, (np.minimum(low + 1, window - 1), np.arange(taps)), place - low)
    return fold


def _crop(taps: int, window: int) -> np.ndarray:
    """The matrix (window, taps) that keeps the taps in the middle."""
    return np.eye(window, taps, (taps - window) // 2)


def _normalised(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys with mean 0 and norm 1, and their norms before (a key of norm 0 is not divided)."""
    keys = keys - keys.mean(axis=(1, 2), keepdims=True)
    norms = np.sqrt((keys**2).sum(axis=(1, 2)))
    return keys / np.where(norms > 0, norms, 1)[:, None, None], norms
