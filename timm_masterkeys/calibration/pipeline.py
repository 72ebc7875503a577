"""Converts and calibrates a network by a configuration: what stands behind the names, the command line and the zoo."""

from typing import Any

from torch import nn

from ..conversion.config import MasterKeysConfig
from ..conversion.convert import convert
from .agreement import KeyBudget, convert_by_agreement
from .calibrate import CalibrationReport, calibrate_masterkeys


def convert_and_calibrate(
    dense: nn.Module, config: MasterKeysConfig, images: str, flat_names: bool = False, **options: Any
) -> tuple[nn.Module, CalibrationReport | KeyBudget]:
    """Converts and calibrates a copy of a dense network; returns the copy and its figures.

    Args:
        dense: A timm model.
        config: The conversion.
        images: "builtin", or the path of a folder.
        flat_names: As for ``convert``.
        **options: As for ``calibrate_masterkeys`` and ``convert_to_agreement``, such as ``max_images``.

    Raises:
        MasterKeysError: As ``calibrate_masterkeys`` and ``convert_to_agreement``.
    """
    if config.agreement is not None:
        return convert_by_agreement(dense, config, images, flat_names=flat_names, **options)
    model = convert(dense, config, "project", flat_names=flat_names)
    return model, calibrate_masterkeys(model, dense, images, **options)
