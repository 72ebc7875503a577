"""What several commands share: options, checks of their values, and results as text or JSON; without torch."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MasterKeysError

if TYPE_CHECKING:
    from ..conversion.config import MasterKeysConfig

CONVERSION = ("--bank", "--keys-per-kernel", "--include", "--exclude")
DEFAULT_BANK = "babaiee2025"  # as in keys.banks, which imports torch
TRAINABLE = ("none", "shift", "affine", "sigmas")  # as in layers, which imports torch

_MANY: dict[str, Any] = {"action": "append", "metavar": "PATTERN"}  # may be repeated
_SHARED: dict[str, dict[str, Any]] = {
    "sources": {
        "nargs": "+",
        "help": "networks to take kernels from: timm names (their pretrained weights), checkpoints, or .npz files of "
        "arrays (channels, height, width)",
    },
    "--bank": {
        "default": DEFAULT_BANK,
        "help": "the bank, which is the set of keys to convert to: its name, or a .safetensors file that `discover` "
        f"wrote (default: {DEFAULT_BANK}, the eight published keys)",
    },
    "--keys-per-kernel": {
        "type": int,
        "default": 1,
        "metavar": "R",
        "help": "how many keys are added up in each kernel, each with its own scale (default: 1)",
    },
    "--include": _MANY
    | {"help": "convert only the layers whose name matches, for example 'stages.0.*'; may be repeated"},
    "--exclude": _MANY | {"help": "do not convert the layers whose name matches; may be repeated"},
    "--agreement": {
        "type": float,
        "metavar": "SHARE",
        "help": "choose the number of keys of each layer, as few as are needed for the converted and the dense network "
        "to give the same top class for this share of held-out images (0.95 for 95 %%); layers that would need too "
        "many keys stay dense. Takes about seven times as long",
    },
    "--device": {"default": "cpu", "help": "where to compute, for example cuda (default: cpu)"},
    "--license": {
        "metavar": "NAME",
        "help": "the licence of the weights, for example apache-2.0; needed to publish weights whose licence timm does "
        "not know",
    },
    "--private": {"action": "store_true", "default": None, "help": "make a new repository private"},
    "--json": {"action": "store_true", "help": "print the result as JSON, and nothing else"},
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds shared options by name."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that ``load_model`` reads."""
    parser.add_argument(
        "model",
        help="a timm name, for example convnext_tiny.fb_in1k, with or without .mk8; a folder written by convert or by "
        "timm; or a model on the Hub, for example hf-hub:org/name",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="load the pretrained weights of the name")
    weights.add_argument("--checkpoint", metavar="FILE", help="load the weights of a checkpoint into the named model")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="how many classes the checkpoint's classifier has (default: as many as timm's pretrained model)",
    )


def read_config(args: argparse.Namespace, *others: str) -> "MasterKeysConfig":
    """The configuration of the conversion that the options give: those of ``CONVERSION``, and others by name.

    Raises:
        MasterKeysError: Options that are out of range or contradict each other, or no such bank.
    """
    from ..conversion.config import MasterKeysConfig

    names = ("bank", "keys_per_kernel", "include", "exclude", *others)
    return MasterKeysConfig(**{name: getattr(args, name) for name in names})


def check_device(device: str) -> None:
    """Raises MasterKeysError unless torch can compute on the device."""
    import torch

    try:
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # each backend raises its own
        raise MasterKeysError(f"torch cannot use the device '{device}': {str(error).splitlines()[0]}") from None


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
