"""Master key filters for timm: depthwise kernels as affine images of a few frozen keys."""

from .calibration.agreement import KeyBudget, TriedNetwork, convert_to_agreement
from .calibration.calibrate import CalibrationReport, calibrate_masterkeys
from .calibration.images import builtin_images
from .calibration.stages import StageReport
from .conversion.config import MasterKeysConfig
from .conversion.convert import convert_to_masterkeys, fuse_masterkeys, initialize_masterkeys
from .conversion.plan import ConversionPlan, PlannedLayer, plan_conversion
from .conversion.report import ConversionReport, LayerReport, conversion_report
from .errors import (
    BankError,
    CalibrationError,
    CheckpointError,
    ConversionError,
    HubError,
    MasterKeysError,
    ProjectionError,
    ZooError,
)
from .hub.publish import Publication, push_to_hub
from .hub.save import save_pretrained
from .hub.weights import load_compact, save_compact
from .keys.banks import KeyBank, get_bank, list_banks
from .keys.projection import Projection, project_kernels
from .layers import MasterKeyConv2d, SigmaKeyConv2d
from .timm_plugin.names import register_names
from .timm_plugin.published import list_architectures, use_weights
from .version import __version__

__all__ = [
    "BankError",
    "CalibrationError",
    "CalibrationReport",
    "CheckpointError",
    "ConversionError",
    "ConversionPlan",
    "ConversionReport",
    "HubError",
    "KeyBank",
    "KeyBudget",
    "LayerReport",
    "MasterKeyConv2d",
    "MasterKeysConfig",
    "MasterKeysError",
    "PlannedLayer",
    "Projection",
    "ProjectionError",
    "Publication",
    "SigmaKeyConv2d",
    "StageReport",
    "TriedNetwork",
    "ZooError",
    "__version__",
    "builtin_images",
    "calibrate_masterkeys",
    "conversion_report",
    "convert_to_agreement",
    "convert_to_masterkeys",
    "fuse_masterkeys",
    "get_bank",
    "initialize_masterkeys",
    "list_architectures",
    "list_banks",
    "load_compact",
    "plan_conversion",
    "project_kernels",
    "push_to_hub",
    "register_names",
    "save_compact",
    "save_pretrained",
    "use_weights",
]

register_names()
