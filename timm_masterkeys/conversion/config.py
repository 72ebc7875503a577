"""The configuration of a conversion, and the settings of one converted layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConversionError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank, get_bank
from ..keys.projection import check_keys_per_kernel
from ..layers import MasterKeyConv2d, SigmaKeyConv2d, Trainable, check_trainable

Patterns = str | Sequence[str] | None

_RENAMED = {"scales": "sigmas"}  # values of ``trainable`` in saved files of the first format


@dataclass(frozen=True)
class LayerSettings:
    """The settings of one layer; ``sigmas``: each of its kernels has its own sigmas (``SigmaKeyConv2d``)."""

    bank: KeyBank
    keys_per_kernel: int = 1
    trainable: Trainable = "shift"
    sigmas: bool = False

    @classmethod
    def from_layer(cls, layer: MasterKeyConv2d) -> "LayerSettings":
        """The settings of a converted layer."""
        return cls(layer.bank, layer.keys_per_kernel, layer.trainable, layer.has_sigmas)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON data, with the bank's digest."""
        return {
            "bank": self.bank.digest,
            "keys_per_kernel": self.keys_per_kernel,
            "trainable": self.trainable,
            "sigmas": self.sigmas,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], banks: Mapping[str, KeyBank]) -> "LayerSettings":
        """The settings from the data of ``to_dict`` and the banks by digest; CheckpointError for unknown values."""
        try:
            settings = cls(banks[data["bank"]], data["keys_per_kernel"], _renamed(data["trainable"]), data["sigmas"])
            check_trainable(settings.trainable)
            check_keys_per_kernel(settings.keys_per_kernel, settings.bank)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{dict(data)} are no settings that this version knows ({error!r}).") from None
        return settings


@dataclass(frozen=True)
class MasterKeysConfig:
    """The configuration of a conversion, for functions, ``.mk8`` names, the command line and saved files alike.

    Args:
        bank: Anything ``get_bank`` takes; kept as a KeyBank.
        keys_per_kernel: Keys per kernel, from 1 to the size of the bank; fewer at kernel sizes that have fewer keys.
        trainable: What is trained of each kernel afterwards: "none", "shift", "affine" or "sigmas".
        include: fnmatch pattern(s) on module names: only layers that match one are converted. Kept as a tuple.
        exclude: fnmatch pattern(s) on module names: layers that match one stay dense. Kept as a tuple.
        agreement: In (0, 1]: choose the keys of each layer by ``convert_to_agreement``; None to give every layer
            ``keys_per_kernel``.

    Raises:
        BankError: No such bank.
        ProjectionError: ``keys_per_kernel`` is out of range.
        ConversionError: Any other invalid value, or values that exclude each other.

    Example:
        >>> config = MasterKeysConfig(keys_per_kernel=4, exclude="stages.0.*")
        >>> MasterKeysConfig.from_dict(config.to_dict()) == config
        True
    """

    bank: KeyBank
    keys_per_kernel: int
    trainable: Trainable
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    agreement: float | None

    def __init__(  # by hand, as the arguments take more types than the fields have
        self,
        bank: BankLike = DEFAULT_BANK,
        keys_per_kernel: int = 1,
        trainable: Trainable = "shift",
        include: Patterns = None,
        exclude: Patterns = None,
        agreement: float | None = None,
    ) -> None:
        bank = get_bank(bank)
        check_keys_per_kernel(keys_per_kernel, bank)
        check_trainable(trainable)
        if trainable == "sigmas":
            SigmaKeyConv2d.check_settings(bank, keys_per_kernel)
        _check_agreement(agreement, keys_per_kernel, trainable)
        patterns = _as_tuple("include", include), _as_tuple("exclude", exclude)
        values = (bank, keys_per_kernel, trainable, *patterns, agreement)
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def layer_settings(self) -> LayerSettings:
        """The settings of every converted layer."""
        return LayerSettings(self.bank, self.keys_per_kernel, self.trainable, self.trainable == "sigmas")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON data, with the bank's name and digest."""
        return {
            "bank": {"name": self.bank.name, "digest": self.bank.digest},
            "keys_per_kernel": self.keys_per_kernel,
            "trainable": self.trainable,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "agreement": self.agreement,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], banks: Iterable[KeyBank] = ()) -> "MasterKeysConfig":
        """The configuration from the data of ``to_dict``; the bank is found in ``banks`` by digest, else by its name.

        Raises:
            BankError: No such bank.
            CheckpointError: The bank of this name has another digest.
            ConversionError, ProjectionError: As for the class.
        """
        digest = data["bank"]["digest"]
        matching = next((bank for bank in banks if bank.digest == digest), None)
        bank = matching or get_bank(data["bank"]["name"])
        if bank.digest != digest:
            raise CheckpointError(f"Bank '{bank.name}' is not the one described ({digest[:12]}...): give that bank.")
        return cls(**{**data, "bank": bank, "trainable": _renamed(data["trainable"])})


def _renamed(trainable: Any) -> Any:
    return _RENAMED.get(trainable, trainable)


def _as_tuple(name: str, patterns: Patterns) -> tuple[str, ...]:
    values = (patterns,) if isinstance(patterns, str) else patterns or ()
    values = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(pattern, str) for pattern in values):
        raise ConversionError(f"{name} is {patterns!r}, expected a pattern on module names, or a list of such.")
    return values


def _check_agreement(agreement: Any, keys_per_kernel: int, trainable: Trainable) -> None:
    if agreement is None:
        return
    if isinstance(agreement, bool) or not isinstance(agreement, (int, float)) or not 0 < agreement <= 1:
        raise ConversionError(f"agreement is {agreement!r}, expected more than 0, at most 1 (0.95 for 95 %).")
    if keys_per_kernel != 1:
        raise ConversionError("agreement chooses the keys of each layer: drop keys_per_kernel.")
    if trainable == "sigmas":
        raise ConversionError("trainable is 'sigmas', which has one key per kernel: agreement has no number to choose.")
