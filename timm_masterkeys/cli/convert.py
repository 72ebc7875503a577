"""``timm-masterkeys convert``."""

import argparse
from typing import Any

from ..errors import MasterKeysError
from .options import CONVERSION, TRAINABLE, add_model, add_options, check_device, check_folder, read_config

SUMMARY = "convert a model, calibrate it with images, and save it as a folder that timm loads"
EXAMPLE = "convert convnext_tiny --pretrained --keys-per-kernel 4 --output out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser, *CONVERSION, "--agreement")
    parser.add_argument(
        "--trainable",
        default="shift",
        choices=TRAINABLE,
        help="what later training may change of each kernel: nothing, its shift, its scale and shift (affine), or, for "
        "scale-space banks, its shift and its Gaussians' widths (sigmas) (default: shift)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    add_options(parser, "--license", "--device")
    images = parser.add_argument_group("calibration")
    images.add_argument(
        "--calibrate",
        metavar="DIR",
        help="a folder of images to calibrate with, without labels; a few hundred images of your own task are best. "
        "'none': do not calibrate (default: photographs that ship with timm_masterkeys)",
    )
    images.add_argument(
        "--max-images", type=int, metavar="N", help="use at most so many images (default: 400; 300 with --agreement)"
    )
    for name, number, meaning in (
        ("--mean", float, "the mean that is subtracted from each channel, for pixels from 0 to 1"),
        ("--std", float, "the standard deviation that each channel is divided by"),
        ("--size", int, "the height and width that images are brought to, or one number for both"),
    ):
        metavar, text = "N" if number is int else "X", f"{meaning} (default: the model's own)"
        images.add_argument(name, type=number, nargs="+", metavar=metavar, help=text)


def run(args: argparse.Namespace) -> None:
    import timm
    from timm.models import PretrainedCfg

    from ..calibration.images import calibration_images
    from ..calibration.pipeline import convert_and_calibrate
    from ..conversion.convert import convert
    from ..conversion.record import Source, set_source
    from ..conversion.report import conversion_report
    from ..hub.license import check_license
    from ..hub.save import save_pretrained
    from ..timm_plugin.names import dense_name
    from .load_model import is_converted, load_model, require_weights

    require_weights(args, "There are no weights to convert.")
    config = read_config(args, "agreement", "trainable")
    images = calibration_images(args.calibrate, "--calibrate")
    if config.agreement is not None and not images:
        raise MasterKeysError("--agreement is measured with images: leave out --calibrate none.")
    size = args.size[0] if args.size and len(args.size) == 1 else args.size
    overrides = {"max_images": args.max_images, "mean": args.mean, "std": args.std, "size": size}
    options = {name: value for name, value in overrides.items() if value is not None}
    if options and not images:
        raise MasterKeysError("--max-images, --mean, --std and --size are for images: leave out --calibrate none.")
    if args.license:
        check_license(args.license)
    check_device(args.device)
    check_folder(args.output)
    dense = load_model(args).to(args.device)
    if is_converted(dense, args):
        raise MasterKeysError(
            f"'{args.model}' is converted already. Inspect or publish it as it is, or convert the dense weights it was "
            "made from."
        )
    if images:
        model, figures = convert_and_calibrate(dense, config, images, **options)
        if config.agreement is not None:
            print(figures, end="\n\n")
    else:
        model = convert(dense, config, "project")
    if args.pretrained:  # the licence is inherited
        own: Any = dense.pretrained_cfg
        cfg = PretrainedCfg(**own) if own.get("source") == "hf-hub" else timm.get_pretrained_cfg(dense_name(args.model))
        if cfg:
            set_source(model, Source.from_cfg(cfg))
    directory = save_pretrained(model.cpu(), args.output, license=args.license)
    print(conversion_report(model))
    print(f"\nsaved to {directory}: timm.create_model('local-dir:{directory}', pretrained=True) loads it")
    if not images:
        print("NOT calibrated, and of little use as it is: leave out --calibrate none, or fine-tune before use")
