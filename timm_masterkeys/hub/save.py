"""Saves converted models for timm, after a check that what is written loads again as the same model."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult
from safetensors.torch import load_file
from timm.layers import get_act_layer, get_norm_layer
from timm.models import get_model_args, save_for_hf
from torch import nn

from ..conversion.convert import fuse_masterkeys
from ..conversion.plan import converted_layers, layer_settings
from ..conversion.record import Source, keys_digest
from ..conversion.report import conversion_report
from ..conversion.tags import masterkeys_tag
from ..conversion.wrapped import evaluating, is_sharded, quantised_entry, unwrapped
from ..errors import CheckpointError, ConversionError
from ..files import atomic_path, file_sha256, os_errors, work_folder
from ..version import __version__
from .card import make_card, read_readme
from .license import saved_source
from .load import read_section
from .weights import COMPACT_NAME, FUSED_NAME, SECTION, describe_layers, read_compact, restore_layers, save_compact

_logger = logging.getLogger(__name__)

FILES = (FUSED_NAME, COMPACT_NAME, "README.md", "config.json")  # config.json last: without it nothing loads

# Entries of config.json that come from the model; the user can add others, such as label names.
OWN_ENTRIES = (
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    SECTION,
)
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
    model = unwrapped(model)
    cfg = timm_cfg(model)
    _check_config(config or {})
    report = conversion_report(model)
    _check_finite(model)
    layers = layer_settings(model)
    banks = {settings.bank for settings in layers.values()}
    record = report.record  # of conversions that were undone since, the files do not hold the bank
    record = replace(record, conversions=tuple(config for config in record.conversions if config.bank in banks))
    source = saved_source(record.source, license, base_model)
    if not (record.source and record.source.name):
        cfg = {name: value for name, value in cfg.items() if name not in _ORIGIN}
    dense: Any = contiguous(fuse_masterkeys(model))
    dense.pretrained_cfg = {**cfg, "tag": masterkeys_tag(cfg.get("tag")), "license": source and source.license}
    r2 = report.total.mean_r2
    section = {
        **describe_layers(layers),
        **replace(record, source=source, keys=keys_digest(model) if source else "").to_dict(),
        "kernels": report.total.channels,
        "mean_r2": None if math.isnan(r2) else round(r2, 4),
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    calibrated = record.was_calibrated or report.total.random == report.total.channels
    directory = Path(directory)
    existing, previous = read_readme(directory / "README.md"), _previous_section(directory / "config.json")
    with _saving(directory) as tmp:
        saved = _write(model, dense, tmp, config or {}, section)
        _check_reload(model, tmp, saved)
        card_id = repo_id or directory.resolve().name
        card = make_card(
            saved, report, card_id, source or Source(), datasets, tags, metrics, calibrated, existing, previous
        )
        (tmp / "README.md").write_text(str(card), encoding="utf-8")
        for name in FILES:
            with atomic_path(directory / name) as target:
                (tmp / name).replace(target)
    if not calibrated and "model-index" not in card.data.to_dict():
        _logger.warning(
            "%s: not calibrated. Unless it was trained since its conversion, it is of little use as it is: "
            "calibrate_masterkeys(model, dense_model, images), or fine-tune.",
            repo_id or directory,
        )
    return directory


def _previous_section(config: Path) -> Mapping[str, Any]:
    """What an earlier publication in the same place said of its weights; empty if there was none."""
    with suppress(CheckpointError, LookupError, TypeError):
        section = read_section(config)
        if section and section["files"][FUSED_NAME]:
            return section
    return {}


def contiguous(model: nn.Module) -> nn.Module:
    """Makes all tensors of a model contiguous, as safetensors requires. In place."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    return model


def timm_cfg(model: nn.Module) -> dict[str, Any]:
    """A copy of a model's ``pretrained_cfg``; ConversionError if it is not a whole timm model, or not converted."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg, or no classes), so timm could not "
            "load it again. Save its state_dict instead."
        )
    converted_layers(model, required=True)
    return dict(cfg)


def _check_config(config: Mapping[str, Any]) -> None:
    reserved = [name for name in config if name in OWN_ENTRIES]
    if reserved:
        raise ConversionError(f"config holds {', '.join(reserved)}, which come from the model. Leave them out.")
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config cannot be written as JSON: {error}.") from None


def _check_finite(model: nn.Module) -> None:
    """Raises ConversionError if a model is quantised or holds NaN or Inf."""
    if not is_sharded(model) and (entry := quantised_entry(model)):
        raise ConversionError(
            f"{entry}, expected ordinary tensors, of which timm makes a model again. Save the model before it is "
            "quantised, and quantise what is loaded."
        )
    for name, value in model.state_dict().items():
        if not value.is_meta and not value.isfinite().all():
            raise ConversionError(f"{name} holds NaN or Inf. Fix the weights, then save.")


@contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder in the directory. Creates a missing directory, and removes it if the save fails."""
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with work_folder(directory, "saving") as tmp:
            yield tmp
    except BaseException:
        if created:
            with suppress(OSError):  # not empty: another process has written to it
                directory.rmdir()
        raise


def _write(
    model: nn.Module, dense: nn.Module, folder: Path, config: Mapping[str, Any], section: dict[str, Any]
) -> dict[str, Any]:
    """Writes both weight files and config.json; returns the contents of config.json."""
    cfg: Any = dense.pretrained_cfg
    # timm reads a saved model's class names into the cfg. They go back to where transformers looks for them.
    labels = {name: cfg.pop(name, None) for name in ("label_names", "label_descriptions")}
    if "label_names" not in config and cfg.get("num_classes") == dense.num_classes:
        config = {**{name: value for name, value in labels.items() if value}, **config}
    # The file name is fixed: else timm loads a pickle if the Hub does not answer for the safetensors file.
    config = {**config, "pretrained_cfg": {"hf_hub_filename": FUSED_NAME}}
    args = {name: _as_json(name, value) for name, value in get_model_args(dense).items()}
    with os_errors():
        save_for_hf(dense, str(folder), model_config=config, model_args=args, safe_serialization=True)
    save_compact(model, folder / COMPACT_NAME)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text())
    # The section holds the ``mk_`` settings. transformers refuses ``num_classes`` here and at the top level.
    args = saved.get("model_args", {})
    saved["model_args"] = {n: v for n, v in args.items() if not n.startswith("mk_") and n != "num_classes"}
    files = {name: file_sha256(folder / name) for name in (FUSED_NAME, COMPACT_NAME)}
    saved[SECTION] = {**section, "files": files}
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    return saved


def _as_json(name: str, value: Any) -> Any:
    """An argument of ``create_model`` as JSON data: a layer class by its timm name, an ``mk_`` setting as None."""
    if name.startswith("mk_"):
        return None
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
        with torch.random.fork_rng(devices=[]):
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
    if first.is_meta:
        return True
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


def in_short(error: Exception) -> str:
    """The first lines of an error's message, without those of addresses and request ids if there are others."""
    lines = [line.strip() for line in (getattr(error, "server_message", None) or str(error)).splitlines()]
    plain = [line for line in lines if line and "http" not in line and "Request ID" not in line]
    return " ".join((plain or lines)[:3])[:300] or type(error).__name__
