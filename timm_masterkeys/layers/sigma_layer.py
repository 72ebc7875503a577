"""The layer that learns sigmas for each of its kernels, as in the scale-space paper."""

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ..errors import ConversionError
from ..keys.banks import KeyBank, get_bank
from ..keys.gaussian_banks import SIGMAS
from ..keys.sigma_fit import SMALLEST, fit_sigmas, sigma_kernels
from .computed import ComputedConv2d
from .masterkey import MasterKeyConv2d, Trainable, fitted_entries


class SigmaKeyConv2d(MasterKeyConv2d):
    """A MasterKeyConv2d with sigmas for each kernel, learned as in the scale-space paper.

    Each channel keeps its scale and one of the eight operators of the ``scale-space-*`` banks (Lindeberg et al., JMIV
    68(3), 2026); with ``trainable="sigmas"`` it learns sigma_x, sigma_y and shift. The sigmas are positive by
    construction. The key is normalised (mean 0, norm 1) at any sigmas, and gamma of key 7 stays 1/2.
    ``convert_to_masterkeys`` makes these layers for ``trainable="sigmas"``. The sigmas are fitted to each kernel by
    least squares, or, for training from scratch, those of the bank.

    Args:
        As for ``MasterKeyConv2d``; ``bank`` is one of ``scale-space-*``, and each kernel has one key.

    Attributes:
        log_sigma: (out_channels * 2,), the logarithms of sigma_x and sigma_y in taps, channel by channel; a parameter
            if trainable is "sigmas", else a buffer.
        operators: For each row of ``keys``, which of the eight keys it is, from 0.

    Raises:
        ConversionError: Another bank, or several keys per kernel.

    Example:
        >>> conv = SigmaKeyConv2d(96, 96, 7, padding=3, bank="scale-space-b", trainable="sigmas")
        >>> conv.log_sigma.exp().view(96, 2)  # sigma_x, sigma_y
    """

    compact_entries = (*MasterKeyConv2d.compact_entries, "log_sigma")
    has_sigmas = True
    trained_entries: ClassVar = {**MasterKeyConv2d.trained_entries, "sigmas": ("log_sigma", "shift")}

    log_sigma: torch.Tensor
    operators: list[int]

    @staticmethod
    def check_settings(bank: KeyBank, keys_per_kernel: int) -> None:
        """Raises ConversionError unless the bank's keys have sigmas, and each kernel one key."""
        names = [f"scale-space-{method}" for method in SIGMAS]
        keys = get_bank(bank.name).keys if bank.name in names else bank.keys[:0]
        # The keys are computed, and differ in the last digit with another numpy.
        if bank.keys.shape != keys.shape or not np.allclose(bank.keys, keys, rtol=0, atol=1e-9):
            raise ConversionError(
                f"Bank '{bank.name}' has no sigmas to train: trainable='sigmas' needs one of {', '.join(names)}. What "
                "makes layers of its own (LoRA) needs ordinary ones: fuse_masterkeys(model) first."
            )
        if keys_per_kernel != 1:
            raise ConversionError(f"keys_per_kernel is {keys_per_kernel}, expected 1 with trainable='sigmas'.")

    def _copy_from(self, conv: nn.Conv2d, bank: KeyBank, keys_per_kernel: int, trainable: Trainable) -> None:
        self.check_settings(bank, keys_per_kernel)
        super()._copy_from(conv, bank, keys_per_kernel, trainable)
        self.operators = list(bank.kept(self.kernel_size))  # type: ignore[arg-type]

    def _make_entries(self, weight: torch.Tensor, keys: torch.Tensor) -> None:
        super()._make_entries(weight, keys)
        self.register_buffer("log_sigma", weight.new_zeros(2 * self.out_channels))

    @torch.no_grad()
    def reset_parameters(self, weight: torch.Tensor | None = None) -> None:
        """As for a MasterKeyConv2d; the sigmas become those of the bank. In place."""
        super().reset_parameters(weight)
        values = [float(sigma) for sigma in SIGMAS[self.bank.name.removeprefix("scale-space-")].split()]
        sigmas = torch.tensor(values, dtype=torch.float32, device=self.keys.device)
        nominal = sigmas.clamp_min(SMALLEST).log().view(8, 2)[self.operators]
        self.log_sigma.copy_(nominal[self.key_rows()[:, 0]].flatten())

    def fitted(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        projection, log_sigma = fit_sigmas(weight, tuple(self.operators))
        return {**fitted_entries(projection), "log_sigma": log_sigma.flatten()}

    def _compose(self, rows: torch.Tensor) -> torch.Tensor:
        operator = torch.tensor(self.operators, device=self.scale.device)[rows[:, 0]]
        keys = sigma_kernels(operator, self.log_sigma.view(-1, 2), self.kernel_size[0], self.kernel_size[1])
        return (keys * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)).unsqueeze(1)

    _grad_forward = ComputedConv2d._grad_forward  # as the gradient of the sigmas needs the whole weight gradient
