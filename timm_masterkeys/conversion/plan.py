"""The plan of a conversion: its description resolved against a model, with a reason for each layer that stays dense."""

import logging
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import BankError, ConversionError
from ..keys.banks import DEFAULT_BANK, Bank, KeyBank
from ..layers import MasterKeyConv2d, obstacle
from .config import LayerSettings, MasterKeysConfig, Patterns
from .table import table
from .wrapped import unwrapped

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedLayer:
    """One convolution of a model.

    Attributes:
        name: Module name.
        kind: Name of its class.
        kernel_size: Taps.
        in_channels: Channels it takes.
        out_channels: Kernels, the channels it gives.
        reason: Why it stays as it is; empty if it is converted.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """Every convolution of a model and what conversion would do with it; ``str()`` is a table.

    Attributes:
        config: The description of the conversion.
        layers: The model's convolutions.
    """

    config: MasterKeysConfig
    layers: tuple[PlannedLayer, ...]

    @property
    def converted(self) -> tuple[PlannedLayer, ...]:
        """The layers that would be converted."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def settings(self) -> dict[str, LayerSettings]:
        """The settings of the layers that would be converted, by their names."""
        return {layer.name: self.config.layer for layer in self.converted}

    @property
    def skipped(self) -> tuple[PlannedLayer, ...]:
        """The layers that would stay as they are."""
        return tuple(layer for layer in self.layers if layer.reason)

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.kernel_size)),
                f"{layer.in_channels} -> {layer.out_channels}",
                f"stays dense: {layer.reason}" if layer.reason else "convert",
            )
            for layer in self.layers
        ]
        kernels = sum(layer.out_channels for layer in self.converted)
        total = f"{len(self.converted)} of {len(self.layers)} convolutions to convert, {kernels:,} kernels"
        return "\n".join([table(("layer", "type", "kernel", "channels", "action"), rows, "<<>><"), total])


def plan_conversion(
    model: nn.Module, bank: Bank = DEFAULT_BANK, *, include: Patterns = None, exclude: Patterns = None
) -> ConversionPlan:
    """Lists every convolution of a model: converted, or skipped and why. A dry run: nothing is changed.

    Args:
        model: Any module, wrapped or not.
        bank: Anything ``get_bank`` takes.
        include: As for ``convert_to_masterkeys``.
        exclude: As for ``convert_to_masterkeys``.

    Raises:
        BankError: No such bank.
        ConversionError: A pattern that matches no convolution (in a ``features_only`` model, which may lack its stage,
            that is a warning).

    Example:
        >>> print(plan_conversion(timm.create_model("convnext_atto"), exclude="stages.0.*"))
    """
    return resolve(MasterKeysConfig(bank, include=include, exclude=exclude), unwrapped(model))


def resolve(config: MasterKeysConfig, model: nn.Module, *, flat_names: bool = False) -> ConversionPlan:
    """The plan of a conversion; errors as for ``plan_conversion``.

    Args:
        config: The description.
        model: Any module, not wrapped. Not changed.
        flat_names: Patterns may also be on names as in the model's ``features_only`` form (``stages_0.*``).
    """
    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)

    reasons = {name: _why_dense(name, conv, config.bank, owners) for name, conv in convs}
    candidates = [name for name, reason in reasons.items() if not reason]
    features = is_feature_extractor(model)
    flat_names = flat_names or features

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or (flat_names and fnmatchcase(flat_name(name), flat_name(pattern)))

    for pattern in (*config.include, *config.exclude):
        if not any(matches(name, pattern) for name in reasons):
            message = f"Pattern '{pattern}' matches none of the {len(reasons)} convolutions. {_named(candidates)}"
            if not features:
                raise ConversionError(message)
            _logger.warning("%s Features come without the stages after them.", message)
    for name in candidates:
        hit = next((pattern for pattern in config.exclude if matches(name, pattern)), None)
        if config.include and not any(matches(name, pattern) for pattern in config.include):
            reasons[name] = "not included"
        elif hit:
            reasons[name] = f"excluded by '{hit}'"
    layers = (
        PlannedLayer(n, type(c).__name__, tuple(c.kernel_size), c.in_channels, c.out_channels, reasons[n])
        for n, c in convs
    )
    return ConversionPlan(config, tuple(layers))


def _why_dense(name: str, conv: nn.Module, bank: KeyBank, owners: dict[int, list[str]]) -> str:
    """Why a convolution cannot be converted; empty if it can."""
    if isinstance(conv, MasterKeyConv2d):
        return f"converted already (bank {conv.bank.name})"
    if not isinstance(conv, nn.Conv2d):
        return "not a Conv2d"
    if not conv.in_channels == conv.groups > 1:
        return f"not depthwise (groups {conv.groups})"
    if max(conv.kernel_size) == 1:
        return "1x1 kernel has no spatial structure"
    if "weight" not in conv._parameters:
        return "its weight is computed (a parametrization)"
    if reason := obstacle(conv):
        return reason
    others = [owner for owner in owners[id(conv.weight)] if owner != name]
    if others:
        return f"shares its weight with {others[0]}"
    try:
        bank.keys_for(conv.kernel_size)  # type: ignore[arg-type]  # nn.Conv2d's is (int, int)
    except BankError as error:
        return str(error)
    return ""


def _named(candidates: list[str]) -> str:
    """Suggested names and a pattern of one that matches nothing."""
    if not candidates:
        return "None of them can be converted."
    more = ", ..." if len(candidates) > 3 else ""
    stage = stage_of(candidates[0])
    whole = f"; a whole stage is '{stage}.*'" if stage != candidates[0] else ""
    return f"Depthwise are {', '.join(candidates[:3])}{more}{whole}."


def is_dense_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution with kernels of several taps that is not converted."""
    if not isinstance(module, nn.Conv2d) or isinstance(module, MasterKeyConv2d):
        return False
    return module.in_channels == module.groups > 1 and max(module.kernel_size) > 1


def stage_of(layer: str) -> str:
    """A layer's name up to its first number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", layer)
    return found[0] if found else layer


def is_feature_extractor(model: nn.Module) -> bool:
    """Whether a model is one of timm's ``features_only`` kinds."""
    return hasattr(model, "feature_info") and not hasattr(model, "get_classifier")


def flat_name(name: str) -> str:
    """A module name free of what ``features_only`` changes: ``model.stages.0.x``, ``stages_0.x`` -> ``stages_0_x``."""
    for prefix in ("model.", "graph_module.", "body."):  # the getter, fx and hook extractors
        name = name.removeprefix(prefix)
    return name.replace(".", "_")
