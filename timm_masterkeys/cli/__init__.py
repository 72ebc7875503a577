"""The command ``timm-masterkeys``: one module for each of its commands, with the options and the code that uses them.

Modules that need torch or timm are imported where a command runs, see ``timm_masterkeys_cli``.
"""

from .command_line import main

__all__ = ["main"]
