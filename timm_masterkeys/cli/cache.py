"""``timm-masterkeys cache``."""

import argparse
import time

from .options import add_options, print_result

SUMMARY = "list or remove the calibrated networks that create_model('<name>.mk8', pretrained=True) keeps on disk"
EXAMPLE = "cache --clear"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove them; they are made again when they are needed")
    add_options(parser, "--json")


def run(args: argparse.Namespace) -> None:
    from ..timm_plugin.cache import cache_folder, clear_entries, list_entries

    root = cache_folder()
    if args.clear:
        removed = clear_entries(root)
        print_result(args, {"folder": root, "removed": removed}, f"removed {removed} from {root}")
        return
    entries = list_entries(root)
    width = max((len(entry.path.name) for entry in entries), default=0)
    lines = []
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(f"{entry.path.name:<{width}}  {entry.size / 1e6:>8,.1f} MB  last used {used}\n")
    print_result(args, {"folder": root, "entries": entries}, f"{''.join(lines)}{len(entries)} in {root}")
