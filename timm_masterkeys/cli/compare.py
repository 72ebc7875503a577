"""``timm-masterkeys compare``."""

import argparse
from collections.abc import Sequence

from .options import add_options, print_result

SUMMARY = "show how well banks of keys fit the depthwise kernels of networks, for each size of kernel"
EXAMPLE = "compare convnext_tiny mine.safetensors --bank babaiee2025 --bank bank.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "sources")
    parser.add_argument(
        "--bank",
        action="append",
        default=[],
        help="a bank, which is a set of keys: its name, or a .safetensors file that `discover` wrote; may be repeated; "
        "of two banks, the keys are also matched with each other, which needs scipy (default: the eight published "
        "keys, babaiee2025, and eight random ones, random8:0)",
    )
    add_options(parser, "--json")


def run(args: argparse.Namespace) -> None:
    from ..keys.banks import get_bank
    from ..study.analysis import DEFAULT_BANKS, compare_networks
    from ..study.discovery import match_banks

    banks = [get_bank(bank) for bank in args.bank]
    size = min([7, *(side for bank in banks for side in bank.keys.shape[1:])])
    matches = match_banks(banks[0], banks[1], (size, size)) if len(banks) == 2 else []
    comparison = compare_networks(args.sources, banks or DEFAULT_BANKS)
    text = f"{comparison}\n{describe_matches(banks[0].name, banks[1].name, matches)}" if matches else comparison
    print_result(args, {"rows": comparison.rows, "matches": matches}, text)


def describe_matches(bank: str, other: str, matches: Sequence[tuple[int, int, float]]) -> str:
    """Text of the pairs of matched keys of two banks, by number, with their correlations."""
    pairs = "  ".join(f"{key + 1}-{other_key + 1} {correlation:.2f}" for key, other_key, correlation in matches)
    return f"keys of {bank} and of {other}, matched one to one, and their correlation:\n{pairs}"
