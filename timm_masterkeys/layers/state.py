"""Checks and prepares the entries of a state dict that a converted layer loads."""

from typing import TYPE_CHECKING, Any

import torch

from ..keys.projection import first_not_finite

if TYPE_CHECKING:
    from .masterkey import MasterKeyConv2d

_DRIFT = 1e-3  # how far equal keys drift in thousands of updates of an average that is saved before train() or eval()
_WHOLE = 0.05  # tolerance of a key index; an average of equal ones is much nearer to a whole number


def state_problems(layer: "MasterKeyConv2d", state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Messages about a layer's entries in a state dict; an empty list if they can be loaded."""
    place = prefix or "layer "
    compact = [name for name in layer.compact_entries if prefix + name in state_dict]
    dense = state_dict.get(prefix + "weight")
    if dense is not None and compact:
        return [f"{place}weight: given together with {', '.join(compact)}. Keep the dense or the compact entries."]
    for name in (*compact, *(["weight"] if prefix + "weight" in state_dict else [])):
        if not isinstance(state_dict[prefix + name], torch.Tensor):
            return [f"{place}{name}: got a {type(state_dict[prefix + name]).__name__}, expected a tensor."]
    if dense is not None:
        problem = _dense_problem(dense, (layer.out_channels, 1, *layer.kernel_size))
        return [f"{place}weight: {problem}"] if problem else []
    if not layer.has_sigmas and prefix + "log_sigma" in state_dict:
        return [f"{place}log_sigma: made with trainable='sigmas'; convert with that, or load the dense weights."]
    missing = [name for name in layer.compact_entries if name not in compact]
    if missing == ["log_sigma"]:
        return [f"{place}log_sigma: missing, not made with trainable='sigmas'; load the dense weights."]
    if compact and missing:
        return [f"{place}{compact[0]}: given without {', '.join(missing)}. The compact entries belong together."]
    return [place + problem for problem in _compact_problems(layer, {n: state_dict[prefix + n] for n in compact})]


def entries_to_load(
    layer: "MasterKeyConv2d", state_dict: dict[str, Any], prefix: str, assign: bool
) -> dict[str, torch.Tensor]:
    """The layer's entries from a state dict without problems: dense kernels projected, keys from the bank."""
    entries = {name: value.detach() for name, value in state_dict.items() if name.startswith(prefix)}
    dense = entries.pop(prefix + "weight", None)
    if dense is not None:
        dtype = dense.dtype if assign else torch.promote_types(dense.dtype, layer.keys.dtype)
        entries |= {prefix + name: value for name, value in layer.fitted(dense.to(dtype)).items()}
    if prefix + "scale" in entries:
        # The bank's exact keys: those in half precision and in averages are rounded, and a dense file has none.
        target = entries[prefix + "scale"] if assign else layer.keys
        entries[prefix + "keys"] = layer.own_keys().to(target.device, target.dtype)
        entries[prefix + "key_index"] = entries[prefix + "key_index"].round().float()
    return entries


def _dense_problem(weight: torch.Tensor, shape: tuple[int, ...]) -> str:
    if tuple(weight.shape) != shape:
        return f"got shape {tuple(weight.shape)}, expected {shape}."
    channel = first_not_finite(weight)
    if channel is not None:
        return f"channel {channel} holds NaN or Inf; fix the checkpoint first."
    return ""


def _compact_problems(layer: "MasterKeyConv2d", compact: dict[str, torch.Tensor]) -> list[str]:
    problems = []
    for name, value in compact.items():
        shape, expected = tuple(value.shape), tuple(getattr(layer, name).shape)
        if shape != expected:
            reasons = "another number of keys per kernel, bank, size or channel count"
            problems.append(f"{name}: got shape {shape}, expected {expected} ({reasons}).")
    if problems or not compact or compact["keys"].is_meta:
        return problems
    for name in ("scale", "shift", "log_sigma"):
        if name in compact and not compact[name].isfinite().all():
            problems.append(f"{name}: holds NaN or Inf; fix the checkpoint first.")
    keys, own_keys = compact["keys"].cpu().double(), layer.own_keys().double()
    tolerance = max(2 * torch.finfo(compact["keys"].dtype).eps, _DRIFT)
    known = own_keys, own_keys.bfloat16().double()  # rounded once, then cast or averaged in another dtype
    if not any(torch.allclose(keys, one, rtol=0, atol=tolerance) for one in known):
        problems.append(
            f"keys: the checkpoint was made with another bank than '{layer.bank.name}'. "
            "Convert with its bank, or load its dense weights."
        )
    problem = index_problem(compact["key_index"], len(layer.keys))
    return [*problems, f"key_index: {problem}"] if problem else problems


def index_problem(key_index: torch.Tensor, keys: int) -> str:
    """The message if key indices are no whole numbers below the number of keys; else empty."""
    index = key_index.cpu().double()
    low, high = index.round().aminmax()
    if not (index - index.round()).abs().max() < _WHOLE:  # NaN is refused too
        return "holds fractions or NaN; average checkpoints of one conversion only."
    if low < 0 or high >= keys:
        return f"holds {low:.0f} to {high:.0f}, the bank has {keys} keys."
    return ""
