"""The checks of a model before it is saved: what would not load again as the same model is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from ..conversion.apply import converted_layers
from ..conversion.wrapped import evaluating, is_sharded, quantised_entry
from ..errors import ConversionError
from .files import COMPACT_NAME, DENSE_NAME, read_compact, restore_layers

# What config.json says by itself; the rest (label names, entries of one's own) can be added.
OWN_ENTRIES = (
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    "masterkeys",
)
_STRUCTURE = "Is the model's structure as timm.create_model made it?"


def check_entries(config: Mapping[str, Any]) -> None:
    """Raises ConversionError if entries for config.json are not JSON, or what the model says by itself."""
    own = [name for name in config if name in OWN_ENTRIES]
    if own:
        raise ConversionError(f"config holds {', '.join(own)}, which the model says by itself. Leave it out.")
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config cannot be written as JSON: {error}.") from None


def check_finite(model: nn.Module) -> None:
    """Raises ConversionError if a model is quantised or holds NaN or Inf, CheckpointError if a layer has no values."""
    for layer in converted_layers(model).values():
        layer.check_values()
    if not is_sharded(model) and (entry := quantised_entry(model)):
        raise ConversionError(
            f"{entry}, expected ordinary tensors, of which timm makes a model again. Save the model before it is "
            "quantised, and quantise what is loaded."
        )
    for name, value in model.state_dict().items():
        if not value.is_meta and not value.isfinite().all():
            raise ConversionError(f"{name} holds NaN or Inf. Mend the weights, then save.")


def check_reload(model: nn.Module, folder: Path, saved: Mapping[str, Any]) -> None:
    """Raises ConversionError unless a dense model, made anew as config.json says, becomes the very same model."""
    cfg = {**saved["pretrained_cfg"], "architecture": saved["architecture"], "num_classes": saved["num_classes"]}
    try:
        with torch.random.fork_rng(devices=[]):
            del cfg["tag"]  # dense, as stock timm makes it
            again = timm.create_model(saved["architecture"], pretrained_cfg=cfg, **saved["model_args"])
        again.load_state_dict(load_file(folder / DENSE_NAME))
        restore_layers(again, read_compact(folder / COMPACT_NAME))
    except OSError:
        raise
    except Exception as error:  # whatever timm makes of a model of another structure
        raise ConversionError(f"What would be saved does not load again: {in_short(error)} {_STRUCTURE}") from error
    given, loaded = model.state_dict(), {name: value.cpu() for name, value in again.state_dict().items()}
    differing = sorted(loaded.keys() ^ given.keys()) or [
        name for name, value in given.items() if not _same(loaded[name], value.cpu())
    ]
    if differing:
        raise ConversionError(
            f"What would be saved does not load as the same model: {', '.join(differing[:3])} differ. {_STRUCTURE}"
        )
    if not _same_outputs(model, again):
        raise ConversionError(f"What would be saved loads with the same weights, but other outputs. {_STRUCTURE}")


@torch.no_grad()
def _same_outputs(model: nn.Module, again: nn.Module) -> bool:
    """Whether both put out the same for an image, as they do not with an activation replaced by hand."""
    first = next(model.parameters())
    if first.dtype != torch.float32 or first.is_meta:
        return True
    cfg: Any = model.pretrained_cfg
    image = torch.rand(1, *cfg["input_size"], generator=torch.Generator().manual_seed(0), device="cpu").to(first.device)
    with evaluating(model, again):
        try:
            out, back = model(image), again.to(first.device)(image)
        except Exception:  # it takes other images than its cfg says
            return True
    return not isinstance(out, torch.Tensor) or torch.allclose(out, back, rtol=1e-3, atol=1e-4)


def _same(saved: torch.Tensor, given: torch.Tensor) -> bool:
    """Equal, up to the rounding to the dtype of either."""
    return saved.shape == given.shape and (
        torch.equal(saved.to(given.dtype), given) or torch.equal(saved, given.to(saved.dtype))
    )


def in_short(error: Exception | None) -> str:
    """What an error says, without addresses and causes."""
    text = getattr(error, "server_message", None) or str(error)
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and "http" not in line and "Request ID" not in line
    ]
    return " ".join(lines[:3])[:300] or type(error).__name__
