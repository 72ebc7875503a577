"""Layers with frozen keys. Importing them here registers the scaled one with ``MasterKeyConv2d.from_conv``."""

from .masterkey import MasterKeyConv2d, Trainable, check_trainable
from .scaled import ScaledKeyConv2d

__all__ = ["MasterKeyConv2d", "ScaledKeyConv2d", "Trainable", "check_trainable"]
