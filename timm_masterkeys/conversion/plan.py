"""The plan of a conversion: its configuration applied to a model, with a reason for each layer that stays dense."""

import logging
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ..errors import BankError, ConversionError
from ..keys.banks import DEFAULT_BANK, BankLike, KeyBank
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
        kernel_size: Kernel size in taps.
        in_channels: Input channels.
        out_channels: Output channels, each with its own kernel.
        reason: Why it is not converted; empty if it is.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """All convolutions of a model, and which of them conversion would replace; ``str()`` is a table.

    Attributes:
        config: The configuration of the conversion.
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
        """The settings of the layers that would be converted, by name."""
        return {layer.name: self.config.layer_settings for layer in self.converted}

    @property
    def skipped(self) -> tuple[PlannedLayer, ...]:
        """The layers that would not be converted."""
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
    model: nn.Module, bank: BankLike = DEFAULT_BANK, *, include: Patterns = None, exclude: Patterns = None
) -> ConversionPlan:
    """Lists the convolutions of a model: which would be converted, and why the others would not. Changes nothing.

    Args:
        model: Any module, wrapped or not.
        bank: Anything ``get_bank`` takes.
        include: As for ``convert_to_masterkeys``.
        exclude: As for ``convert_to_masterkeys``.

    Raises:
        BankError: No such bank.
        ConversionError: A pattern that matches no convolution. In a ``features_only`` model, which may lack the stage,
            this is only a warning.

    Example:
        >>> print(plan_conversion(timm.create_model("convnext_atto"), exclude="stages.0.*"))
    """
    return resolve(MasterKeysConfig(bank, include=include, exclude=exclude), unwrapped(model))


def resolve(config: MasterKeysConfig, model: nn.Module, *, flat_names: bool = False) -> ConversionPlan:
    """The plan of a conversion; errors as for ``plan_conversion``.

    Args:
        config: The configuration.
        model: Any module, not wrapped. Not changed.
        flat_names: Patterns may also use the names of the model's ``features_only`` form (``stages_0.*``); for a
            ``features_only`` model they always may.
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
            message = f"Pattern '{pattern}' matches none of the {len(reasons)} convolutions. {_suggest(candidates)}"
            if not features:
                raise ConversionError(message)
            _logger.warning("%s Features come without the stages after them.", message)
    for name in candidates:
        excluding = next((pattern for pattern in config.exclude if matches(name, pattern)), None)
        if config.include and not any(matches(name, pattern) for pattern in config.include):
            reasons[name] = "not included"
        elif excluding:
            reasons[name] = f"excluded by '{excluding}'"
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
    if isinstance(conv, LazyModuleMixin):
        return "lazy, it has no kernels yet: run the model once first"
    if not is_depthwise(conv):
        return f"not depthwise (groups {conv.groups})"
    if max(conv.kernel_size) == 1:
        return "1x1 kernel has no spatial structure"
    if "weight" not in conv._parameters:
        return "its weight is computed (a parametrization)"
    if reason := obstacle(conv):
        return reason
    other_owners = [owner for owner in owners[id(conv.weight)] if owner != name]
    if other_owners:
        return f"shares its weight with {other_owners[0]}"
    try:
        bank.keys_for(conv.kernel_size)  # type: ignore[arg-type]  # nn.Conv2d's is (int, int)
    except BankError as error:
        return str(error)
    return ""


def _suggest(candidates: list[str]) -> str:
    """A hint for a pattern that matches nothing: names that can be converted, and a pattern for one stage."""
    if not candidates:
        return "None of them can be converted."
    more = ", ..." if len(candidates) > 3 else ""
    stage = stage_of(candidates[0])
    whole = f"; a whole stage is '{stage}.*'" if stage != candidates[0] else ""
    return f"Depthwise are {', '.join(candidates[:3])}{more}{whole}."


def converted_layers(model: nn.Module, required: bool = False) -> dict[str, MasterKeyConv2d]:
    """The converted layers of a model by name; ConversionError if ``required`` and there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}
    if required and not layers:
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    return layers


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise: each input channel has its own kernels."""
    return conv.in_channels == conv.groups > 1


def is_dense_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution that is not converted, with kernels larger than 1x1."""
    if not isinstance(module, nn.Conv2d) or isinstance(module, MasterKeyConv2d):
        return False
    return is_depthwise(module) and max(module.kernel_size) > 1


def stage_of(layer: str) -> str:
    """A layer's name up to its first number; the whole name if it has none."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", layer)
    return match[0] if match else layer


def is_feature_extractor(model: nn.Module) -> bool:
    """Whether a model was created with timm's ``features_only``."""
    return hasattr(model, "feature_info") and not hasattr(model, "get_classifier")


def flat_name(name: str) -> str:
    """A name that is the same in a model and in its ``features_only`` form: without prefix, with ``_`` for dots.

    Example:
        >>> flat_name("model.stages.0.x"), flat_name("stages_0.x")
        ('stages_0_x', 'stages_0_x')
    """
    for prefix in ("model.", "graph_module.", "body."):  # the getter, fx and hook extractors
        name = name.removeprefix(prefix)
    return name.replace(".", "_")
