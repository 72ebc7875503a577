"""``timm-masterkeys list``."""

import argparse

from ..errors import MasterKeysError

SUMMARY = "list the names of converted models that timm.create_model takes"
EXAMPLE = "list 'mobilenet*' --pretrained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "pattern",
        nargs="?",
        default="*",
        help="list only architectures that match, for example 'convnext*' (default: all)",
    )
    add("--pretrained", action="store_true", help="list each name that has pretrained weights, with the weights' tag")


def run(args: argparse.Namespace) -> None:
    import timm

    from ..timm_plugin.published import list_architectures

    names = timm.list_models(f"{args.pattern}.mk8*", pretrained=args.pretrained, include_tags=True)
    if not args.pretrained:
        names = [name for name in names if name.endswith(".mk8")]
    if not names:
        count = len(list_architectures())
        raise MasterKeysError(
            f"None of the {count} architectures with depthwise convolutions matches '{args.pattern}'."
        )
    print("\n".join(names))
