"""The command ``timm-masterkeys``: a module for each of its commands, with the options beside what they do.

Modules that need torch or timm are imported where a command runs, see ``timm_masterkeys_cli``.
"""

from .command_line import main

__all__ = ["main"]
