"""Checks output paths before the work of a command, and prints its result."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import MasterKeysError


def check_file(path: str, suffix: str = "") -> None:
    """Raises MasterKeysError unless the file's name ends in the suffix and its folder can be written into."""
    folder = Path(path).absolute().parent
    if not path.endswith(suffix):
        raise MasterKeysError(f"Cannot write '{path}': expected a name that ends in {suffix}.")
    if not folder.is_dir():
        raise MasterKeysError(f"Cannot write '{path}': there is no folder '{folder}'.")
    if Path(path).is_dir():
        raise MasterKeysError(f"Cannot write '{path}': it is a folder, expected the name of a file.")
    check_folder(str(folder))


def check_folder(path: str) -> None:
    """Raises MasterKeysError unless the folder can be written into, or be created."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-"):
            pass
    except OSError as error:
        raise MasterKeysError(f"Cannot write into '{path}': {error.strerror}: '{folder}'.") from error


def print_result(args: argparse.Namespace, value: Any, text: Any) -> None:
    """Prints a text, or with ``--json`` dataclasses, mappings and lists as JSON; NaN and infinity become null."""
    if args.json:
        plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: None)
        text = json.dumps(plain, indent=2)
    print(text)


def _plain(value: Any) -> Any:
    """A value that ``json`` does not know, as JSON data: a path as a string, a dataclass as a dictionary."""
    return str(value) if isinstance(value, Path) else vars(value)
