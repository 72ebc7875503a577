"""Names that were pointed at published weights, by ``use_weights`` or the environment variable."""

import os
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

import timm
from timm.models import PretrainedCfg

from ..conversion.tags import is_masterkeys_tag
from ..errors import ConversionError
from ..hub.weights import FUSED_NAME
from . import compat

WEIGHTS_VARIABLE = "TIMM_MASTERKEYS_WEIGHTS"

_sources: dict[str, str] = {}  # by name, ``org/name`` or ``org/name@revision``


def list_architectures() -> list[str]:
    """The timm architectures that hold depthwise convolutions and so have ``.mk8`` names; from a shipped table."""
    return resources.files(__package__).joinpath("data/architectures.txt").read_text().split()


def use_weights(name: str | os.PathLike[str], source: str = "") -> None:
    """Points a ``.mk8`` name, or all names of a list, at published weights: a team's own, calibrated or fine-tuned.

    ``pretrained=True`` then loads them, with the classes, preprocessing and arguments they were published with. The
    environment variable ``TIMM_MASTERKEYS_WEIGHTS`` does the same: ``name=source`` pairs and paths of lists, separated
    by spaces. It is read with the first weights of a ``.mk8`` name; an invalid value raises an error then.

    Args:
        name: ``<arch>.mk8``, or ``<arch>.mk8_<anything>`` for a new name. Or, without a source, the path of a list such
            as ``timm-masterkeys zoo`` writes: ``name=source`` a line; empty lines and those with # are ignored.
        source: ``org/name`` or ``org/name@revision`` on the Hub, published by ``push_to_hub``. A revision is a
            branch, a tag, or all 40 digits of a commit.

    Raises:
        ConversionError: Not such a name, an architecture without depthwise convolutions, no such source, or a list that
            cannot be read or has such a line; none of its names is then pointed at weights.

    Example:
        >>> use_weights("convnext_tiny.mk8_ours", "org/convnext_tiny.mk8@v1")
        >>> model = timm.create_model("convnext_tiny.mk8_ours", pretrained=True)
        >>> use_weights("zoo/names.txt")
    """
    pairs = _read_list(name) if not source and os.path.isfile(name) else [(os.fspath(name), source)]
    _point(pairs)


def _point(pairs: list[tuple[str, str]], again: bool = True) -> None:
    """Points names at sources after a check of all; without ``again`` only names that were not pointed before."""
    for pair in pairs:
        _check_pair(*pair)
    for mk8_name, hub_id in pairs:
        if mk8_name in _sources and not again:
            continue
        arch, _, tag = mk8_name.partition(".")
        stock = timm.get_pretrained_cfg(arch) or PretrainedCfg(architecture=arch)
        cfg = replace(stock, url=None, hf_hub_id=hub_id, hf_hub_filename=FUSED_NAME, tag=tag, license=None)
        compat.add_tag(arch, tag, cfg)
        _sources[mk8_name] = hub_id


def published_source(name: str) -> str | None:
    """The source of the published weights that a name was pointed at; None if there is none.

    Raises:
        ConversionError: The environment variable holds anything but pairs and paths of lists.
    """
    _apply_variable(os.environ.get(WEIGHTS_VARIABLE, ""))
    return _sources.get(name)


def is_pointed(name: str) -> bool:
    """Whether ``use_weights`` pointed a name at published weights; the environment variable is not read."""
    return name in _sources


@lru_cache(maxsize=1)  # errors are not cached: each call raises them
def _apply_variable(value: str) -> None:
    """Points the names in the environment variable at their sources; calls of ``use_weights`` take precedence."""
    parts = [value] if os.path.isfile(value) else value.split()
    pairs: list[tuple[str, str]] = []
    try:
        for part in parts:
            pairs += _read_list(part) if os.path.isfile(part) or part.endswith(".txt") else [_pair(part)]
        _point(pairs, again=False)
    except ConversionError as error:
        raise ConversionError(f"{WEIGHTS_VARIABLE} is '{value}': {error}") from None


def _read_list(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"The list of names '{path}' cannot be read: {error}.") from None
    return [_pair(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _pair(text: str) -> tuple[str, str]:
    name, _, source = text.strip().partition("=")
    return name, source


def _check_pair(name: str, source: str) -> None:
    arch, _, tag = name.partition(".")
    if not is_masterkeys_tag(tag) or arch not in list_architectures():
        raise ConversionError(
            f"Got the name '{name}', expected '<arch>.mk8' or '<arch>.mk8_<name>', the architecture one of "
            "list_architectures(); or the path of a list of them."
        )
    repo_id, _, revision = source.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or ("@" in source and not revision):
        raise ConversionError(f"Got the source '{source}' for {name}, expected 'org/name' or 'org/name@revision'.")
