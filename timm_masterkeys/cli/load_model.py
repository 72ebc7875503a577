"""Loads the model of a command: from a name, with or without a checkpoint, or from a saved folder."""

import argparse
import difflib
import os
from typing import Any

import timm
from timm.models import load_checkpoint
from torch import nn

from ..conversion.plan import converted_layers
from ..conversion.tags import is_masterkeys_tag
from ..errors import CheckpointError, MasterKeysError
from ..timm_plugin.names import dense_name
from ..timm_plugin.published import list_architectures, published_source
from .options import DEFAULT_BANK


def load_model(args: argparse.Namespace) -> nn.Module:
    """Loads the model of the arguments: dense, unless a folder or a published name holds a converted one.

    Raises:
        MasterKeysError: An unknown name, a file that is missing or damaged, or weights that do not fit.
    """
    classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    if _is_folder(args.model):
        model = create(f"local-dir:{args.model}", pretrained=True, **classes)
    else:
        check_name(args.model)
        published = args.pretrained and published_source(args.model)
        model = create(args.model if published else dense_name(args.model), pretrained=args.pretrained, **classes)
    if args.checkpoint:
        _load_checkpoint(model, args.checkpoint)
    return model


def has_weights(args: argparse.Namespace) -> bool:
    """Whether the arguments give weights; else the model has random ones."""
    return bool(args.pretrained or args.checkpoint or _is_folder(args.model))


def require_weights(args: argparse.Namespace, problem: str) -> None:
    """Raises MasterKeysError, with the problem, unless the arguments give weights; an unknown name comes first."""
    if not has_weights(args):
        check_name(args.model)
        raise MasterKeysError(f"{problem} Add --pretrained or --checkpoint FILE.")


def is_converted(model: nn.Module, args: argparse.Namespace) -> bool:
    """Whether a loaded model is converted; raises MasterKeysError if it is and the arguments ask for a conversion."""
    if not converted_layers(model):
        return False
    if (args.bank, args.keys_per_kernel, args.include, args.exclude) != (DEFAULT_BANK, 1, None, None):
        raise MasterKeysError(
            f"'{args.model}' is converted already: --bank, --keys-per-kernel, --include and --exclude cannot change "
            "that. Leave them out."
        )
    return True


def create(name: str, **kwargs: Any) -> nn.Module:
    """Calls ``timm.create_model``; raises CheckpointError for a damaged config.json."""
    try:
        return timm.create_model(name, **kwargs)
    except (MasterKeysError, OSError, RuntimeError):
        raise
    except Exception as error:
        raise CheckpointError(f"'{name}' cannot be loaded: {error!r}") from error


def check_name(name: str) -> None:
    """Raises MasterKeysError unless timm has a model of this name, or it is an address (``hf-hub:...``)."""
    if ":" in name or published_source(name):
        return
    if os.path.isfile(name):
        hint = "Name its architecture, and give it with --checkpoint; `timm-masterkeys compare` takes a file alone."
        raise MasterKeysError(f"'{name}' is a file. {hint}")
    if "/" in name:
        on_hub = name.count("/") == 1 and name[0] not in "/."
        hint = f" If it is on the Hub, its name is 'hf-hub:{name}'." if on_hub else ""
        raise MasterKeysError(f"There is no folder '{name}'.{hint}")
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = _nearest(arch, timm.list_models())
        raise MasterKeysError(f"There is no timm model '{arch}', and no such file or folder.{near}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        if is_masterkeys_tag(tag) and arch not in list_architectures():
            raise MasterKeysError(
                f"There is no '{name}': {arch} has no depthwise convolutions, which are what is converted."
            ) from None
        known = timm.list_models(f"{arch}.*", include_tags=True)
        raise MasterKeysError(f"{arch} has no weights '{tag}'.{_nearest(name, known)}") from None


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, cutoff=0.75)
    return f" Did you mean {' or '.join(matches)}?" if matches else " `timm-masterkeys list` prints those it converts."


def _is_folder(name: str) -> bool:
    """Whether the name is that of a folder; a timm name never is, even if such a folder exists."""
    return os.path.isdir(name) and not timm.is_model(name)


def _load_checkpoint(model: nn.Module, path: str) -> None:
    if not os.path.isfile(path):
        raise CheckpointError(f"There is no file '{path}'.")
    try:
        load_checkpoint(model, path)
    except RuntimeError as error:  # it does not fit
        raise CheckpointError(f"Cannot load '{path}': {error}") from error
    except Exception as error:  # a damaged file: unpickling may raise anything
        raise CheckpointError(f"'{path}' is not a checkpoint that can be read: {error!r}") from error
