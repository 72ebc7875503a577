"""Saves converted models for timm, after a check that what is written loads again as the same model."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult
from safetensors.torch import load_file
from timm.layers import get_act_layer, get_norm_layer
from timm.models import get_model_args, save_for_hf
from torch import nn

from ..conversion.record import Source
from ..conversion.tags import masterkeys_tag
from ..conversion.torch_settings import undisturbed
from ..conversion.wrapped import evaluating
from ..errors import CheckpointError, ConversionError, in_short
from ..files import atomic_path, os_errors, work_folder
from .card import CardEntries, make_card, read_readme
from .contents import Contents, gather_contents
from .load import read_section
from .weights import (
    COMPACT_NAME,
    FUSED_NAME,
    SECTION,
    files_sha256,
    fused_copy,
    read_compact,
    restore_layers,
    write_compact,
)

_logger = logging.getLogger(__name__)

FILES = (FUSED_NAME, COMPACT_NAME, "README.md", "config.json")  # config.json last: without it nothing loads

_ORIGIN = ("license", "hf_hub_id", "url", "origin_url", "tag")  # of a cfg: left out if the source is unknown
_STRUCTURE = "Is the model's structure as timm.create_model made it?"


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    tags: str | Sequence[str] = (),
    metrics: Sequence[EvalResult] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Saves a converted timm model: fused and compact safetensors, config.json and a model card.

    Stock timm loads the fused weights; with this package ``timm.create_model("local-dir:DIR", pretrained=True)`` gives
    the converted model bit for bit. This is checked before a file in the directory is changed.

    Args:
        model: A converted model made by ``timm.create_model``, wrapped or not. Not changed.
        directory: Created if missing. Other files in it are kept, and so is the hand-written part of its README.
        repo_id: ``org/name`` for the card's examples; if None, they load the directory.
        license: The weights' licence, needed where this package did not load them; else it is inherited.
        base_model: Hub id of the source weights, where this package did not load them.
        datasets: Hub ids of training data, for the card.
        tags: More tags for the card.
        metrics: Measured results for the card's model-index.
        config: More top-level entries for config.json, such as ``label_names`` and ``label_descriptions``.

    Returns:
        The directory.

    Raises:
        ConversionError: Not converted, not a model that timm could load again (a head replaced by hand, quantised
            weights, NaN), a licence or a source other than the known one, or a README that cannot be read. Nothing was
            written.
        CheckpointError: A layer that was created empty and has no values yet.
        OSError: The directory cannot be written, or the disk is full. Each file in it is then whole: old or new.

    Example:
        >>> save_pretrained(model, "out")
        >>> model = timm.create_model("local-dir:out", pretrained=True)
    """
    contents = gather_contents(model, license, base_model, config)
    directory = Path(directory)
    entries = CardEntries(repo_id or directory.resolve().name, datasets, tags, metrics)
    existing, previous = read_readme(directory / "README.md"), previous_section(directory / "config.json")
    write_contents(contents, directory, entries, existing, previous)
    return directory


def write_contents(
    contents: Contents, directory: Path, entries: CardEntries, existing: str, previous: Mapping[str, Any] | None
) -> None:
    """Writes a model's files; arguments as for ``make_card``, errors as for ``save_pretrained``."""
    with _saving(directory) as tmp:
        config_json = _write_weights(contents, tmp)
        _check_reload(contents.model, tmp, config_json)
        card = make_card(contents, config_json, entries, existing, previous)
        (tmp / "README.md").write_text(str(card), encoding="utf-8")
        for name in FILES:
            with atomic_path(directory / name) as target:
                (tmp / name).replace(target)
    if not contents.is_usable and "model-index" not in card.data.to_dict():
        _logger.warning(
            "%s: not calibrated. Unless it was trained since its conversion, it is of little use as it is: "
            "calibrate_masterkeys(model, dense_model, images), or fine-tune.",
            entries.repo_id if "/" in entries.repo_id else directory,
        )


def previous_section(config: Path) -> Mapping[str, Any] | None:
    """What an earlier publication said of its weights: empty for a dense model or if damaged, None if there is none."""
    if not config.is_file():
        return None
    with suppress(CheckpointError, LookupError, TypeError):
        section = read_section(config)
        if section and section["files"][FUSED_NAME]:
            Source(**(section["source"] or {}))  # else it is damaged, or of a later version
            return section
    return {}


@contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder in the directory. Creates missing directories, and removes them if the save fails."""
    created = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with work_folder(directory, "saving") as tmp:
            yield tmp
    except BaseException:
        for path in created:
            with suppress(OSError):  # not empty: another process has written to it
                path.rmdir()
        raise


def _write_weights(contents: Contents, folder: Path) -> dict[str, Any]:
    """Writes both weight files and config.json; returns the contents of config.json."""
    dense: Any = fused_copy(contents.model)
    cfg, source = dict(contents.cfg), contents.known_source
    if not (source and source.name):  # ``base_model=`` alone says nothing of the cfg
        cfg = {name: value for name, value in cfg.items() if name not in _ORIGIN}
    # timm reads a saved model's class names into the cfg. They go back to where transformers looks for them.
    labels = {name: cfg.pop(name, None) for name in ("label_names", "label_descriptions")}
    config = dict(contents.extra)
    if "label_names" not in config and cfg.get("num_classes") == dense.num_classes:
        config = {**{name: value for name, value in labels.items() if value}, **config}
    # This tag makes the plug-in load the model, see timm_plugin.names.
    dense.pretrained_cfg = {**cfg, "tag": masterkeys_tag(cfg.get("tag")), "license": contents.source.license}
    # The file name is fixed: else timm loads a pickle if the Hub does not answer for the safetensors file.
    config["pretrained_cfg"] = {"hf_hub_filename": FUSED_NAME}
    args = {name: _as_json(name, value) for name, value in get_model_args(dense).items()}
    with os_errors():
        save_for_hf(dense, str(folder), model_config=config, model_args=args, safe_serialization=True)
    write_compact(contents.layers, folder / COMPACT_NAME)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text())
    # The section holds the ``mk_`` settings. transformers refuses ``num_classes`` here and at the top level.
    args = saved.get("model_args", {})
    saved["model_args"] = {n: v for n, v in args.items() if not n.startswith("mk_") and n != "num_classes"}
    saved[SECTION] = {**contents.section, "files": files_sha256(folder)}
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    return saved


def _as_json(name: str, value: Any) -> Any:
    """An argument of ``create_model`` as JSON data: a layer class by its timm name, an ``mk_`` setting as None."""
    if name.startswith("mk_"):
        return None  # not left out, as timm would add the model's own value
    if isinstance(value, type):
        short = value.__name__.lower()
        for get_layer in (get_act_layer, get_norm_layer):
            with suppress(Exception):  # whatever timm raises for a name it does not know
                if get_layer(short):  # ``_check_reload`` checks that it gives the same layer
                    return short
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ConversionError(
            f"The model was created with {name}={value!r}, which config.json cannot hold. Create it with a name that "
            f"timm knows ({name}='relu', for one), then load its weights."
        ) from None
    return value


def _check_reload(model: nn.Module, folder: Path, saved: Mapping[str, Any]) -> None:
    """Raises ConversionError unless the saved files load as a model with the same weights and outputs."""
    cfg = {**saved["pretrained_cfg"], "architecture": saved["architecture"], "num_classes": saved["num_classes"]}
    try:
        with undisturbed():
            del cfg["tag"]  # dense, as stock timm makes it
            reloaded = timm.create_model(saved["architecture"], pretrained_cfg=cfg, **saved["model_args"])
            reloaded.load_state_dict(load_file(folder / FUSED_NAME))
            restore_layers(reloaded, read_compact(folder / COMPACT_NAME))
    except OSError:
        raise
    except Exception as error:  # whatever timm raises for a model of another structure
        raise ConversionError(f"What would be saved does not load again: {in_short(error)} {_STRUCTURE}") from error
    expected, entries = model.state_dict(), {name: value.cpu() for name, value in reloaded.state_dict().items()}
    differing = sorted(entries.keys() ^ expected.keys()) or [
        name for name, value in expected.items() if not _same(entries[name], value.cpu())
    ]
    if differing:
        raise ConversionError(
            f"What would be saved does not load as the same model: {', '.join(differing[:3])} differ. {_STRUCTURE}"
        )
    if not _same_outputs(model, reloaded):
        raise ConversionError(f"What would be saved loads with the same weights, but other outputs. {_STRUCTURE}")


def _same(saved: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal, up to rounding to the dtype of either."""
    return saved.shape == expected.shape and (
        torch.equal(saved.to(expected.dtype), expected) or torch.equal(saved, expected.to(saved.dtype))
    )


@torch.no_grad()
def _same_outputs(model: nn.Module, reloaded: nn.Module) -> bool:
    """Whether both models give the same output for one image: an activation replaced by hand shows only there."""
    first = next(model.parameters())
    cfg: Any = model.pretrained_cfg
    image = torch.rand(1, *cfg["input_size"], generator=torch.Generator().manual_seed(0), device="cpu").to(first)
    with evaluating(model, reloaded):
        try:
            output, restored = model(image), reloaded.to(first)(image)
        except Exception:  # the model takes other images than its cfg says
            return True
    if not isinstance(output, torch.Tensor):
        return True
    if torch.finfo(first.dtype).bits >= 32:
        return torch.allclose(output, restored, rtol=1e-3, atol=1e-4)
    # Half precision rounds the output of every layer.
    return torch.allclose(output, restored, rtol=0.05, atol=0.05 * float(output.abs().max()))
