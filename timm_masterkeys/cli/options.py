"""Options that several commands share, and their values. Torch is imported only when a command runs."""

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import MasterKeysError

if TYPE_CHECKING:
    from ..conversion.config import MasterKeysConfig

DEFAULT_BANK = "babaiee2025"  # as in keys.banks, which imports torch
TRAINABLE = ("none", "shift", "affine", "sigmas")  # as in layers, which imports torch

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
    "--include": {
        "action": "append",
        "metavar": "PATTERN",
        "help": "convert only the layers whose name matches, for example 'stages.0.*'; may be repeated",
    },
    "--exclude": {
        "action": "append",
        "metavar": "PATTERN",
        "help": "do not convert the layers whose name matches; may be repeated",
    },
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


def add_conversion(parser: argparse.ArgumentParser, *more: str) -> None:
    """Adds the options that ``read_config`` reads: the bank, the layers, and those named in ``more``."""
    add_options(parser, "--bank", "--keys-per-kernel", "--include", "--exclude", *more)


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


def read_config(args: argparse.Namespace) -> "MasterKeysConfig":
    """The configuration of the conversion that the options give.

    Raises:
        MasterKeysError: Options that are out of range or contradict each other, or no such bank.
    """
    from ..conversion.config import MasterKeysConfig

    settings = {name: value for name, value in vars(args).items() if name in MasterKeysConfig.__dataclass_fields__}
    return MasterKeysConfig(**settings)


def check_device(device: str) -> None:
    """Raises MasterKeysError unless torch can compute on the device."""
    import torch

    try:
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # each backend raises its own
        raise MasterKeysError(f"torch cannot use the device '{device}': {str(error).splitlines()[0]}") from None
