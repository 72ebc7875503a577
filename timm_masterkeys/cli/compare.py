"""``timm-masterkeys compare``."""

import argparse
from collections.abc import Sequence

from .options import DEFAULT_BANK, add_json
from .outputs import print_json

SUMMARY = "show how well banks of keys fit the depthwise kernels of networks, for each size of kernel"
EXAMPLE = "compare convnext_tiny mine.safetensors --bank babaiee2025 --bank bank.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "sources",
        nargs="+",
        help="the networks: timm names (their pretrained weights), checkpoints, or .npz files of arrays (channels, "
        "height, width)",
    )
    parser.add_argument(
        "--bank",
        action="append",
        default=[],
        help="a bank, by its name or as a .safetensors file; may be repeated; of two, the keys are matched with each "
        "other (default: the published keys, babaiee2025, and eight random ones, random8:0)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the fit, and of two banks how alike their keys are."""
    from ..keys.banks import get_bank
    from ..study.analysis import compare_networks
    from ..study.discovery import match_banks

    banks = [get_bank(bank) for bank in args.bank]
    size = min([7, *(side for bank in banks for side in bank.keys.shape[1:])])
    matches = match_banks(banks[0], banks[1], (size, size)) if len(banks) == 2 else []
    found = compare_networks(args.sources, banks or [DEFAULT_BANK, "random8:0"])
    if args.json:
        print_json({"rows": found.rows, "matches": matches})
        return
    print(found)
    if matches:
        print_matches(banks[0].name, banks[1].name, matches)


def print_matches(bank: str, other: str, matches: Sequence[tuple[int, int, float]]) -> None:
    """Prints which key of a bank was matched with which of another, and their correlation."""
    print(f"keys of {bank} and of {other}, matched one to one, and their correlation:")
    print("  ".join(f"{own + 1}-{others + 1} {value:.2f}" for own, others, value in matches))
