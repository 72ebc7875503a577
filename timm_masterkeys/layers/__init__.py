"""Layers with frozen keys, and what says whether a convolution can become one."""

from .masterkey import COMPACT_ENTRIES, MasterKeyConv2d, Trainable, check_trainable, obstacle
from .sigma_layer import ScaledKeyConv2d

__all__ = ["COMPACT_ENTRIES", "MasterKeyConv2d", "ScaledKeyConv2d", "Trainable", "check_trainable", "obstacle"]
