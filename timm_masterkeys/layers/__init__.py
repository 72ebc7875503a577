"""Layers with frozen keys, and the check whether a convolution can become one."""

from .masterkey import MasterKeyConv2d, Trainable, check_trainable, obstacle
from .sigma_layer import SigmaKeyConv2d

__all__ = ["MasterKeyConv2d", "SigmaKeyConv2d", "Trainable", "check_trainable", "obstacle"]
