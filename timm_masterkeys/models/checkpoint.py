"""Dense and compact files of a converted model, and the checks between them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError, ConversionError
from ..files import atomic_path, file_sha256
from ..keys.banks import KeyBank
from ..layers import MasterKeyConv2d, ScaledKeyConv2d, Trainable
from .plan import flat_name, is_feature_extractor
from .surgery import replace_layers
from .wrapped import check_unwrapped, unwrapped

DENSE_NAME = "model.safetensors"
COMPACT_NAME = "masterkeys.safetensors"
FORMAT_VERSION = 1

_METADATA = "timm_masterkeys"

_Contents = tuple[dict[str, torch.Tensor], dict[str, KeyBank], dict[str, dict[str, Any]]]


def save_compact(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the exact compact form of the converted layers: banks, keys, key_index, scale, shift, r2. Atomic.

    Args:
        model: A converted model. Not changed.
        path: A ``.safetensors`` file.

    Raises:
        ConversionError: The model holds no MasterKeyConv2d, or is an average of networks with different keys.
        OSError: The file cannot be written.
    """
    model = unwrapped(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MasterKeyConv2d)}
    if not layers:
        raise ConversionError(f"{type(model).__name__} holds no MasterKeyConv2d: convert_to_masterkeys first.")
    for layer in layers.values():
        layer.check_keys()
    banks = {layer.bank.digest: layer.bank for layer in layers.values()}
    tensors = {f"banks.{digest}": torch.from_numpy(bank.keys.copy()) for digest, bank in banks.items()}
    for name, layer in layers.items():
        entries = {entry: getattr(layer, entry) for entry in layer.compact_entries} | {"key_index": layer.key_rows()}
        tensors |= {f"{name}.{entry}": v.detach().cpu().contiguous().clone() for entry, v in entries.items()}
    about: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "banks": {
            d: {"name": b.name, "source": b.source, "licence": b.licence, "resize": b.resize} for d, b in banks.items()
        },
        "layers": {
            name: {"bank": layer.bank.digest, "keys_per_kernel": layer.keys_per_kernel, "trainable": layer.trainable}
            for name, layer in layers.items()
        },
    }
    about["sha256"] = _digest(about, tensors)
    with atomic_path(path) as tmp:  # one metadata entry: safetensors writes several in random order
        save_file(tensors, tmp, {_METADATA: json.dumps(about)})


def load_compact(
    model: nn.Module, path: str | os.PathLike[str], trainable: Trainable | None = None, *, values: bool = True
) -> None:
    """Turns the layers of a dense model that a compact file lists into MasterKeyConv2d, bit for bit. In place.

    Args:
        model: A model that holds the dense weights saved with the file; also its ``features_only`` form.
        path: A file written by ``save_compact``.
        trainable: Overrides the saved mode.
        values: Take the file's kernels; else only its banks and settings, kernels drawn as for training from scratch.

    Raises:
        CheckpointError: Not such a file, a newer format, altered values, layers the model lacks, or kernels that
            disagree with the model's dense ones. The model is then as it was.
        ConversionError: A ``trainable`` that the file's layers do not have, or a wrapped or sharded model.
    """
    check_unwrapped(model)
    with _damage(path):
        _apply(model, path, _read(path), trainable, values)


def _apply(
    model: nn.Module, path: str | os.PathLike[str], contents: _Contents, trainable: Trainable | None, values: bool
) -> None:
    """``load_compact`` with a file that was read."""
    tensors, banks, layers = contents
    convs = {flat_name(name): (name, conv) for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    new: dict[str, nn.Module] = {}
    for name, settings in layers.items():
        here, conv = convs.get(flat_name(name), ("", None))
        if conv is None:
            if is_feature_extractor(model):
                continue  # which keeps just the stages asked for
            raise CheckpointError(
                f"'{path}' lists layer {name}, which the model does not have. Use the model it came with."
            )
        if isinstance(conv, MasterKeyConv2d):
            raise CheckpointError(f"{here} is converted already; '{path}' goes with the dense model.")
        mode = trainable or settings["trainable"]
        scaled = f"{name}.log_sigma" in tensors
        new[here] = layer = MasterKeyConv2d.unfitted(
            conv, banks[settings["bank"]], settings["keys_per_kernel"], "scales" if scaled else mode
        )
        layer.set_trainable(mode, requires_grad=conv.weight.requires_grad)
        if not values:
            layer.reset_parameters(conv.weight)
            continue
        entries = {e: tensors[f"{name}.{e}"] for e in layer.compact_entries if f"{name}.{e}" in tensors}
        missing = [entry for entry in layer.compact_entries if entry not in entries]
        problems = [f"{entry} is missing" for entry in missing] or layer.check_state_dict(entries)
        if problems:
            raise CheckpointError(f"'{path}' does not fit layer {name}: {'; '.join(problems)}")
        layer.load_state_dict(entries, strict=False)
        if not _agree(layer, entries, conv.weight.detach()):
            raise CheckpointError(
                f"'{path}' disagrees with the dense weights of {name}: the two files are not of one conversion. "
                "Publish both again."
            )
    replace_layers(model, new)


def restore_masterkeys(
    model: nn.Module,
    pretrained_cfg: dict[str, Any],
    settings: dict[str, Any],
    cache_dir: str | None = None,
    values: bool = True,
) -> bool:
    """Restores a model just loaded from a published repository or folder to its exact compact form. In place.

    Args:
        model: The dense model.
        pretrained_cfg: Its cfg, with ``source`` "hf-hub" or "local-dir".
        settings: Conversion settings the caller gave; only ``trainable`` can differ from what was published.
        cache_dir: The Hub cache.
        values: Take the published kernels; else only banks and settings (``pretrained=False``).

    Returns:
        False if there is no compact file, and config.json does not speak of one.

    Raises:
        CheckpointError: A compact file that does not fit; the model is then as it was.
        ConversionError: Settings that contradict the published conversion.
    """
    if pretrained_cfg["source"] == "local-dir":
        folder = Path(pretrained_cfg["file"])
        config, dense, path = (folder / name for name in ("config.json", DENSE_NAME, COMPACT_NAME))
    else:
        repo_id, _, revision = pretrained_cfg["hf_hub_id"].partition("@")
        where: dict[str, Any] = {"revision": revision or None, "cache_dir": cache_dir}
        # timm has just fetched these: read them from the cache, ask the Hub nothing
        cached = (try_to_load_from_cache(repo_id, name, **where) for name in ("config.json", DENSE_NAME))
        config, dense = (Path(found) if isinstance(found, str) else Path("-") for found in cached)
        path = config.with_name(COMPACT_NAME)
        try:
            path = Path(hf_hub_download(repo_id, COMPACT_NAME, **where))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"Cannot get {COMPACT_NAME} of {repo_id}: the Hub does not answer and the cache does not have it. "
                "Try again online; without it the exact conversion is lost."
            ) from error
        except EntryNotFoundError:
            pass
    with _damage(config):
        about = _about(config) if config.is_file() else None
    if not path.is_file():
        if about is None:
            return False
        raise CheckpointError(
            f"{COMPACT_NAME} is missing beside '{config}', which speaks of it: the exact conversion is lost. Publish "
            "again; to project the dense weights anew, remove the 'masterkeys' section."
        )
    with _damage(path):
        contents = _read(path)
    if about is not None:
        with _damage(config):
            _check_config(config, about, path, contents)
    if values and dense.is_file():
        _check_names(model, dense, pretrained_cfg)
        if about is not None and pretrained_cfg["source"] == "hf-hub":  # of a folder, check_dense has
            _check_sha256(config, about, dense)
    fixed = sorted(f"mk_{name}" for name in settings if name != "trainable")
    if fixed:
        raise ConversionError(
            f"{', '.join(fixed)} cannot change a published conversion. Drop them, or convert the source weights anew."
        )
    with _damage(path):
        _apply(model, path, contents, settings.get("trainable"), values)
    return True


def check_dense(folder: str | os.PathLike[str]) -> None:
    """Refuses a saved folder whose dense weights are not the file config.json speaks of; timm would read any other.

    Raises:
        CheckpointError: The file is missing, damaged, altered or of another conversion.
    """
    config = Path(folder) / "config.json"
    with _damage(config):
        about = _about(config)
        if about is not None:
            _check_sha256(config, about, config.with_name(DENSE_NAME))


def _read(path: str | os.PathLike[str]) -> _Contents:
    """A compact file's tensors, its banks by digest and each layer's settings, checked for version and checksum."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read '{path}': {error}. Expected a file written by save_compact.") from error
    if _METADATA not in metadata:
        raise CheckpointError(f"'{path}' is no compact masterkeys file. Expected one written by save_compact.")
    about = json.loads(metadata[_METADATA])
    _check_version(path, about)
    if about.pop("sha256", None) != _digest(about, tensors):
        raise CheckpointError(f"'{path}' does not match its checksum: it is damaged or altered. Get the file again.")
    if not about["layers"]:
        raise CheckpointError(f"'{path}' lists no layer. Expected a file written by save_compact.")
    banks = {}
    for digest, bank in about["banks"].items():
        keys = tensors.pop(f"banks.{digest}", None)
        if keys is None:
            raise CheckpointError(f"'{path}' lacks the keys of bank '{bank['name']}'. Get the file again.")
        banks[digest] = KeyBank(bank["name"], keys.numpy(), bank["source"], bank["licence"], bank["resize"])
        if banks[digest].digest != digest:
            raise CheckpointError(f"'{path}': bank '{bank['name']}' does not match its digest. Get the file again.")
    for name, settings in about["layers"].items():
        if settings["bank"] not in banks or settings["trainable"] not in get_args(Trainable):
            raise CheckpointError(f"'{path}': {settings} of layer {name} are no settings this version knows.")
    return tensors, banks, about["layers"]


def _digest(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over all a compact file says, in hex."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _about(config: Path) -> dict[str, Any] | None:
    """The ``masterkeys`` section of a config.json."""
    about: dict[str, Any] | None = json.loads(config.read_text(encoding="utf-8")).get("masterkeys")
    return about


@contextlib.contextmanager
def _damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file of which something is not as ``save_pretrained`` and ``save_compact`` write it."""
    try:
        yield
    except (CheckpointError, ConversionError, OSError):
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' is damaged ({type(error).__name__}: {error}). Get the file again.") from error


def _agree(layer: MasterKeyConv2d, entries: dict[str, torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether a dense weight has the kernels of the compact entries, up to the rounding of either's dtype."""
    if weight.is_meta:
        return True
    scale, shift = entries["scale"].double(), entries["shift"].double()
    if isinstance(layer, ScaledKeyConv2d):
        terms = (layer.compose_weight().detach().double().cpu().flatten(1) - shift[:, None]).unsqueeze(1)
        size = 8 * terms.abs().amax((1, 2))[:, None]  # sums over all taps' frequencies, in an order of the machine's
    else:
        terms = entries["keys"].double().flatten(1)[entries["key_index"]] * scale.view(len(shift), -1, 1)
        size = terms.abs().sum(1)
    kernels = terms.sum(1) + shift[:, None]
    rounding = torch.finfo(entries["scale"].dtype).eps * (size + shift[:, None].abs())
    dtype = torch.finfo(weight.dtype)
    tolerance = 8 * (rounding + dtype.eps * (kernels.abs() + dtype.tiny))
    return bool(((weight.double().cpu().flatten(1) - kernels).abs() <= tolerance).all())


def _check_version(path: str | os.PathLike[str], about: dict[str, Any]) -> None:
    version = about.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {version}, this one reads up to {FORMAT_VERSION}. Upgrade timm_masterkeys."
        )


def _check_config(config: Path, about: dict[str, Any], path: Path, contents: _Contents) -> None:
    """Refuses a compact file with other banks or layers than config.json names, or any other file."""
    _check_version(config, about)
    _, banks, layers = contents
    if set(banks) != set(about["banks"].values()) or len(layers) != about["layers"]:
        raise CheckpointError(
            f"'{path}' holds {len(layers)} layers of bank {', '.join(sorted(banks))}, config.json names "
            f"{about['layers']} of {about['banks']}: the files are not of one conversion. Publish both again."
        )
    _check_sha256(config, about, path)


def _check_sha256(config: Path, about: dict[str, Any], path: Path) -> None:
    """Refuses a file whose SHA-256 is not the one in config.json."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing beside '{config}'. Get it again, or save the model again.")
    if file_sha256(path) != about["sha256"][path.name]:
        raise CheckpointError(
            f"'{path}' is not the file that config.json speaks of (its SHA-256 differs): damaged, altered, or the "
            "files are not of one conversion. Get all of them again, or save the model again."
        )


def _check_names(model: nn.Module, path: Path, pretrained_cfg: dict[str, Any]) -> None:
    """Refuses a dense file that lacks tensors of the model or has others; timm itself looks only if classes agree."""
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
    classifier = pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    features = is_feature_extractor(model)
    names = {flat_name(name): name for name in stored} if features else {name: name for name in stored}
    wanted = {flat_name(name) if features else name for name in model.state_dict()}
    lacking = sorted(name for name in wanted - names.keys() if not name.startswith(heads or " "))
    extra = [] if features else sorted(name for name in names.keys() - wanted if not name.startswith(heads or " "))
    for what, found in (("lacks", lacking), ("has, unlike the model,", extra)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointError(f"'{path}' {what} {', '.join(found[:3])}{more}. Publish the whole model again.")
