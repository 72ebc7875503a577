"""Picks the tensor to compare from a model's output, which may be a tuple, a dictionary or an object."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError

Output = str | int | Callable[[Any], torch.Tensor] | None

HEADS = ("logits", "out")  # names of the output of a head
# names of the output of a model without a head; of several maps, as of the backbones of transformers, the last counts
FEATURES = ("image_embeds", "image_features", "last_hidden_state", "feature_maps")
EMBEDDERS = ("open_clip",)  # libraries whose models return embeddings, as plain tensors


def output_of(model: nn.Module, images: torch.Tensor, output: Output = None) -> torch.Tensor:
    """The tensor that calibration compares, for these images; they stay as they are, which some models change.

    Raises:
        CalibrationError: The output is not finite or holds no such tensor.
    """
    return _finite(model, pick_output(model, model(images.clone()), output))


def _finite(model: nn.Module, out: torch.Tensor) -> torch.Tensor:
    if not out.isfinite().all():
        raise CalibrationError(f"{type(model).__name__} returns NaN or Inf on these images.")
    return out


def first_output(model: nn.Module, images: torch.Tensor, output: Output = None) -> tuple[torch.Tensor, bool]:
    """The output for some images and whether it is of a model without a head.

    Raises:
        CalibrationError: The model cannot take these images, or its output is not finite, holds no tensor or is one
            number.
    """
    try:
        raw = model(images.clone())
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot work with images of {tuple(images.shape[1:])}: {error}"
        ) from error
    out = _finite(model, pick_output(model, raw, output))
    if not out.ndim:
        raise CalibrationError(
            f"{type(model).__name__} returns one number for {len(images)} images, expected an output for each. output= "
            "says where it is: a key, an index, an attribute, or a callable on the model's output."
        )
    return out, gives_features(model, raw, out)


def pick_output(model: nn.Module, raw: Any, output: Output = None) -> torch.Tensor:
    """The tensor in a model's output ``raw`` that calibration compares.

    ``output`` is a key, an index or an attribute of it, or a callable on it. None takes a tensor as it is. Of any other
    output it takes the key or attribute named in ``HEADS`` or ``FEATURES``, or else the first tensor; of the list of a
    ``features_only`` model the last, which depends on every layer.

    Raises:
        CalibrationError: There is no such output, or it is no tensor.
    """
    try:
        picked = _pick(model, raw, output)
    except (LookupError, AttributeError, TypeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} returns {describe(raw)}, without {output!r} ({error})."
        ) from error
    if not isinstance(picked, torch.Tensor):
        expected = "a tensor in it" if output is None else f"a tensor at {output!r}, got {describe(picked)}"
        raise CalibrationError(
            f"{type(model).__name__} returns {describe(raw)}, expected {expected}. output= says where it is: a key, an "
            "index, an attribute, or a callable on the model's output."
        )
    return picked


def gives_features(model: nn.Module, raw: Any, out: torch.Tensor | None = None) -> bool:
    """Whether a model has no head, so that the channels of its output are features, not classes.

    ``out`` is the tensor picked from the output ``raw``: vectors of length 1 are embeddings.
    """
    if hasattr(model, "feature_info") and isinstance(raw, (Mapping, list, tuple)):
        return True
    if type(model).__module__.partition(".")[0] in EMBEDDERS or _is_normalised(out):
        return True
    if getattr(model, "num_classes", None) == 0:
        return True
    heads, features = ([_entry(raw, name) is not None for name in names] for names in (HEADS, FEATURES))
    return any(features) and not any(heads)


def _is_normalised(out: torch.Tensor | None) -> bool:
    if out is None or out.ndim != 2 or out.shape[1] == 1 or not out.is_floating_point():
        return False
    return bool((out.detach().norm(dim=1) - 1).abs().max() < 1e-3)


def _pick(model: nn.Module, raw: Any, output: Output) -> Any:
    if callable(output):
        return output(raw)
    if output is not None and isinstance(raw, torch.Tensor):
        raise TypeError("a tensor has no parts to choose from, leave output out")
    if isinstance(output, str):
        return raw[output] if isinstance(raw, Mapping) and output in raw else getattr(raw, output)
    if output is not None:
        return raw[output]
    if isinstance(raw, torch.Tensor):
        return raw
    for name in HEADS + FEATURES:
        found = _entry(raw, name)
        if name == "feature_maps" and isinstance(found, (list, tuple)) and found:
            found = found[-1]
        if isinstance(found, torch.Tensor):
            return found
    values = list(raw.values()) if isinstance(raw, Mapping) else list(raw) if isinstance(raw, (list, tuple)) else []
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if hasattr(model, "feature_info"):
        tensors.reverse()
    return tensors[0] if tensors else None


def _entry(raw: Any, name: str) -> Any:
    if isinstance(raw, torch.Tensor):
        return None
    return raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)


def describe(raw: Any) -> str:
    """The type of an output or a batch, with the keys of a mapping or the types of a sequence."""
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} of {', '.join(map(repr, raw))}"
    if isinstance(raw, (list, tuple)):
        return f"a {type(raw).__name__} of {', '.join(type(value).__name__ for value in raw)}"
    return f"a {type(raw).__name__}"
