"""What is saved of a converted model: gathered and checked before anything is written or sent."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from ..conversion.plan import converted_layers
from ..conversion.record import Record, Source, tied
from ..conversion.report import ConversionReport, report_layers
from ..conversion.wrapped import check_whole, quantised_entry, unwrapped
from ..errors import ConversionError
from ..layers import MasterKeyConv2d
from ..version import __version__
from .license import saved_source
from .weights import SECTION, describe_layers

# Entries of config.json that come from the model; the user can add others, such as label names.
OWN_ENTRIES = (
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    SECTION,
)


@dataclass(frozen=True)
class Contents:
    """What is saved of a model beside its weights."""

    model: nn.Module  # converted, not wrapped
    layers: Mapping[str, MasterKeyConv2d]  # its converted layers, by name
    cfg: Mapping[str, Any]  # its ``pretrained_cfg``
    report: ConversionReport
    record: Record  # to save, with what the user says of the source
    known_source: Source | None  # the model's own, without that
    section: Mapping[str, Any]  # ``masterkeys`` of config.json, without the digests of the files
    extra: Mapping[str, Any]  # the user's entries of config.json

    @property
    def source(self) -> Source:
        """The source of the weights, as far as it is known."""
        return self.record.source or Source()

    @property
    def is_usable(self) -> bool:
        """Whether the model was calibrated, or needs no calibration: random keys are trained."""
        calibrated = self.record.was_calibrated and not self.record.converted_since
        return calibrated or self.report.total.random == self.report.total.channels


def gather_contents(
    model: nn.Module, license: str | None = None, base_model: str | None = None, config: Mapping[str, Any] | None = None
) -> Contents:
    """Gathers what is saved of a model; arguments and errors as for ``save_pretrained``. Changes nothing."""
    model = unwrapped(model)
    check_whole(model)
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg, or no classes), so timm could not "
            "load it again. Save its state_dict instead."
        )
    layers = converted_layers(model, required=True)
    extra = {} if config is None else config
    _check_extra(extra)
    report = report_layers(model, layers)
    _check_finite(model)
    banks = {layer.bank for layer in layers.values()}
    record = replace(
        report.record,  # of conversions that were undone since, the files do not hold the bank
        conversions=tuple(conversion for conversion in report.record.conversions if conversion.bank in banks),
        source=saved_source(report.record.source, license, base_model),
    )
    record = tied(record, layers)
    r2 = report.total.mean_r2
    section = {
        **describe_layers(layers),
        **record.to_dict(),
        "kernels": report.total.channels,
        "mean_r2": None if math.isnan(r2) else round(r2, 4),
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    return Contents(model, layers, dict(cfg), report, record, report.record.source, section, dict(extra))


def _check_extra(extra: Any) -> None:
    if not isinstance(extra, Mapping):
        raise ConversionError(f"config is {extra!r:.200}, expected a mapping with entries for config.json.")
    reserved = [name for name in extra if name in OWN_ENTRIES]
    if reserved:
        raise ConversionError(f"config holds {', '.join(reserved)}, which come from the model. Leave them out.")
    try:
        json.dumps(dict(extra))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config cannot be written as JSON: {error}.") from None


def _check_finite(model: nn.Module) -> None:
    """Raises ConversionError if a model is quantised, lacks values, or holds NaN or Inf."""
    if entry := quantised_entry(model):
        raise ConversionError(
            f"{entry}, expected ordinary tensors, of which timm makes a model again. Save the model before it is "
            "quantised, and quantise what is loaded."
        )
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ConversionError(f"{name} has no values: it is on the meta device, or offloaded. Load weights first.")
        if not value.isfinite().all():
            raise ConversionError(f"{name} holds NaN or Inf. Fix the weights, then save.")
