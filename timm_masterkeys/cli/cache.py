"""``timm-masterkeys cache``."""

import argparse
import time

from .options import add_json
from .outputs import print_json

SUMMARY = "list or remove the calibrated networks that create_model('<name>.mk8', pretrained=True) keeps on disk"
EXAMPLE = "cache --clear"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--clear", action="store_true", help="remove them; they are made again when they are needed")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Prints or removes the entries of the cache."""
    from ..timm_plugin.cache import cache_folder, clear_entries, list_entries

    root = cache_folder()
    if args.clear:
        removed = clear_entries(root)
        if args.json:
            print_json({"folder": root, "removed": removed})
        else:
            print(f"removed {removed} from {root}")
        return
    entries = list_entries(root)
    if args.json:
        print_json({"folder": root, "entries": entries})
        return
    width = max((len(entry.path.name) for entry in entries), default=0)
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.path.name:<{width}}  {entry.size / 1e6:>8,.1f} MB  last used {used}")
    print(f"{len(entries)} in {root}")
