"""``timm-masterkeys publish``."""

import argparse
import json
from pathlib import Path

from .options import add_options, print_result

SUMMARY = "publish a converted model to the Hugging Face Hub, in one commit that is checked before and after"
EXAMPLE = "publish out me/convnext_tiny.mk8 --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        help="a folder written by convert or by save_pretrained, or a .mk8 name, whose pretrained weights are then "
        "calibrated first",
    )
    add("repo_id", metavar="ORG/NAME", help="the repository on the Hub; made if there is none")
    add("--revision", metavar="BRANCH", help="the branch to commit to, made if missing (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add(
        "--message", default="Publish a master key filters model", help="the title of the commit (default: %(default)s)"
    )
    add("--dry-run", action="store_true", help="check everything and show what would be published, but change nothing")
    add_options(parser, "--license", "--private", "--json")


def run(args: argparse.Namespace) -> None:
    from ..hub.card import read_readme
    from ..hub.contents import OWN_ENTRIES
    from ..hub.license import check_license
    from ..hub.publish import check_target, push_to_hub
    from .load_model import check_name, create

    check_target(args.repo_id, args.revision, args.create_pr)  # before a network is calibrated
    if args.license:
        check_license(args.license)
    folder, config, readme = Path(args.model), {}, ""
    if not folder.is_dir():
        check_name(args.model)
        model = create(args.model, pretrained=True)
    else:
        model = create(f"local-dir:{folder}", pretrained=True)
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {key: value for key, value in saved.items() if key not in OWN_ENTRIES}
        readme = read_readme(folder / "README.md")
    names = "private", "revision", "create_pr", "dry_run", "license"
    options = {"commit_message": args.message, **{name: getattr(args, name) for name in names}}
    publication = push_to_hub(model, args.repo_id, config=config, readme=readme, **options)
    print_result(args, publication, publication)
