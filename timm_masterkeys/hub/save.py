"""Saves converted models for timm: what is written, and the check that it loads again as the same model."""

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
from timm.layers import get_act_layer, get_norm_layer
from timm.models import get_model_args, save_for_hf
from torch import nn

from ..conversion.apply import converted_layers, describe
from ..conversion.convert import fuse_masterkeys
from ..conversion.record import Record, Source, keys_digest
from ..conversion.report import ConversionReport, conversion_report
from ..conversion.tags import masterkeys_tag
from ..conversion.wrapped import unwrapped
from ..errors import ConversionError
from ..files import atomic_path, file_sha256, os_errors, work_folder
from ..version import __version__
from .card import inherited_license, make_card, read_readme
from .check import check_entries, check_finite, check_reload
from .files import COMPACT_NAME, DENSE_NAME, describe_layers, save_compact

_logger = logging.getLogger(__name__)

FILES = (DENSE_NAME, COMPACT_NAME, "README.md", "config.json")  # config.json last: without it nothing loads

_ORIGIN = ("license", "hf_hub_id", "url", "origin_url", "tag")  # of a cfg: of weights that the model may not have


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
    """Saves a converted timm model: dense and compact safetensors, config.json and a model card.

    The dense weights load in stock timm under the stock architecture; with this package imported,
    ``timm.create_model("local-dir:DIR", pretrained=True)`` gives the converted model back bit for bit: that a dense
    model made anew becomes this one is checked before a file there is touched. Nothing is pickled. DataParallel,
    DistributedDataParallel, torch.compile and EMA wrappers are taken off.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        directory: Made if missing. Files of other names in it stay, and so does what a README there says elsewhere.
        repo_id: ``org/name`` for the card's examples; the directory's name if None.
        license: The weights' licence, where this package does not know it: it is inherited where a ``.mk8`` name or a
            saved model was loaded, also if the model was trained since; of a dense model of your own you say it.
        base_model: Hub id of the source weights, where this package does not know it.
        datasets: Hub ids of training data, for the card.
        tags: More tags for the card.
        metrics: Measured results for the card's model-index.
        config: More top-level entries for config.json, such as ``label_names`` and ``label_descriptions``.

    Returns:
        The directory.

    Raises:
        ConversionError: Not converted, not a model that timm could load again (a head replaced by hand, quantised
            weights, NaN), a licence or a source other than the known one, or a README there that cannot be read.
            Nothing was written.
        CheckpointError: A layer that was made empty and has no values.
        OSError: The directory cannot be written, or the disk is full. Each file there is then whole, old or new.

    Example:
        >>> save_pretrained(model, "out")
        >>> model = timm.create_model("local-dir:out", pretrained=True)
    """
    model = unwrapped(model)
    cfg = timm_cfg(model)
    check_entries(config or {})
    check_finite(model)
    report = conversion_report(model)
    record = report.record
    license = inherited_license(record.source, license)
    source = _source(record.source, license, base_model)
    if not (record.source and record.source.name):
        cfg = {name: value for name, value in cfg.items() if name not in _ORIGIN}
    cfg = {**cfg, "tag": masterkeys_tag(cfg.get("tag")), "license": license}
    dense: Any = fuse_masterkeys(model).to(memory_format=torch.contiguous_format)
    dense.pretrained_cfg = cfg
    keys = keys_digest(model) if source else ""  # also of a source that the caller told
    section = _section(model, replace(record, source=source, keys=keys), report)
    calibrated = record.was_calibrated or report.total.random == report.total.channels
    directory = Path(directory)
    existing = read_readme(directory / "README.md")
    with _saving(directory) as tmp:
        saved = _write(model, dense, tmp, config or {}, section)
        check_reload(model, tmp, saved)
        card = make_card(
            saved,
            report,
            repo_id or directory.resolve().name,
            source=source,
            datasets=datasets,
            tags=tags,
            metrics=metrics,
            calibrated=calibrated,
            existing=existing,
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


def timm_cfg(model: nn.Module) -> dict[str, Any]:
    """A copy of a converted model's ``pretrained_cfg``.

    Raises:
        ConversionError: Not a whole timm model, or not converted.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg), so timm could not load it again. "
            "Save its state_dict instead."
        )
    if not converted_layers(model):
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    return dict(cfg)


@contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """A temporary folder in the directory, which is made if missing and taken away again if nothing comes of it."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with work_folder(directory, "saving") as tmp:
            yield tmp
    except BaseException:
        if made:
            with suppress(OSError):  # not empty: somebody else's by now
                directory.rmdir()
        raise


def _source(source: Source | None, license: str | None, base_model: str | None) -> Source | None:
    """The source as it is saved: what is known, and what the caller says where nothing is."""
    if source is None and license is None and base_model is None:
        return None
    known = source or Source()
    if base_model and "/" in (known.name or "") and known.name != base_model:
        raise ConversionError(
            f"base_model='{base_model}' was given, but the model was converted from '{known.name}'. Leave it out."
        )
    given = known.license_given or (license is not None and license != (known.license or "").lower())
    return replace(known, license=license, license_given=given, name=base_model or known.name)


def _section(model: nn.Module, record: Record, report: ConversionReport) -> dict[str, Any]:
    """The ``masterkeys`` section of config.json, but for the checksums of the files."""
    r2 = report.total.mean_r2
    return {
        **describe_layers(describe(model)),
        **record.to_dict(),
        "kernels": report.total.channels,
        "mean_r2": None if math.isnan(r2) else round(r2, 4),
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }


def _write(
    model: nn.Module, dense: nn.Module, folder: Path, config: Mapping[str, Any], section: dict[str, Any]
) -> dict[str, Any]:
    """Writes both weight files and config.json; returns the latter."""
    # The file name is pinned: without it timm takes a pickle if the Hub does not answer for the safetensors.
    extra = {"pretrained_cfg": {"hf_hub_filename": DENSE_NAME}, "masterkeys": section}
    args = {name: _as_json(name, value) for name, value in get_model_args(dense).items()}
    with os_errors():
        save_for_hf(dense, str(folder), model_config={**config, **extra}, model_args=args, safe_serialization=True)
    save_compact(model, folder / COMPACT_NAME)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text())
    # Settings are in the section; what the top level says, transformers refuses to read twice.
    args = saved.get("model_args", {})
    saved["model_args"] = {n: v for n, v in args.items() if not n.startswith("mk_") and n != "num_classes"}
    section["files"] = {name: file_sha256(folder / name) for name in (DENSE_NAME, COMPACT_NAME)}
    saved["masterkeys"] = section
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    return saved


def _as_json(name: str, value: Any) -> Any:
    """An argument of ``create_model`` as JSON holds it: a layer's class by timm's name of it."""
    if name.startswith("mk_"):
        return None
    if isinstance(value, type):
        short = value.__name__.lower()
        for find in (get_act_layer, get_norm_layer):
            with suppress(Exception):  # whatever timm makes of a name it does not know
                if find(short):  # that it does the same is checked when the model is made anew
                    return short
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ConversionError(
            f"The model was created with {name}={value!r}, which config.json cannot hold. Create it with a name that "
            f"timm knows ({name}='relu', for one), then load its weights."
        ) from None
    return value
