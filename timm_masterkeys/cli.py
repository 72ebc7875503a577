"""The command ``timm-masterkeys``."""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import timm
import torch
from timm.models import load_checkpoint
from torch import nn

from .errors import CheckpointError, MasterKeysError, ZooError
from .files import atomic_path
from .hub.card import read_readme
from .hub.publish import push_to_hub
from .hub.save import OWN_ENTRIES, save_pretrained
from .keys.banks import DEFAULT_BANK, KeyBank, get_bank
from .layers import MasterKeyConv2d, Trainable
from .models.plan import plan_conversion
from .models.report import conversion_report
from .models.surgery import convert_to_masterkeys
from .names.cache import cache_folder, clear_entries, list_entries
from .names.pretrained import calibration_images
from .names.registry import list_architectures, stock_name
from .repair.budget import convert_to_agreement
from .repair.calibrate import STAGES, WITHOUT_GRADIENTS, calibrate_masterkeys
from .repair.images import BUILTIN
from .study.analysis import compare_networks
from .study.discovery import collect_kernels, discover_bank, match_banks
from .study.kernels import name_sources
from .version import __version__
from .zoo.evaluate import find_labels
from .zoo.results import TABLE
from .zoo.zoo import Zoo, make_zoo, plan_zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Add = Callable[[str, str, str, Sequence[argparse.ArgumentParser]], argparse.ArgumentParser]

_EXAMPLES = """examples:
  timm-masterkeys list 'convnext*'
  timm-masterkeys inspect convnext_tiny --pretrained
  timm-masterkeys convert convnext_tiny --pretrained --output out
  timm-masterkeys publish out me/convnext_tiny.mk8 --dry-run

timm-masterkeys COMMAND --help tells the options of a command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0, or 1 after an error told in one line on stderr (2, raised by argparse, for wrong usage).
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("timm-masterkeys: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `timm-masterkeys list | head`
        sys.stdout = open(os.devnull, "w")
        return 0
    except (MasterKeysError, RuntimeError, ValueError, OSError, ImportError) as error:
        if args.verbose:
            raise
        print(f"timm-masterkeys: error: {_told(error)}", file=sys.stderr)
        return 1
    return 0


def _told(error: Exception) -> str:
    """An error in one line; the names of a state dict alone would fill pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:3])
    unknown = re.search(r"Unknown model \((\S+)\)$", text)
    near = difflib.get_close_matches(unknown[1], timm.list_models(), cutoff=0.8) if unknown else []
    if near:
        return f"{text}. Is it {' or '.join(near)}?"
    return text if len(text) <= 600 else f"{text[:500]} ... (-v tells all)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-masterkeys",
        description="Converts the depthwise convolutions of timm models to master key filters.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbose = argparse.ArgumentParser(add_help=False)
    verbose.add_argument("-v", "--verbose", action="store_true", help="log, and show the traceback of an error")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--bank", default=DEFAULT_BANK, help="name or .safetensors file (default: %(default)s)")
    settings.add_argument("--keys-per-kernel", type=int, default=1, metavar="R", help="keys per kernel (default: 1)")
    settings.add_argument("--min-r2", type=float, help="as many more keys per layer as this mean R2 needs, or dense")
    settings.add_argument("--include", action="append", metavar="PATTERN", help="convert only layers that match")
    settings.add_argument("--exclude", action="append", metavar="PATTERN", help="leave layers that match")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, text: str, example: str, parents: Sequence[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: timm-masterkeys {example}",
            parents=[*parents, verbose],
        )

    for arguments in (
        _list_arguments,
        _inspect_arguments,
        _convert_arguments,
        _discover_arguments,
        _plot_arguments,
        _compare_arguments,
        _publish_arguments,
        _zoo_arguments,
        _cache_arguments,
    ):
        arguments(add, settings)
    return parser


def _list_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add("list", "list the .mk8 names", "list 'mobilenet*' --pretrained", [])
    command.add_argument("pattern", nargs="?", default="*", help="fnmatch pattern on architectures (default: all)")
    command.add_argument("--pretrained", action="store_true", help="every name that has pretrained weights")
    command.set_defaults(run=_list)


def _inspect_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "inspect",
        "what conversion does to a model: the plan, or with weights the fit of each layer",
        "inspect convnext_tiny --pretrained --json",
        [settings],
    )
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print the fit as JSON; without weights, the plan")
    command.add_argument("--html", metavar="FILE", help="and write it, with pictures, as a page (needs matplotlib)")
    command.set_defaults(run=_inspect)


def _convert_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "convert",
        "convert a model, repair it with unlabelled images, and save it for timm",
        "convert convnext_tiny --pretrained --keys-per-kernel 4 --output out",
        [settings],
    )
    _add_model(command)
    command.add_argument("--trainable", default="shift", choices=get_args(Trainable), help="(default: shift)")
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--calibrate",
        metavar="DIR",
        help="images to repair with, some hundred of the task's own are best; 'none': no repair (default: "
        "photographs that ship)",
    )
    _add_agreement(command)
    command.add_argument("--heal", type=float, metavar="MINUTES", help="and train each block towards the dense one's")
    command.set_defaults(run=_convert)


def _discover_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "discover",
        "search the keys that fit the depthwise kernels of some networks",
        "discover convnext_tiny mine.safetensors --hold-out mine.safetensors --output bank.safetensors",
        [],
    )
    command.add_argument("sources", nargs="+", help="timm names, checkpoints, .npz files of kernels (C, kh, kw)")
    command.add_argument("--kernel-size", type=int, default=7, metavar="K", help="taps (default: 7)")
    command.add_argument("--keys", type=int, metavar="N", help="how many (default: where the curve bends)")
    command.add_argument("--hold-out", action="append", default=[], metavar="SOURCE", help="measure on it, not search")
    command.add_argument("--by-kernels", action="store_true", help="every kernel counts the same, not every network")
    command.add_argument(
        "--method", default="autoencoder", choices=["autoencoder", "lines"], help="(default: the paper's)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", help="where the search computes (default: cpu)")
    command.add_argument("--output", required=True, metavar="FILE", help=".safetensors file to write")
    command.add_argument("--plot", metavar="FILE", help="and draw the curve of scores (needs matplotlib)")
    command.set_defaults(run=_discover)


def _plot_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "plot",
        "pictures of what conversion does to a model's kernels (needs matplotlib)",
        "plot convnext_tiny --pretrained --output pictures",
        [settings],
    )
    _add_model(command)
    command.add_argument("--output", required=True, metavar="DIR", help="folder to write PNG files into")
    command.set_defaults(run=_plot)


def _compare_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "compare",
        "how well banks meet the depthwise kernels of networks, size by size",
        "compare convnext_tiny mine.safetensors --bank babaiee2025 --bank bank.safetensors",
        [],
    )
    command.add_argument("sources", nargs="+", help="timm names, checkpoints, .npz files of kernels (C, kh, kw)")
    command.add_argument("--bank", action="append", default=[], help="name or .safetensors file; may be repeated")
    command.set_defaults(run=_compare)


def _publish_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "publish",
        "publish a converted model to the Hugging Face Hub, in one checked commit",
        "publish out me/convnext_tiny.mk8 --private",
        [],
    )
    command.add_argument("model", help="folder written by convert or save_pretrained, or a .mk8 name")
    command.add_argument("repo_id", help="org/name on the Hub; made if missing")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch, made if missing (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--license", help="needed only if the source weights' licence is unknown")
    command.add_argument("--message", default="Publish a master key filters model", help="title of the commit")
    command.add_argument("--dry-run", action="store_true", help="check everything, show what would change")
    command.set_defaults(run=_publish)


def _zoo_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add(
        "zoo",
        "convert, repair, measure and publish every timm network that matches; run again, it goes on where it was",
        "zoo 'convnext*' --org my-team --images photographs --evaluate imagenet/val --dry-run",
        [settings],
    )
    command.add_argument("pattern", nargs="+", help="timm names with weights, as 'convnext*' or convnext_tiny.fb_in1k")
    command.add_argument("--org", required=True, help="user or organisation on the Hub: ORG/<arch>.mk8_<tag>")
    command.add_argument("--images", default=BUILTIN, metavar="DIR", help="to repair with (default: those that ship)")
    _add_agreement(command)
    command.add_argument(
        "--evaluate", required=True, metavar="DIR", help="labelled images: a folder for each class, named after it"
    )
    command.add_argument(
        "--class-map", default="", metavar="FILE", help="the names of all classes in order (default: ImageNet-1k's)"
    )
    command.add_argument("--dataset", default="", metavar="NAME", help="what cards call them (default: their folder)")
    command.add_argument("--output", default="zoo", metavar="DIR", help="results.csv, names.txt, work (default: zoo)")
    command.add_argument("--license", help="for source weights whose licence is unknown; without it they fail")
    command.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    command.add_argument("--dry-run", action="store_true", help="everything but publishing; a later run publishes")
    command.add_argument("--keep-weights", action="store_true", help="keep downloads and published networks on disk")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="when measuring (default: 64)")
    command.add_argument("--workers", type=int, default=4, metavar="N", help="that read images (default: 4)")
    command.add_argument("--device", help="(default: a GPU if there is one, under torchrun one a process)")
    command.set_defaults(run=_zoo)


def _cache_arguments(add: _Add, settings: argparse.ArgumentParser) -> None:
    command = add("cache", "the networks that pretrained=True has repaired and keeps on disk", "cache --clear", [])
    command.add_argument("--clear", action="store_true", help="remove them")
    command.set_defaults(run=_cache)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="timm name, as convnext_tiny.fb_in1k; its .mk8 name means the same; or a folder")
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="take timm's pretrained weights")
    weights.add_argument("--checkpoint", metavar="FILE", help="take the weights of a checkpoint")
    command.add_argument("--num-classes", type=int, metavar="N", help="classes of the checkpoint's head")


def _add_agreement(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--agreement",
        type=float,
        metavar="SHARE",
        help="as few keys, layer by layer, as agree with the dense network on this share (.95) of held-out images",
    )


def _list(args: argparse.Namespace) -> None:
    names = timm.list_models(f"{args.pattern}.mk8*", pretrained=args.pretrained, include_tags=True)
    if not args.pretrained:
        names = [name for name in names if name.endswith(".mk8")]
    if not names:
        raise MasterKeysError(f"No architecture matches '{args.pattern}'; {len(list_architectures())} have .mk8 names.")
    print("\n".join(names))


def _inspect(args: argparse.Namespace) -> None:
    if args.html:
        if not _has_weights(args):
            raise MasterKeysError("Random weights have no fit to draw: add --pretrained or --checkpoint FILE.")
        _check_folder(args.html)
        from .study.page import html_page  # needs matplotlib: before the work, not after it
    model = _create(args)
    if _is_converted(model, args):
        if args.html:
            raise MasterKeysError(f"--html shows the dense kernels, which '{args.model}' does not have. Drop it.")
        report = conversion_report(model)
        print(report.to_json() if args.json else report)
        return
    plan = plan_conversion(model, args.bank, include=args.include, exclude=args.exclude)
    if not args.json:
        print(str(plan).splitlines()[-1] if _has_weights(args) else plan)
    if _has_weights(args):
        converted = _converted(model, args)
        report = conversion_report(converted, reference=model)
        print(report.to_json() if args.json else f"\n{report}")
        if args.html:
            with atomic_path(args.html) as tmp:
                tmp.write_text(html_page(converted, model, report, args.model), encoding="utf-8")
            if not args.json:
                print(f"\nsaved to {args.html}")
    elif args.json:
        print(json.dumps(dataclasses.asdict(plan), indent=2))
    elif plan.converted:
        print("random weights have no fit to report: add --pretrained or --checkpoint FILE")


def _convert(args: argparse.Namespace) -> None:
    if not _has_weights(args):
        raise MasterKeysError("Nothing to convert: add --pretrained or --checkpoint FILE.")
    images = calibration_images(args.calibrate, "--calibrate")
    for option in ("heal", "agreement"):
        if getattr(args, option) is not None and not images:
            raise MasterKeysError(f"--{option} needs images: leave out --calibrate none.")
    if args.agreement is not None and (args.keys_per_kernel, args.min_r2, args.heal) != (1, None, None):
        raise MasterKeysError("--agreement chooses the keys and repairs: drop --keys-per-kernel, --min-r2 and --heal.")
    _check_output(args.output)
    dense = _create(args)
    if _is_converted(dense, args):
        raise MasterKeysError(
            f"'{args.model}' is converted already: inspect or publish it as it is, or convert the dense weights it was "
            "made from."
        )
    if images and args.agreement is not None:
        model, budget = convert_to_agreement(
            dense,
            args.agreement,
            images,
            bank=args.bank,
            include=args.include,
            exclude=args.exclude,
            trainable=args.trainable,
        )
        print(budget, end="\n\n")
    else:
        model = _converted(dense, args)
        if images:
            stages = WITHOUT_GRADIENTS if args.heal is None else STAGES
            calibrate_masterkeys(model, dense, images, stages=stages, heal_minutes=args.heal or 0)
    directory = save_pretrained(model, args.output)
    print(conversion_report(model))
    print(f"\nsaved to {directory}: timm.create_model('local-dir:{directory}', pretrained=True) loads it")
    if not images:
        print("NOT repaired, and of little use as it is: leave out --calibrate none, or fine-tune before use")


def _discover(args: argparse.Namespace) -> None:
    if not args.output.endswith(".safetensors"):
        raise MasterKeysError(f"--output is '{args.output}', expected a name that ends in .safetensors.")
    if os.path.realpath(args.output) in map(os.path.realpath, args.sources):
        raise MasterKeysError(f"--output '{args.output}' is one of the sources: name another file.")
    _check_folder(args.output)
    if args.plot:
        _figure_kind(args.plot)
        _check_folder(args.plot)
        from .study import plotting  # needs matplotlib: before the search, not after it
    sources = name_sources(args.sources)
    found = discover_bank(
        collect_kernels(sources, args.kernel_size),
        keys=args.keys,
        held_out=[source if source in sources else os.path.basename(source) for source in args.hold_out],
        equal_networks=not args.by_kernels,
        method=args.method,
        seed=args.seed,
        name=Path(args.output).stem,
        device=args.device,
    )
    found.bank.save(args.output)
    print(found)
    _print_match(found.bank, DEFAULT_BANK, args.kernel_size)
    if args.plot:
        _save_figure(plotting.plot_elimination(found), args.plot)
    print(f"\nsaved to {args.output}: convert_to_masterkeys(model, bank='{args.output}') takes it")


def _plot(args: argparse.Namespace) -> None:
    from .study import plotting  # needs matplotlib

    if not _has_weights(args):
        raise MasterKeysError("Random weights have no fit to draw: add --pretrained or --checkpoint FILE.")
    _check_output(args.output)
    model = _create(args)
    dense = not _is_converted(model, args)
    converted = _converted(model, args) if dense else model
    report = conversion_report(converted)
    bank = next(layer.bank for layer in converted.modules() if isinstance(layer, MasterKeyConv2d))
    figures = {
        "bank": plotting.plot_bank(bank),
        "coverage": plotting.plot_coverage(report),
        "r2": plotting.plot_r2(report),
        "keys": plotting.plot_keys(report),
    }
    if dense:
        figures["kernels"] = plotting.plot_kernels(converted, model)
    directory = Path(args.output)
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        _save_figure(figure, directory / f"{name}.png")
        print(directory / f"{name}.png")
    if not dense:
        print(f"no kernels.png: it shows the dense kernels, which '{args.model}' does not have")


def _check_folder(path: str) -> None:
    """Raises unless a file can be written there: before the work, not after it."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise MasterKeysError(f"Cannot write '{path}': there is no folder '{folder}'.")


def _check_output(path: str) -> None:
    """Raises unless there is, or can be made, a folder to write into: before the work, not after it."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-"):
            pass
    except OSError as error:
        raise MasterKeysError(f"Cannot write into '{path}': {error.strerror}: '{folder}'.") from error


def _figure_kind(path: str | Path) -> str:
    kind = Path(path).suffix[1:]
    if kind not in ("png", "svg", "pdf"):
        raise MasterKeysError(f"Cannot draw into '{path}': expected a name that ends in .png, .svg or .pdf.")
    return kind


def _save_figure(figure: "Figure", path: str | Path) -> None:
    kind = _figure_kind(path)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format=kind, dpi=130)


def _compare(args: argparse.Namespace) -> None:
    print(compare_networks(args.sources, args.bank or [DEFAULT_BANK, "random8:0"]))
    if len(args.bank) == 2:
        side = min(7, *(side for bank in args.bank for side in get_bank(bank).keys.shape[1:]))
        _print_match(args.bank[0], args.bank[1], side)


def _print_match(bank: KeyBank | str, other: KeyBank | str, kernel_size: int = 7) -> None:
    first, second = get_bank(bank), get_bank(other)
    pairs = match_banks(first, second, (kernel_size, kernel_size))
    print(f"keys of {first.name} and of {second.name}, assigned to each other, and their correlation:")
    print("  ".join(f"{own + 1}-{theirs + 1} {value:.2f}" for own, theirs, value in pairs))


def _publish(args: argparse.Namespace) -> None:
    folder, config, readme = Path(args.model), {}, ""
    model = _load(f"local-dir:{folder}" if folder.is_dir() else args.model, pretrained=True)
    if folder.is_dir():
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {key: value for key, value in saved.items() if key not in OWN_ENTRIES}
        readme = read_readme(folder / "README.md")
    done = push_to_hub(
        model,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
        dry_run=args.dry_run,
        license=args.license,
        config=config,
        readme=readme,
    )
    print(done)


def _cache(args: argparse.Namespace) -> None:
    root = cache_folder()
    if args.clear:
        print(f"removed {clear_entries(root)} from {root}")
        return
    entries = list_entries(root)
    width = max((len(entry.path.name) for entry in entries), default=0)
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.path.name:<{width}}  {entry.size / 1e6:>8,.1f} MB  used {used}")
    print(f"{len(entries)} in {root}")


def _zoo(args: argparse.Namespace) -> None:
    if args.agreement is not None and (args.keys_per_kernel, args.min_r2) != (1, None):
        raise MasterKeysError("--agreement chooses the keys of each layer: drop --keys-per-kernel and --min-r2.")
    numbers = ("keys_per_kernel", "min_r2") if args.agreement is None else ("agreement",)
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    labels = find_labels(args.evaluate, args.class_map)
    zoo = Zoo(
        args.org,
        labels,
        Path(args.output),
        images=args.images,
        conversion={name: getattr(args, name) for name in ("bank", *numbers, "include", "exclude")},
        dataset=args.dataset,
        license=args.license,
        private=args.private,
        dry_run=args.dry_run,
        keep_weights=args.keep_weights,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device or (gpu if torch.cuda.is_available() else "cpu"),
    )
    names, left = plan_zoo(args.pattern, labels.num_classes)
    for name, reason in left.items():
        print(f"{name}  left out: {reason}")
    print(f"{len(names)} networks, {labels.images:,} images of {labels.classes:,} classes", flush=True)
    failed = []
    for outcome in make_zoo(names, zoo):
        if outcome.fresh:
            print(outcome, flush=True)
        if outcome.error:
            failed.append(f"{outcome.name} ({outcome.error})")
    print(f"{len(names) - len(failed)} of {len(names)} networks done, see {zoo.output / TABLE}")
    if failed:
        raise ZooError(
            f"{len(failed)} of {len(names)} networks failed: {'; '.join(failed)}. What was done stays; run again to "
            f"try these once more. More in {zoo.output}/models/NAME/failure.txt."
        )


def _is_folder(args: argparse.Namespace) -> bool:
    """Whether the model is a folder written by ``convert`` or timm; a timm name is one, whatever the folder has."""
    return os.path.isdir(args.model) and not timm.is_model(args.model)


def _has_weights(args: argparse.Namespace) -> bool:
    return bool(args.pretrained or args.checkpoint or _is_folder(args))


def _create(args: argparse.Namespace) -> nn.Module:
    """The model a command is about: dense, but of a folder or name that has converted weights."""
    classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    folder = _is_folder(args)
    name = f"local-dir:{args.model}" if folder else stock_name(args.model, args.pretrained)
    model = _load(name, pretrained=args.pretrained or folder, **classes)
    if args.checkpoint:
        if not os.path.isfile(args.checkpoint):
            raise CheckpointError(f"There is no file '{args.checkpoint}'.")
        try:
            load_checkpoint(model, args.checkpoint)
        except RuntimeError as error:  # it does not fit
            raise CheckpointError(f"Cannot load '{args.checkpoint}': {error}") from error
        except Exception as error:  # a damaged file: unpickling may raise anything
            raise CheckpointError(f"'{args.checkpoint}' is no readable checkpoint: {error!r}") from error
    return model


def _load(name: str, **kwargs: Any) -> nn.Module:
    if "/" in name and ":" not in name:
        raise CheckpointError(f"There is no folder '{name}'. Of the Hub? Then it is 'hf-hub:{name}'.")
    try:
        return timm.create_model(name, **kwargs)
    except (MasterKeysError, OSError, RuntimeError):
        raise
    except Exception as error:  # timm's, of an odd config.json
        raise CheckpointError(f"'{name}' cannot be loaded: {error!r}") from error


def _is_converted(model: nn.Module, args: argparse.Namespace) -> bool:
    """Whether a model is converted as it comes; settings for a conversion are then refused."""
    if not any(isinstance(module, MasterKeyConv2d) for module in model.modules()):
        return False
    if (args.bank, args.keys_per_kernel, args.min_r2, args.include, args.exclude) != (
        DEFAULT_BANK,
        1,
        None,
        None,
        None,
    ):
        raise MasterKeysError(f"'{args.model}' is converted already, settings cannot change that. Drop them.")
    return True


def _converted(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return convert_to_masterkeys(
        model,
        args.bank,
        include=args.include,
        exclude=args.exclude,
        keys_per_kernel=args.keys_per_kernel,
        trainable=getattr(args, "trainable", "shift"),
        min_r2=args.min_r2,
    )


if __name__ == "__main__":
    sys.exit(main())
