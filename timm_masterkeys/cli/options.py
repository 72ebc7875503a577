"""Options that several commands share, and what they mean."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..conversion.config import MasterKeysConfig

DEFAULT_BANK = "babaiee2025"  # as keys.banks has it, which imports torch
TRAINABLE = ("none", "shift", "affine", "scales")  # as layers has it


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def add_model(parser: argparse.ArgumentParser, kernel_files: bool = False) -> None:
    """Adds what ``load_model`` reads.

    Args:
        parser: Of the command.
        kernel_files: Whether the model may also be a file of kernels.
    """
    also = "; or a .safetensors or .npz file of kernels" if kernel_files else ""
    parser.add_argument(
        "model",
        help="a timm name, as convnext_tiny.fb_in1k (its .mk8 name means the same); a folder written by convert or by "
        f"timm; a model on the Hub, as hf-hub:org/name{also}",
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
    parser.set_defaults(kernel_files=kernel_files)


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """Adds what ``read_config`` reads."""
    parser.add_argument(
        "--bank",
        default=DEFAULT_BANK,
        help="the set of keys to convert to: its name, or a .safetensors file as `discover` writes it "
        "(default: %(default)s, the eight published keys)",
    )
    parser.add_argument(
        "--keys-per-kernel",
        type=int,
        default=1,
        metavar="R",
        help="how many keys, each with its own scale, are added up in a kernel (default: 1)",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="convert only the layers whose name matches, as 'stages.0.*'; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave the layers whose name matches as they are; may be repeated",
    )


def add_agreement(parser: argparse.ArgumentParser) -> None:
    """Adds ``--agreement``, which ``read_config`` reads too."""
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="choose the number of keys of each layer, as few as are needed for the converted and the dense network to "
        "give the same top class for this share of held-out images (0.95 for 95 %%); layers that would need too many "
        "stay dense. Takes about seven times as long",
    )


def read_config(args: argparse.Namespace) -> "MasterKeysConfig":
    """The description of the conversion that the options ask for.

    Raises:
        MasterKeysError: Options that are out of range or contradict each other, or no such bank.
    """
    from ..conversion.config import MasterKeysConfig

    given = {name: value for name, value in vars(args).items() if name in MasterKeysConfig.__dataclass_fields__}
    return MasterKeysConfig(**given)


def given_options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of some options that were given, to pass them on; the others keep the default of what is called."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
