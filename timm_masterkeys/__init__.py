"""Master key filters for timm: depthwise kernels as affine images of a few frozen keys."""

from importlib.metadata import version

__version__ = version("timm_masterkeys")

from .banks import KeyBank, get_bank, list_banks
from .calibrate import CalibrationReport, calibrate_masterkeys
from .checkpoint import load_compact, save_compact
from .errors import (
    BankError,
    CalibrationError,
    CheckpointError,
    ConversionError,
    HubError,
    MasterKeysError,
    ProjectionError,
)
from .hub import Publication, push_to_hub, save_pretrained
from .images import builtin_images
from .layers import MasterKeyConv2d, ScaledKeyConv2d
from .projection import Projection, project_kernels
from .registry import list_architectures, register_names, use_weights
from .report import ConversionReport, LayerReport, conversion_report
from .surgery import (
    ConversionPlan,
    PlannedLayer,
    convert_to_masterkeys,
    fuse_masterkeys,
    initialize_masterkeys,
    plan_conversion,
)
from .walk import StageReport

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
    "LayerReport",
    "MasterKeyConv2d",
    "MasterKeysError",
    "PlannedLayer",
    "Projection",
    "ProjectionError",
    "Publication",
    "ScaledKeyConv2d",
    "StageReport",
    "builtin_images",
    "calibrate_masterkeys",
    "conversion_report",
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
