"""Master key filters for timm: depthwise kernels as affine images of a few frozen keys."""

from .banks import KeyBank, get_bank, list_banks
from .errors import BankError, CheckpointError, ConversionError, MasterKeysError, ProjectionError
from .layers import MasterKeyConv2d
from .projection import Projection, project_kernels
from .report import ConversionReport, LayerReport, conversion_report
from .surgery import (
    ConversionPlan,
    PlannedLayer,
    convert_to_masterkeys,
    fuse_masterkeys,
    initialize_masterkeys,
    plan_conversion,
)
