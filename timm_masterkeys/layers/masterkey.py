"""The depthwise convolution whose kernels are affine images of frozen keys. Knows nothing of models."""

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from timm.layers import Conv2dSame
from torch import nn

from ..errors import ConversionError, ProjectionError
from ..keys.banks import DEFAULT_BANK, KeyBank, get_bank
from ..keys.projection import Projection, check_keys_per_kernel, project_kernels
from .computed import ComputedConv2d, no_weight
from .depthwise import affine_depthwise_conv2d
from .state import entries_to_load, index_problem, state_problems

Trainable = Literal["none", "shift", "affine", "scales"]

COMPACT_ENTRIES = ("keys", "key_index", "scale", "shift", "r2")

_kinds: dict[str, type["MasterKeyConv2d"]] = {}  # layers of another class, by what of them trains


class MasterKeyConv2d(ComputedConv2d):
    """A depthwise ``nn.Conv2d`` with kernels ``W[c] = sum_j scale[c, j] * keys[key_index[c, j]] + shift[c]``.

    The kernels are computed, the keys never train. Everything else is the convolution it replaces: the same geometry,
    padding rule, bias and hooks. What trains is a parameter, what is frozen a buffer, so ``parameters()`` holds just
    what an optimiser should see, all of it 1-D (timm's optimisers give 1-D parameters no weight decay).

    Args:
        in_channels: Channels, all depthwise (``groups == in_channels``).
        out_channels: A multiple of ``in_channels``.
        kernel_size: Taps, as for ``nn.Conv2d``; more than one in all.
        stride: As for ``nn.Conv2d``.
        padding: As for ``nn.Conv2d``, or ``"same_dynamic"`` for timm's TensorFlow-like SAME padding (``Conv2dSame``).
        dilation: As for ``nn.Conv2d``.
        bias: Adds a trainable bias.
        bank: Anything ``get_bank`` takes.
        keys_per_kernel: Keys per kernel, r; fewer where the bank has fewer at this kernel size.
        trainable: ``"none"``, ``"shift"`` (one constant per kernel, as in the paper) or ``"affine"`` (scale and shift);
            ``"scales"`` is that of ``ScaledKeyConv2d``.
        device: As for ``nn.Conv2d``.
        dtype: As for ``nn.Conv2d``.

    Attributes:
        weight: (out_channels, 1, kh, kw), computed at each access; see ``ComputedConv2d``.
        keys: Buffer (K, kh, kw), the bank at this kernel size: its digits in every dtype, whatever casts and averages
            came before.
        key_index: Buffer (out_channels, r) float32, whole numbers: rows of ``keys``. Floats, as averages of weights cut
            integers off, which would change keys; ``key_rows()`` gives int64.
        scale: (out_channels * r,), channel by channel; a parameter if trainable is "affine", else a buffer.
        shift: (out_channels,); a parameter unless trainable is "none", else a buffer.
        r2: Buffer (out_channels,) float32, how well each kernel was met when it was projected (1: exactly; -1: the
            kernel was drawn, not fitted).
        bank: The KeyBank.

    Raises:
        BankError: No such bank, or it has no key at this kernel size.
        ProjectionError: keys_per_kernel is out of range.
        ConversionError: Unknown ``trainable``.

    Example:
        >>> conv = MasterKeyConv2d(96, 96, 7, padding=3)
        >>> conv(torch.randn(1, 96, 14, 14)).shape
        torch.Size([1, 96, 14, 14])
    """

    compact_entries: ClassVar[tuple[str, ...]] = COMPACT_ENTRIES

    def __init_subclass__(cls, trains: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if trains:
            _kinds[trains] = cls

    keys: torch.Tensor
    key_index: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    r2: torch.Tensor
    keys_per_kernel: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        bank: str | os.PathLike[str] | KeyBank | torch.Tensor | np.ndarray = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        same_padding = padding == "same_dynamic"
        conv = (Conv2dSame if same_padding else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if same_padding else padding,
            dilation,
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._replace(conv, get_bank(bank), keys_per_kernel, trainable)
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        bank: str | os.PathLike[str] | KeyBank | torch.Tensor | np.ndarray = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
        *,
        fit: bool = True,
    ) -> "MasterKeyConv2d":
        """A MasterKeyConv2d in place of a depthwise convolution; the convolution itself is left as it is.

        Shares the bias and the hooks with ``conv``, and keeps its training mode, device, dtype and requires_grad.

        Args:
            conv: ``nn.Conv2d`` or timm's ``Conv2dSame`` with ``groups == in_channels``.
            bank: Anything ``get_bank`` takes.
            keys_per_kernel: Keys per kernel.
            trainable: "none", "shift" or "affine"; "scales" makes a ``ScaledKeyConv2d``.
            fit: Project the kernels of ``conv``; else draw keys as for training from scratch (``reset_parameters``).

        Raises:
            BankError: No such bank, or it has no key at this kernel size.
            ProjectionError: The kernels hold NaN or Inf, or keys_per_kernel is out of range.
            ConversionError: Unknown ``trainable``.

        Example:
            >>> layer = MasterKeyConv2d.from_conv(nn.Conv2d(96, 96, 7, padding=3, groups=96))
        """
        layer = cls.unfitted(conv, bank, keys_per_kernel, trainable)
        if not fit:
            layer.reset_parameters(conv.weight)
        else:
            layer._take(conv.weight)
        return layer

    @classmethod
    def unfitted(
        cls,
        conv: nn.Conv2d,
        bank: str | os.PathLike[str] | KeyBank | torch.Tensor | np.ndarray = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
    ) -> "MasterKeyConv2d":
        """As ``from_conv``, with kernels of zeros and an ``r2`` of -1: for compact entries to be loaded into it.

        Raises:
            BankError, ProjectionError, ConversionError: As for ``from_conv``, whose other arguments it takes.
        """
        kind = _kinds.get(trainable, cls)
        layer = kind.__new__(kind)
        layer._replace(conv, get_bank(bank), keys_per_kernel, trainable)
        layer.r2.fill_(-1.0)
        return layer

    def _replace(self, conv: nn.Conv2d, bank: KeyBank, keys_per_kernel: int, trainable: Trainable) -> None:
        """Takes over all of ``conv`` but its weight."""
        if not isinstance(conv, nn.Conv2d) or not conv.in_channels == conv.groups or conv.weight.shape[1] != 1:
            raise ConversionError(f"Got {conv}, expected a depthwise Conv2d (groups == in_channels).")
        check_trainable(trainable)
        check_keys_per_kernel(keys_per_kernel, bank)
        weight = conv.weight
        keys = bank.keys_for((weight.shape[2], weight.shape[3])).to(weight.device, weight.dtype)
        rows = min(keys_per_kernel, len(keys))
        self.__dict__.update(conv.__dict__)  # hooks stay the same objects, so handles to them keep working
        # torch.compile does not look into a class of our own here.
        self._parameters = defaultdict(no_weight, {n: p for n, p in conv._parameters.items() if n != "weight"})
        self._buffers = dict(conv._buffers)
        self._non_persistent_buffers_set = set(conv._non_persistent_buffers_set)
        self.bank = bank
        self.keys_per_kernel = rows
        self.same_padding = isinstance(conv, Conv2dSame)
        self._read = None
        self.register_buffer("keys", keys)
        index = torch.zeros(self.out_channels, rows, device=weight.device, dtype=torch.float32)
        self.register_buffer("key_index", index)
        self.register_buffer("scale", weight.new_zeros(self.out_channels * rows))
        self.register_buffer("shift", weight.new_zeros(self.out_channels))
        self.register_buffer("r2", torch.ones(self.out_channels, device=weight.device, dtype=torch.float32))
        self.set_trainable(trainable, requires_grad=weight.requires_grad)

    def set_trainable(self, trainable: Trainable, requires_grad: bool = True) -> None:
        """Chooses what trains: makes scale and shift parameters or buffers, values unchanged. In place.

        Make the optimiser afterwards: parameters made here are new ones.

        Args:
            trainable: "none", "shift" or "affine"; for a ``ScaledKeyConv2d`` also "scales".
            requires_grad: Of the parameters made.

        Raises:
            ConversionError: Unknown ``trainable``, or scales to train where there are none.
        """
        check_trainable(trainable)
        if trainable == "scales" and "log_sigma" not in self.compact_entries:
            raise ConversionError(
                "These keys have no scales to train: convert the dense model with trainable='scales'."
            )
        self.trainable: Trainable = trainable
        self._trains("scale", trainable == "affine", requires_grad)
        self._trains("shift", trainable != "none", requires_grad)

    def _trains(self, name: str, trains: bool, requires_grad: bool) -> None:
        value = getattr(self, name).detach()
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if trains:
            self.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
        else:
            self.register_buffer(name, value)

    @torch.no_grad()
    def reset_parameters(self, weight: torch.Tensor | None = None) -> None:
        """Draws keys as for training from scratch, from torch's generator: uniform over the bank, shift 0. In place.

        Scales are Gaussian over a kernel's keys (with one key: its sign), and give every kernel the mean norm that the
        stock initialisation gives the layer's kernels (of mean 0).

        Args:
            weight: (out_channels, 1, kh, kw), kernels as the stock initialisation drew them; drawn here if None.

        Raises:
            ProjectionError: The given kernels hold NaN or Inf.
        """
        if weight is not None and not weight.is_meta and not weight.isfinite().all():
            raise ProjectionError("The kernels to take the norm from hold NaN or Inf; repair the checkpoint first.")
        if weight is None:
            weight = torch.empty(self.out_channels, 1, *self.kernel_size, device=self.keys.device)
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            if self.bias is not None:
                bound = self.keys[0].numel() ** -0.5
                nn.init.uniform_(self.bias, -bound, bound)
        self.keys.copy_(self.own_keys())  # empty after meta, to_empty()
        draw = torch.rand(self.out_channels, len(self.keys), device=self.keys.device)
        self.key_index.copy_(draw.topk(self.keys_per_kernel).indices)
        norm = (weight - weight.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
        self.scale.copy_(torch.randn(self.scale.shape, device=self.scale.device))  # an old torch draws 0 in bfloat16
        self.shift.zero_()
        drawn = self.compose_weight().flatten(1).norm(dim=1, keepdim=True)
        self.scale.copy_((self.scale.view(self.out_channels, -1) * (norm / drawn)).flatten())
        self.r2.fill_(-1.0)  # nothing was fitted

    def fitted(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The compact entries but the keys, fitted to kernels (out_channels, 1, kh, kw)."""
        return fitted_entries(project_kernels(weight, self.bank, self.keys_per_kernel))

    def own_keys(self) -> torch.Tensor:
        """The bank's own digits of ``keys``, in its dtype on the CPU."""
        return self.bank.keys_for(self.kernel_size)  # type: ignore[arg-type]  # nn.Conv2d's is (int, int)

    def project_weight(self, weight: torch.Tensor) -> None:
        """Projects kernels (out_channels, 1, kh, kw) on the keys. In place.

        Raises:
            ConversionError: Kernels of another shape, or NaN or Inf in them.
        """
        problems = self.check_state_dict({"weight": weight})
        if problems:
            raise ConversionError(problems[0])
        self._take(weight.to(self.keys.device))

    @torch.no_grad()
    def _take(self, weight: torch.Tensor) -> None:
        for name, value in self.fitted(weight).items():
            getattr(self, name).copy_(value)

    def compose_weight(self) -> torch.Tensor:
        """The kernels (out_channels, 1, kh, kw); differentiable in scale and shift."""
        return self._compose(self.key_rows())

    def key_rows(self) -> torch.Tensor:
        """``key_index`` (out_channels, r) as int64, to index ``keys`` with."""
        return self.key_index.round().long()

    def _compose(self, rows: torch.Tensor) -> torch.Tensor:
        taps = self.keys.flatten(1)
        weight = self.shift.unsqueeze(1)
        scale = self.scale.view(self.out_channels, self.keys_per_kernel)
        for j in range(self.keys_per_kernel):
            weight = torch.addcmul(weight, scale[:, j : j + 1], taps.index_select(0, rows[:, j]))
        return weight.view(self.out_channels, 1, self.kernel_size[0], self.kernel_size[1])

    def _trained_forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.key_rows()
        input, padding = self._padded(input)
        return affine_depthwise_conv2d(
            input,
            self._compose(rows),
            self.bias,
            self.scale,
            self.shift,
            self.keys,
            rows,
            self.stride,  # type: ignore[arg-type]  # pairs, though nn.Conv2d says tuple[int, ...]
            padding,
            self.dilation,  # type: ignore[arg-type]
            self.groups,
        )

    def check_keys(self) -> None:
        """Gives the keys back their digits after an average, and checks the key indices.

        Raises:
            ConversionError: Networks with different keys were averaged.
        """
        self._restore_keys()
        if not self.key_index.is_meta and not torch.equal(self.key_index, self.key_index.round()):
            problem = index_problem(self.key_index, len(self.keys))
            if problem:
                raise ConversionError(f"key_index {problem}")

    def train(self, mode: bool = True) -> "MasterKeyConv2d":
        """As for any module; also ``check_keys``."""
        self.check_keys()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MasterKeyConv2d":
        """Casts and moves as for any module, but keys and key indices lose no digits."""
        keys, key_index = self.keys, self.key_index
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.key_index.dtype != key_index.dtype:
            self.key_index = key_index.to(self.key_index.device)
        if self.keys is not keys:
            self._restore_keys()
        return self

    @torch.no_grad()
    def _restore_keys(self) -> None:
        """The bank's own digits in the keys' dtype."""
        if not self.keys.is_meta:
            keys = self.own_keys().to(self.keys)
            if not torch.equal(keys, self.keys):
                self.keys.copy_(keys)

    def fuse(self) -> nn.Conv2d:
        """The ordinary convolution with these kernels: a new module that shares bias and hooks; this one is unchanged.

        The output is the same bit for bit. The weight trains, unless scale or shift were frozen by hand. timm's
        ``reparameterize_model`` and its scripts' ``--reparam`` call this.

        Raises:
            ConversionError: Networks with different keys were averaged.
        """
        self.check_keys()
        cls = Conv2dSame if self.same_padding else nn.Conv2d
        conv = cls.__new__(cls)
        conv.__dict__.update(self.__dict__)
        for name in ("bank", "keys_per_kernel", "trainable", "same_padding", "_read", "operators"):
            conv.__dict__.pop(name, None)
        frozen = any(
            not p.requires_grad
            for name, p in self._parameters.items()
            if p is not None and name in self.compact_entries
        )
        weight = nn.Parameter(self.compose_weight().detach(), requires_grad=not frozen)
        kept = {name: value for name, value in self._parameters.items() if name not in self.compact_entries}
        conv._parameters = {"weight": weight, **kept}
        conv._buffers = {name: value for name, value in self._buffers.items() if name not in self.compact_entries}
        conv._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        return conv

    def extra_repr(self) -> str:
        stock: str = super().extra_repr()  # type: ignore[no-untyped-call]
        padding = ", padding=same_dynamic" if self.same_padding else ""
        return (
            f"{stock}{padding}, bank={self.bank.name}, "
            f"keys_per_kernel={self.keys_per_kernel}, trainable={self.trainable}"
        )

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> list[str]:
        """What is wrong with this layer's entries of a state dict, as messages; an empty list if they can be loaded.

        Either a dense ``weight`` (it will be projected) or the compact entries, of this bank, kernel size and channel
        count. Entries that are missing altogether are left to ``load_state_dict(strict=...)``.
        """
        return state_problems(self, state_dict, prefix)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = self.check_state_dict(state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        entries = entries_to_load(self, state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def fitted_entries(projection: Projection) -> dict[str, torch.Tensor]:
    return {
        "key_index": projection.key_index,
        "scale": projection.scale.flatten(),
        "shift": projection.shift,
        "r2": projection.r2,
    }


def check_trainable(trainable: str) -> None:
    """Raises ConversionError unless ``trainable`` is one of the modes."""
    if trainable not in get_args(Trainable):
        raise ConversionError(f"trainable is {trainable!r}, expected one of {', '.join(get_args(Trainable))}.")
