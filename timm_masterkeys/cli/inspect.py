"""``timm-masterkeys inspect``."""

import argparse
from typing import TYPE_CHECKING

from ..errors import MasterKeysError
from .options import add_conversion, add_json, add_model, read_config
from .outputs import check_file, print_json

if TYPE_CHECKING:
    from torch import nn

    from ..conversion.report import ConversionReport

SUMMARY = "show which layers of a model are converted, and with weights how well the keys fit each layer"
EXAMPLE = "inspect convnext_tiny --pretrained --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_model(parser, kernel_files=True)
    add_conversion(parser)
    add_json(parser)
    parser.add_argument("--html", metavar="FILE", help="also write the fit as a page with pictures (needs matplotlib)")


def run(args: argparse.Namespace) -> None:
    """Prints the plan, and the fit of a model with weights."""
    from .load_model import has_weights, is_converted, load_model

    config = read_config(args)
    if args.html:
        if not has_weights(args):
            raise MasterKeysError("Random weights have no fit to draw. Add --pretrained or --checkpoint FILE.")
        check_file(args.html)
        from ..study import page  # noqa: F401  # needs matplotlib: before the work, not after it
    from ..conversion.convert import convert
    from ..conversion.plan import resolve
    from ..conversion.report import conversion_report

    model = load_model(args)
    if is_converted(model, args):
        _print_fit(args, conversion_report(model), model, None)
        return
    plan = resolve(config, model)
    if has_weights(args):
        if not args.json:
            print(f"{str(plan).splitlines()[-1]}\n")
        converted = convert(model, config, "project")
        _print_fit(args, conversion_report(converted, model), converted, model)
    elif args.json:
        print_json({"layers": plan.layers})
    else:
        print(plan)
        if plan.converted:
            print("The weights are random and have no fit to report: add --pretrained or --checkpoint FILE.")


def _print_fit(
    args: argparse.Namespace, report: "ConversionReport", converted: "nn.Module", dense: "nn.Module | None"
) -> None:
    print(report.to_json() if args.json else report)
    if not args.html:
        return
    from ..files import atomic_path
    from ..study.page import html_page

    with atomic_path(args.html) as tmp:
        tmp.write_text(html_page(converted, dense, report, args.model), encoding="utf-8")
    if not args.json:
        print(f"\nsaved to {args.html}")
        if dense is None:
            print(f"It lacks what shows the dense kernels, as '{args.model}' does not hold them.")
