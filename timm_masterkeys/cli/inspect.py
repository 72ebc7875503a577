"""``timm-masterkeys inspect``."""

import argparse

from .options import CONVERSION, add_model, add_options, check_file, print_result, read_config

SUMMARY = "show which layers of a model are converted, and with weights how well the keys fit each layer"
EXAMPLE = "inspect convnext_tiny --pretrained --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser, *CONVERSION, "--json")
    parser.add_argument("--html", metavar="FILE", help="also write the fit as a page with pictures (needs matplotlib)")


def run(args: argparse.Namespace) -> None:
    from .load_model import has_weights, is_converted, load_model, require_weights

    config = read_config(args)
    if args.html:
        require_weights(args, "Random weights have no fit to draw.")
        check_file(args.html)
        from ..study.page import html_page  # needs matplotlib: before the work, not after it
    from ..conversion.convert import convert
    from ..conversion.plan import resolve
    from ..conversion.report import conversion_report

    model = load_model(args)
    dense = None if is_converted(model, args) else model
    if dense is not None:
        plan = resolve(config, model)
        if not has_weights(args):
            random = "The weights are random and have no fit to report: add --pretrained or --checkpoint FILE."
            hint = random if plan.converted else "There is nothing to convert: each line above gives the reason."
            print_result(args, {"layers": plan.layers}, f"{plan}\n{hint}")
            return
        if not args.json:
            print(f"{str(plan).splitlines()[-1]}\n")
        model = convert(dense, config, "project")
    report = conversion_report(model, dense)
    print(report.to_json() if args.json else report)
    if not args.html:
        return
    from ..files import atomic_path

    with atomic_path(args.html) as tmp:
        tmp.write_text(html_page(model, dense, report, args.model), encoding="utf-8")
    if not args.json:
        print(f"\nsaved to {args.html}")
        if dense is None:
            print(f"It lacks what shows the dense kernels, as '{args.model}' does not hold them.")
