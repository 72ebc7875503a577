"""Reads the command line of ``timm-masterkeys`` and runs the command."""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..errors import MasterKeysError
from ..version import __version__

COMMANDS = ("list", "inspect", "convert", "discover", "compare", "publish", "zoo", "cache")

_WORDS = """words:
  kernel     the k x k weights of one channel of a depthwise convolution
  key        one of a few fixed patterns; a kernel becomes scale * key + shift
  bank       a set of keys
  dense      a network as it was before conversion, with ordinary kernels
  fit, R2    how much of a kernel's variance scale * key + shift explains, 0 to 1
  calibrate  adjust a converted network to its dense one, with images but
             without labels
  agreement  the share of images for which the converted and the dense network
             give the same top class; measured on images not used to calibrate

examples:
  timm-masterkeys list 'convnext*'
  timm-masterkeys inspect convnext_tiny --pretrained
  timm-masterkeys convert convnext_tiny --pretrained --output out
  timm-masterkeys publish out me/convnext_tiny.mk8 --dry-run

timm-masterkeys COMMAND --help explains the options of a command.
"""


def main(argv: Sequence[str] | None = None, before_command: Callable[[], None] = lambda: None) -> int:
    """Reads the arguments and runs the command.

    Args:
        argv: Arguments without the program's name; those of the process if None.
        before_command: Called once the arguments are read, before the command runs.

    Returns:
        The exit code: 0; 1 after an error, which is one line on stderr; 130 after Ctrl-C. Wrong usage exits with 2.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name the terminal cannot show is no reason to fail after the work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _read_arguments(argv)
        before_command()
        _configure_logging(args.verbose)
        args.run(args)
        print(end="", flush=True)  # there is no sys.stdout where it is closed
    except KeyboardInterrupt:
        print("timm-masterkeys: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as in `timm-masterkeys list | head`
        sys.stdout = open(os.devnull, "w")
        return 0
    except (MasterKeysError, RuntimeError, ValueError, OSError, ImportError) as error:
        if args.verbose:
            raise
        print(f"timm-masterkeys: error: {_in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="timm-masterkeys",
        description="Converts the depthwise convolutions of timm models to master key filters.",
        epilog=_WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        command: Any = import_module(f".{name}", __package__)
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=f"example: timm-masterkeys {command.EXAMPLE}",
        )
        command.add_arguments(subparser)
        subparser.add_argument(
            "-v", "--verbose", action="store_true", help="print what is being done, and the traceback of an error"
        )
        subparser.set_defaults(run=command.run, parser=subparser)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):  # as a shell passes an unset variable
            args.parser.error(f"argument {name.replace('_', '-')} is empty. Is it a variable that is not set?")
    return args


def _configure_logging(verbose: bool) -> None:
    """Shows warnings of this package; with ``verbose``, information of all packages."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("timm_masterkeys").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


def _in_one_line(error: BaseException) -> str:
    """The message of an error in one line, shortened: the names of a state dict alone would fill pages."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 600 else f"{text[:500]} ... (-v shows all of it)"
