"""The depthwise convolution with kernels that are affine images of frozen keys. Knows nothing of models."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from timm.layers import Conv2dSame
from torch import nn

from ..errors import CheckpointError, ConversionError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank, get_bank
from ..keys.projection import Projection, check_finite, check_keys_per_kernel, project_kernels
from .computed import ComputedConv2d
from .depthwise import affine_depthwise_conv2d
from .gpu_operators import affine_function
from .state import entries_to_load, index_problem, state_problems
from .weight_guards import parameters_without_weight

Trainable = Literal["none", "shift", "affine", "sigmas"]

Layer = TypeVar("Layer", bound="MasterKeyConv2d")

RANDOM, CONSTANT = -1.0, -2.0  # stand in place of an R2

_FUSE_FIRST = (
    "A library that adds layers of the class it finds, as PEFT's LoRA does, wants ordinary ones: call "
    "fuse_masterkeys(model) first, or target other layers than the depthwise ones."
)
_ENTRIES = ("keys", "key_index", "scale", "shift", "r2", "log_sigma")
_ATTRIBUTES = ("bank", "keys_per_kernel", "trainable", "frozen", "same_padding", "operators", "_read", "_empty")
_NO_KEY = 0.1  # keys farther from the bank's are uninitialised memory; averages and half precision stay nearer

_NO_VALUES = (
    "A MasterKeyConv2d has no values: it was made empty (on the meta device, or by to_empty), and what was loaded "
    "since held nothing for it. Loaders that set tensors by name (from_pretrained of transformers, "
    "load_checkpoint_and_dispatch of accelerate) do not project dense kernels: load a dense checkpoint with "
    "model.load_state_dict(state, assign=True), or load it into the dense model and convert that."
)


class MasterKeyConv2d(ComputedConv2d):
    """A depthwise ``nn.Conv2d`` with kernels ``W[c] = sum_j scale[c, j] * keys[key_index[c, j]] + shift[c]``.

    The kernels are computed, and the keys never train. Everything else is as in the convolution it replaces: geometry,
    padding rule, bias and hooks. Trainable entries are parameters, frozen ones are buffers. So ``parameters()`` holds
    only what an optimiser should train, all of it 1-D (timm's optimisers give 1-D parameters no weight decay).

    Args:
        in_channels: Channels, all depthwise (``groups == in_channels``).
        out_channels: A multiple of ``in_channels``.
        kernel_size: As for ``nn.Conv2d``; more than one tap.
        stride, dilation, padding_mode, device, dtype: As for ``nn.Conv2d``.
        padding: As for ``nn.Conv2d``, or ``"same_dynamic"`` for timm's TensorFlow-like SAME padding (``Conv2dSame``).
        groups: ``in_channels``, or None for the same.
        bias: Whether to add a trainable bias.
        bank: Anything ``get_bank`` takes.
        keys_per_kernel: Keys per kernel, r; fewer where the bank has fewer at this kernel size.
        trainable: ``"none"``, ``"shift"`` (one constant per kernel, as in the paper) or ``"affine"`` (scale and shift);
            ``"sigmas"`` is for ``SigmaKeyConv2d`` only.

    Attributes:
        weight: (out_channels, 1, kh, kw), computed at each access; see ``ComputedConv2d``.
        keys: Buffer (K, kh, kw), the bank at this kernel size, restored exactly after casts and averages.
        key_index: Buffer (out_channels, r) float32, rows of ``keys`` as whole numbers. Floats, as averages of weights
            truncate integers; ``key_rows()`` gives int64.
        scale: (out_channels * r,), channel by channel; a parameter if trainable is "affine", else a buffer.
        shift: (out_channels,); a parameter unless trainable is "none", else a buffer.
        r2: Buffer (out_channels,) float32, the R2 of each kernel when it was fitted; or ``RANDOM`` (-1) for random
            initialisation, ``CONSTANT`` (-2) where the dense kernel is constant.
        frozen: Whether the dense weight did not require gradients; ``fuse`` needs it with ``trainable="none"``.
        bank: The KeyBank.

    Raises:
        BankError: No such bank, or it has no key at this kernel size.
        ProjectionError: keys_per_kernel is out of range.
        ConversionError: Unknown ``trainable``, groups that are not ``in_channels``, or a kernel of one tap.

    Example:
        >>> conv = MasterKeyConv2d(96, 96, 7, padding=3)
        >>> conv(torch.randn(1, 96, 14, 14)).shape
        torch.Size([1, 96, 14, 14])
    """

    compact_entries: ClassVar[tuple[str, ...]] = ("keys", "key_index", "scale", "shift", "r2")
    has_sigmas: ClassVar[bool] = False  # whether keys have sigmas, see SigmaKeyConv2d
    trained_entries: ClassVar[dict[str, tuple[str, ...]]] = {  # the parameters, by what ``trainable`` may be
        "none": (),
        "shift": ("shift",),
        "affine": ("scale", "shift"),
    }

    keys: torch.Tensor
    key_index: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    r2: torch.Tensor
    keys_per_kernel: int
    frozen: bool
    _empty: bool = False  # whether its values may be whatever was in memory, see check_values

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: BankLike = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
    ) -> None:
        _check_geometry(in_channels, kernel_size, padding, groups, padding_mode)
        make: Any = Conv2dSame if padding == "same_dynamic" else partial(nn.Conv2d, padding_mode=padding_mode)
        padding = 0 if padding == "same_dynamic" else padding
        geometry = in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels
        conv = make(*geometry, bias=bias, device=device, dtype=dtype)
        self._copy_from(conv, get_bank(bank), keys_per_kernel, trainable)
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls: type[Layer],
        conv: nn.Conv2d,
        bank: BankLike = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
        *,
        fit: bool = True,
    ) -> Layer:
        """A layer of this class made from a depthwise convolution, which is not changed.

        The layer shares bias and hooks with ``conv``, and keeps its training mode, device, dtype and requires_grad.

        Args:
            conv: ``nn.Conv2d``, timm's ``Conv2dSame``, or a subclass that computes as they do, with
                ``groups == in_channels``.
            bank: Anything ``get_bank`` takes.
            keys_per_kernel: Keys per kernel.
            trainable: "none", "shift" or "affine"; for ``SigmaKeyConv2d.from_conv`` also "sigmas".
            fit: Whether to project the kernels of ``conv``; else random initialisation (``reset_parameters``).

        Raises:
            BankError: No such bank, or it has no key at this kernel size.
            ProjectionError: The kernels hold NaN or Inf, or keys_per_kernel is out of range.
            ConversionError: Unknown ``trainable``, or a convolution that is not depthwise or computes in another way
                than ``nn.Conv2d`` (``obstacle``).

        Example:
            >>> layer = MasterKeyConv2d.from_conv(nn.Conv2d(96, 96, 7, padding=3, groups=96))
        """
        layer = cls.unfilled_from_conv(conv, bank, keys_per_kernel, trainable)
        if fit:
            layer._set_kernels(conv.weight)
        else:
            layer.reset_parameters(conv.weight)
        return layer

    @classmethod
    def unfilled_from_conv(
        cls: type[Layer],
        conv: nn.Conv2d,
        bank: BankLike = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
    ) -> Layer:
        """As ``from_conv``, with zero kernels and ``r2`` at ``RANDOM``; for compact entries to be loaded into."""
        layer = cls.__new__(cls)
        layer._copy_from(conv, get_bank(bank), keys_per_kernel, trainable)
        return layer

    def _copy_from(self, conv: nn.Conv2d, bank: KeyBank, keys_per_kernel: int, trainable: Trainable) -> None:
        """Takes over everything but the weight from ``conv``; objects are shared, not copied. In place."""
        if not isinstance(conv, nn.Conv2d) or not conv.in_channels == conv.groups or conv.weight.shape[1] != 1:
            raise ConversionError(f"Got {conv}, expected a depthwise Conv2d (groups == in_channels).")
        if reason := obstacle(conv):
            raise ConversionError(f"Got {conv}, expected a convolution that computes as nn.Conv2d does: {reason}.")
        check_keys_per_kernel(keys_per_kernel, bank)  # again, as the class is public
        weight = conv.weight
        keys = bank.keys_for((weight.shape[2], weight.shape[3])).to(weight.device, weight.dtype)
        # All attributes, in place of nn.Conv2d.__init__. Hooks stay the same objects, so handles to them keep working.
        self.__dict__.update(conv.__dict__)
        self._parameters = parameters_without_weight(conv)
        self._buffers = dict(conv._buffers)
        self._non_persistent_buffers_set = set(conv._non_persistent_buffers_set)
        self.bank = bank
        self.keys_per_kernel = min(keys_per_kernel, len(keys))
        self.same_padding = type(conv).forward is Conv2dSame.forward
        self._read = None
        self._make_entries(weight, keys)
        self.set_trainable(trainable, requires_grad=weight.requires_grad)

    def _make_entries(self, weight: torch.Tensor, keys: torch.Tensor) -> None:
        """Registers the compact entries as buffers of the dense weight's dtype and device."""
        channels, rows = self.out_channels, self.keys_per_kernel
        self.register_buffer("keys", keys)
        self.register_buffer("key_index", weight.new_zeros(channels, rows, dtype=torch.float32))
        self.register_buffer("scale", weight.new_zeros(channels * rows))
        self.register_buffer("shift", weight.new_zeros(channels))
        self.register_buffer("r2", weight.new_full((channels,), RANDOM, dtype=torch.float32))

    def set_trainable(self, trainable: Trainable, requires_grad: bool = True) -> None:
        """Makes scale, shift and sigmas parameters or buffers; their values stay the same. In place.

        Create the optimiser afterwards: the parameters made here are new.

        Args:
            trainable: "none", "shift" or "affine"; for a ``SigmaKeyConv2d`` also "sigmas".
            requires_grad: Of the new parameters; if there are none, of the weight that ``fuse`` returns.

        Raises:
            ConversionError: Unknown ``trainable``, or sigmas to train where there are none.
        """
        check_trainable(trainable)
        if trainable not in self.trained_entries:
            raise ConversionError(
                "A MasterKeyConv2d has no sigmas to train: a SigmaKeyConv2d has. Convert the dense model with "
                "trainable='sigmas'."
            )
        self.trainable: Trainable = trainable
        self.frozen = not requires_grad
        for name in ("scale", "shift", "log_sigma"):
            if name not in self.compact_entries:
                continue
            value = getattr(self, name).detach()
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            if name in self.trained_entries[trainable]:
                self.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
            else:
                self.register_buffer(name, value)

    @torch.no_grad()
    def reset_parameters(self, weight: torch.Tensor | None = None) -> None:
        """Random initialisation, for training from scratch: keys uniform over the bank, shift 0. In place.

        Uses torch's generator. The scales of a kernel's keys are Gaussian (with one key only the sign is random). Every
        kernel gets the mean norm of kernels of the stock initialisation, less their means.

        Args:
            weight: (out_channels, 1, kh, kw), kernels of the stock initialisation; None initialises some.

        Raises:
            ProjectionError: The given kernels hold NaN or Inf.
        """
        like: Any = {"dtype": torch.float32, "device": self.keys.device}  # an old torch draws 0 in bfloat16
        if weight is not None:
            check_finite(weight)
        else:
            weight = torch.empty(self.out_channels, 1, *self.kernel_size, **like)
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            if self.bias is not None:
                bound = self.keys[0].numel() ** -0.5
                nn.init.uniform_(self.bias, -bound, bound)
        self.keys.copy_(self.own_keys())  # as they have no values after to_empty()
        order = torch.rand(self.out_channels, len(self.keys), **like)
        self.key_index.copy_(order.topk(self.keys_per_kernel).indices)
        target_norm = (weight - weight.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1).mean()
        self.scale.copy_(torch.randn(self.scale.shape, **like))
        self.shift.zero_()
        current_norm = self.compose_weight().flatten(1).norm(dim=1, keepdim=True)
        self.scale.copy_((self.scale.view(self.out_channels, -1) * (target_norm / current_norm)).flatten())
        self.r2.fill_(RANDOM)

    def fitted(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The compact entries, except the keys, fitted to kernels (out_channels, 1, kh, kw)."""
        return fitted_entries(project_kernels(weight, self.bank, self.keys_per_kernel))

    def own_keys(self) -> torch.Tensor:
        """The exact keys of the bank at this kernel size, float32 on the CPU."""
        return self.bank.keys_for(self.kernel_size)  # type: ignore[arg-type]  # nn.Conv2d's is (int, int)

    def project_weight(self, weight: torch.Tensor) -> None:
        """Projects kernels (out_channels, 1, kh, kw) on the keys. In place.

        Raises:
            ConversionError: The kernels have another shape, or hold NaN or Inf.
        """
        problems = self.check_state_dict({"weight": weight})
        if problems:
            raise ConversionError(problems[0])
        self._set_kernels(weight.to(self.keys.device))

    @torch.no_grad()
    def _set_kernels(self, weight: torch.Tensor) -> None:
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
        scale = self.scale.view(-1, self.keys_per_kernel)
        for j in range(self.keys_per_kernel):  # scale is not sliced: Torch-Pruning would take that for channels
            weight = torch.addcmul(weight, scale[:, j, None], taps.index_select(0, rows[:, j]))
        return weight.view(-1, 1, self.kernel_size[0], self.kernel_size[1])

    def random_kernels(self) -> torch.Tensor:
        """(out_channels,) bool: True for kernels with randomly initialised keys, not fitted ones."""
        return (self.r2 - RANDOM).abs() < 0.5  # averages of weights round it

    def constant_kernels(self) -> torch.Tensor:
        """(out_channels,) bool: True for kernels constant in the dense model; calibration does not change this."""
        return (self.r2 - CONSTANT).abs() < 0.5

    @torch.no_grad()
    def keep_kernels(self, weight: torch.Tensor) -> bool:
        """Drops all kernels but those in ``weight``, which must be some of the layer's, in their order. In place.

        ``out_channels`` has to be their number. The entries of the kept kernels stay the same, bit for bit.
        """
        kernels, left = self.compose_weight().flatten(1), weight.detach().flatten(1)
        if weight.is_meta or not len(left) == self.out_channels < len(kernels) or kernels.shape[1] != left.shape[1]:
            return False
        rows: list[int] = []
        for kernel in left:
            start = rows[-1] + 1 if rows else 0
            equal = (kernels[start:] == kernel).all(1).nonzero()
            if not len(equal):
                return False
            rows.append(start + int(equal[0, 0]))
        index = torch.tensor(rows, device=kernels.device)
        for name in self.compact_entries:
            if name == "keys":
                continue
            value = getattr(self, name)
            kept = value.detach().unflatten(0, (len(kernels), -1)).index_select(0, index).flatten(0, 1)
            if name in self._parameters:
                kept = nn.Parameter(kept, requires_grad=value.requires_grad)
            setattr(self, name, kept)
        return True

    def _grad_forward(self, input: torch.Tensor) -> torch.Tensor:
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
            affine_function(),
        )

    def check_keys(self) -> None:
        """Restores the exact keys after an average, and checks the key indices.

        Raises:
            ConversionError: Networks with different keys were averaged.
            CheckpointError: There are no values, see ``check_values``.
        """
        self._restore_keys()
        self.check_values()
        self._check_indices()

    def _check_indices(self) -> None:
        if not self.key_index.is_meta and not torch.equal(self.key_index, self.key_index.round()):
            problem = index_problem(self.key_index, len(self.keys))
            if problem:
                raise ConversionError(f"key_index {problem}")

    def check_values(self, input: torch.Tensor | None = None) -> None:
        """Raises CheckpointError if the layer was made empty, and nothing was loaded since.

        Args:
            input: If it is on another device than meta, a layer on the meta device has no values either.
        """
        if self._is_empty() or (input is not None and self.keys.is_meta and not input.is_meta):
            raise CheckpointError(_NO_VALUES)

    def _is_empty(self) -> bool:
        """Whether the layer has no values; forgets the mark once values were loaded."""
        if self._empty and not self.key_index.is_meta:
            self._empty = bool(self.key_index.isnan().all())
        return self._empty and not self.key_index.is_meta

    @torch.no_grad()
    def _make_empty(self) -> None:
        """Marks the layer as without values, so that uninitialised memory is not used. In place."""
        self.key_index.fill_(torch.nan)
        self._empty = True

    def train(self, mode: bool = True) -> "MasterKeyConv2d":
        """As for any module; also restores the exact keys after an average, and checks the key indices."""
        self._restore_keys()
        if not self._is_empty():
            self._check_indices()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MasterKeyConv2d":
        """Casts and moves as for any module, but keeps keys and key indices exact."""
        keys, key_index = self.keys, self.key_index
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except NotImplementedError as error:  # from torch, which cannot copy a meta tensor
            if not any(value.is_meta for value in self.state_dict().values()):
                raise
            raise CheckpointError(_NO_VALUES) from error
        if keys.is_meta and not self.keys.is_meta:
            self._make_empty()
        if self.key_index.dtype != key_index.dtype:
            self.key_index = key_index.to(self.key_index.device)
        if self.keys is not keys:
            self._restore_keys()
        return self

    @torch.no_grad()
    def _restore_keys(self) -> None:
        """Restores the bank's exact keys. In place; a layer with keys far from them is marked as empty."""
        if self.keys.is_meta:
            return
        keys = self.own_keys().to(self.keys)
        if not torch.equal(keys, self.keys):
            if not (keys - self.keys).abs().max() < _NO_KEY:
                self._make_empty()
            self.keys.copy_(keys)

    def fuse(self) -> nn.Conv2d:
        """The ordinary convolution with these kernels: a new module that shares bias and hooks with this one.

        The output is the same bit for bit. The weight trains if scale and shift do; with ``trainable="none"``, if it
        did in the dense model. timm's ``reparameterize_model`` and its scripts' ``--reparam`` call this.

        Raises:
            ConversionError: Networks with different keys were averaged.
            CheckpointError: There are no values, see ``check_values``.
        """
        self.check_keys()
        cls = Conv2dSame if self.same_padding else nn.Conv2d
        conv = cls.__new__(cls)
        conv.__dict__.update(self.__dict__)
        for name in _ATTRIBUTES:
            conv.__dict__.pop(name, None)
        trained = [p.requires_grad for name, p in self._parameters.items() if p is not None and name in _ENTRIES]
        requires_grad = all(trained) if trained else not self.frozen
        weight = nn.Parameter(self.compose_weight().detach(), requires_grad=requires_grad)
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
        """Messages about this layer's entries in a state dict; an empty list if they can be loaded.

        A state dict has either a dense ``weight``, which is projected, or all compact entries, of this bank, kernel
        size and channel count. If it has none of them, ``load_state_dict(strict=...)`` decides.
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
        problems = self.check_state_dict(state_dict, prefix)  # again, as a layer may be loaded without its model
        if problems:
            error_msgs.extend(problems)
            return
        entries = entries_to_load(self, state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def fitted_entries(projection: Projection) -> dict[str, torch.Tensor]:
    """The entries of a layer, except its keys, from a fit of its kernels."""
    return {
        "key_index": projection.key_index,
        "scale": projection.scale.flatten(),
        "shift": projection.shift,
        "r2": projection.r2.masked_fill(projection.constant, CONSTANT),
    }


def obstacle(conv: nn.Conv2d) -> str:
    """The reason why no MasterKeyConv2d can replace a convolution, apart from its groups; empty if one can."""
    kind = type(conv)
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return "its forward is replaced"
    stock = kind.forward in (nn.Conv2d.forward, Conv2dSame.forward)
    if not stock or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} has a forward of its own"
    taken = [name for name in (*_ENTRIES, *_ATTRIBUTES) if hasattr(conv, name)]
    return f"its attribute '{taken[0]}' has the name of one that the layer needs" if taken else ""


def _check_geometry(
    in_channels: int, kernel_size: int | tuple[int, int], padding: object, groups: int | None, padding_mode: str
) -> None:
    if groups not in (None, in_channels):
        raise ConversionError(
            f"groups is {groups}, expected {in_channels}, the in_channels of a depthwise layer; take nn.Conv2d for "
            f"others. {_FUSE_FIRST}"
        )
    if kernel_size in (1, (1, 1)):
        raise ConversionError(f"kernel_size is 1x1, expected several taps: one has no shape for a key. {_FUSE_FIRST}")
    if padding == "same_dynamic" and padding_mode != "zeros":
        raise ConversionError(f"padding_mode is '{padding_mode}', expected 'zeros' with padding='same_dynamic'.")


def check_trainable(trainable: str) -> None:
    """Raises ConversionError unless ``trainable`` is a value of ``Trainable``."""
    if trainable not in get_args(Trainable):
        raise ConversionError(f"trainable is {trainable!r}, expected one of {', '.join(get_args(Trainable))}.")
