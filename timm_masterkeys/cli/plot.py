"""``timm-masterkeys plot``."""

import argparse
from pathlib import Path

from .options import add_conversion, add_model, read_config
from .outputs import check_folder, save_figure

SUMMARY = "draw a model's kernels, the keys they are converted to, and the fit (needs matplotlib)"
EXAMPLE = "plot convnext_tiny --pretrained --output pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, kernel_files=True)
    add_conversion(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write PNG files into")


def run(args: argparse.Namespace) -> None:
    from ..conversion.apply import converted_layers
    from ..conversion.convert import convert
    from ..conversion.report import conversion_report
    from ..study import plotting
    from .load_model import is_converted, load_model, require_weights

    require_weights(args, "Random weights have no fit to draw.")
    config = read_config(args)
    check_folder(args.output)
    model = load_model(args)
    dense = None if is_converted(model, args) else model
    converted = model if dense is None else convert(dense, config, "project")
    report = conversion_report(converted)
    figures = {
        "bank": plotting.plot_bank(next(iter(converted_layers(converted).values())).bank),
        "used_keys": plotting.plot_used_keys(converted),
        "coverage": plotting.plot_coverage(report),
        "r2": plotting.plot_r2(report),
        "keys": plotting.plot_keys(report),
    }
    if dense is not None:
        figures["kernels"] = plotting.plot_kernels(converted, dense)
    directory = Path(args.output)
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, directory / f"{name}.png")
        print(directory / f"{name}.png")
    if dense is None:
        print(f"There is no kernels.png: it shows the dense kernels, which '{args.model}' does not hold.")
