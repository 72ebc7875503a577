"""``timm-masterkeys discover``."""

import argparse
import os
from pathlib import Path

from ..errors import MasterKeysError
from .compare import describe_matches
from .options import DEFAULT_BANK, add_options, check_device, check_file, print_result

SUMMARY = "search networks' depthwise kernels for the few keys that fit them best, and save them as a bank; needs scipy"
EXAMPLE = "discover convnext_tiny mine.safetensors --hold-out mine.safetensors --output bank.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_options(parser, "sources")
    add("--kernel-size", type=int, default=7, metavar="K", help="take only the K x K kernels (default: 7)")
    add(
        "--keys",
        type=int,
        metavar="N",
        help="how many keys to find, at most 25 (default: the number after which more keys improve the fit little)",
    )
    add(
        "--hold-out",
        action="append",
        default=[],
        metavar="SOURCE",
        help="one of the networks, to measure the fit of the keys on; it is left out of the search. May be repeated",
    )
    add(
        "--method",
        default="autoencoder",
        choices=["autoencoder", "lines"],
        help="'autoencoder' is the search of the master keys paper: an autoencoder, which is a network that squeezes "
        "each kernel through one number, proposes keys, and the least useful key is dropped again and again. 'lines' "
        "is faster: kernels are points, and the keys are the lines through the origin that lie nearest to these points "
        "(default: autoencoder)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="start of the random numbers; the same seed finds the same keys (default: 0)",
    )
    add("--output", required=True, metavar="FILE", help="the .safetensors file to write the bank to")
    add_options(parser, "--device", "--json")


def run(args: argparse.Namespace) -> None:
    check_file(args.output, ".safetensors")
    if os.path.realpath(args.output) in map(os.path.realpath, args.sources):
        raise MasterKeysError(f"--output '{args.output}' is one of the sources: name another file.")
    from ..study.discovery import collect_kernels, discover_bank, match_banks
    from ..study.kernels import name_sources

    check_device(args.device)
    match_banks(DEFAULT_BANK, DEFAULT_BANK)  # needs scipy: before the search, not after it
    sources = name_sources(args.sources)
    result = discover_bank(
        collect_kernels(sources, args.kernel_size),
        keys=args.keys,
        held_out=[source if source in sources else os.path.basename(source) for source in args.hold_out],
        method=args.method,
        seed=args.seed,
        name=Path(args.output).stem,
        device=args.device,
    )
    result.bank.save(args.output)
    matches = match_banks(result.bank, DEFAULT_BANK, (args.kernel_size, args.kernel_size))
    bank = {"name": result.bank.name, "keys": len(result.bank), "source": result.bank.source, "file": args.output}
    text = (
        f"{result}\n{describe_matches(result.bank.name, DEFAULT_BANK, matches)}\n\n"
        f"saved to {args.output}: convert_to_masterkeys(model, bank='{args.output}') takes it"
    )
    print_result(args, {**vars(result), "bank": bank, "matches": matches}, text)
