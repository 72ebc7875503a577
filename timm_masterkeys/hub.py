"""Saves converted models for timm: a folder that loads with this package bit for bit, and without it."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from . import __version__
from .checkpoint import COMPACT_NAME, FORMAT_VERSION, save_compact
from .errors import ConversionError
from .files import atomic_path
from .layers import MasterKeyConv2d
from .report import conversion_report
from .surgery import fuse_masterkeys


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None
) -> Path:
    """Saves a converted timm model as ``model.safetensors``, ``masterkeys.safetensors`` and ``config.json``.

    The dense weights load in stock timm under the stock architecture; with this package imported,
    ``timm.create_model("local-dir:DIR", pretrained=True)`` gives the converted model back bit for bit.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        directory: Made if missing; files of other names in it stay.
        config: More top-level entries for config.json, such as ``label_names``.

    Returns:
        The directory.

    Raises:
        ConversionError: Not converted, or not a timm model.
        OSError: The directory cannot be written; files already there are whole, old or new.

    Example:
        >>> save_pretrained(model, "out")
        >>> model = timm.create_model("local-dir:out", pretrained=True)
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg), so timm could not load it again. "
            "Save its state_dict instead."
        )
    report = conversion_report(model)
    dense = fuse_masterkeys(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    tag = cfg.get("tag") or ""
    if not tag.startswith("mk8"):
        dense.pretrained_cfg = {**cfg, "tag": f"mk8_{tag}" if tag else "mk8"}
    layers = [module for module in model.modules() if isinstance(module, MasterKeyConv2d)]
    about = {
        "format_version": FORMAT_VERSION,
        "banks": {layer.bank.name: layer.bank.digest for layer in layers},
        "keys_per_kernel": max(layer.keys_per_kernel for layer in layers),
        "trainable": layers[0].trainable,
        "layers": len(layers),
        "kernels": report.total.channels,
        "mean_r2": round(report.total.mean_r2, 4),
        "source": cfg.get("hf_hub_id"),
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as tmp:
        save_for_hf(dense, tmp, model_config={**(config or {}), "masterkeys": about}, safe_serialization=True)
        save_compact(model, Path(tmp, COMPACT_NAME))
        config_path = Path(tmp, "config.json")
        saved = json.loads(config_path.read_text())
        saved["model_args"] = {k: v for k, v in saved.get("model_args", {}).items() if not k.startswith("mk_")}
        config_path.write_text(json.dumps(saved, indent=2) + "\n")
        for path in sorted(Path(tmp).iterdir()):
            with atomic_path(directory / path.name) as target:
                path.replace(target)
    return directory
