"""Saves converted models for timm: what is written, and that it loads again as the same model."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult
from timm.models import save_for_hf
from torch import nn

from ..errors import ConversionError
from ..files import atomic_path, file_sha256, os_errors
from ..layers import MasterKeyConv2d
from ..models import _timm
from ..models.checkpoint import COMPACT_NAME, DENSE_NAME, FORMAT_VERSION, save_compact
from ..models.provenance import SOURCE_NOTE, TAG, is_known, is_masterkeys_tag
from ..models.report import conversion_report
from ..models.surgery import fuse_masterkeys
from ..models.wrapped import evaluating, unwrapped
from ..version import __version__
from .card import inherited_license, make_card, read_readme

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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

_SCRATCH, _UNKNOWN = "scratch", "weights of unknown origin"  # as sources: nobody else's weights, and anybody's
FILES = (DENSE_NAME, COMPACT_NAME, "README.md", "config.json")  # config.json last: without it nothing loads
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
    """Saves a converted timm model: dense and compact safetensors, config.json and a model card.

    The dense weights load in stock timm under the stock architecture; with this package imported,
    ``timm.create_model("local-dir:DIR", pretrained=True)`` gives the converted model back bit for bit: this is tried
    before a file there is touched. Nothing is pickled. DataParallel, DistributedDataParallel, torch.compile and EMA
    wrappers are taken off.

    Args:
        model: A converted model made by ``timm.create_model``. Not changed.
        directory: Made if missing. Files of other names in it stay, and so does what a README there says elsewhere.
        repo_id: ``org/name`` for the card's examples; the directory's name if None.
        license: For the card, if the source weights' licence is unknown: it is inherited where timm loaded the weights
            of the model's cfg, also if the model was trained since; with a checkpoint of your own you say it.
        base_model: Hub id of the source weights; that of the model's cfg if None.
        datasets: Hub ids of training data, for the card.
        tags: More tags for the card.
        metrics: Measured results for the card's model-index.
        config: More top-level entries for config.json, such as ``label_names`` and ``label_descriptions``.

    Returns:
        The directory.

    Raises:
        ConversionError: Not converted, not a model that timm could load again (a head replaced by hand, NaN), a licence
            other than the inherited one, or a README there that cannot be read. Nothing was written.
        OSError: The directory cannot be written, or the disk is full. Each file there is then whole, old or new.

    Example:
        >>> save_pretrained(model, "out")
        >>> model = timm.create_model("local-dir:out", pretrained=True)
    """
    model = unwrapped(model)
    cfg = timm_cfg(model)
    _check_config_entries(config or {})
    report = conversion_report(model)
    license = inherited_license(cfg, license) if cfg.get("license") or license else None
    cfg = {**cfg, "tag": _masterkeys_tag(cfg.get("tag")), "license": license, "notes": _noted(cfg, base_model)}
    base_model = base_model or _base_model(cfg)
    dense: Any = fuse_masterkeys(model).to(memory_format=torch.contiguous_format)
    dense.pretrained_cfg = cfg
    args = _timm.model_args(dense)  # the compact file has the settings; a bank need not fit in JSON
    for name in [name for name in args if name.startswith("mk_")]:
        del args[name]
    directory = Path(directory)
    existing = read_readme(directory / "README.md")
    with _saving(directory) as tmp:
        # The file name is pinned: without it timm takes a pickle if the Hub does not answer for the safetensors.
        extra = {"pretrained_cfg": {"hf_hub_filename": DENSE_NAME}, "masterkeys": _about(model, cfg, base_model)}
        with os_errors():
            save_for_hf(dense, str(tmp), model_config={**(config or {}), **extra}, safe_serialization=True)
        save_compact(model, tmp / COMPACT_NAME)
        saved = json.loads((tmp / "config.json").read_text())
        saved["masterkeys"]["sha256"] = {name: file_sha256(tmp / name) for name in (DENSE_NAME, COMPACT_NAME)}
        (tmp / "config.json").write_text(json.dumps(saved, indent=2))
        _check_reload(model, tmp)
        card = make_card(
            saved,
            report,
            repo_id or directory.resolve().name,
            license=license,
            base_model=base_model,
            datasets=datasets,
            tags=tags,
            metrics=metrics,
            existing=existing,
        )
        (tmp / "README.md").write_text(str(card), encoding="utf-8")
        for name in FILES:
            with atomic_path(directory / name) as target:
                (tmp / name).replace(target)
    return directory


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """A temporary folder in the directory, which is made if missing and taken away again if nothing comes of it.

    Those that killed saves have left are removed. Who is saving holds a shared lock on the directory, so that nobody
    else gets the exclusive one and takes the folder of a living save for a left one.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            if fcntl:
                lock = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, lock)
                with contextlib.suppress(OSError):  # somebody else is saving, or a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for left in directory.glob(".saving-*"):
                        shutil.rmtree(left, ignore_errors=True)
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_SH)
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory, prefix=".saving-")))
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                directory.rmdir()
        raise


def _check_config_entries(config: Mapping[str, Any]) -> None:
    own = [name for name in config if name in OWN_ENTRIES]
    if own:
        raise ConversionError(f"config holds {', '.join(own)}, which the model says by itself. Leave it out.")
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config cannot be written as JSON: {error}.") from None


def _check_reload(model: nn.Module, directory: Path) -> None:
    """Raises unless timm loads the saved files as the very same model."""
    given = model.state_dict()
    for name, value in given.items():
        if not value.isfinite().all():
            raise ConversionError(f"{name} holds NaN or Inf; repair the model first.")
    try:
        with torch.random.fork_rng(devices=[]):
            again = timm.create_model(f"local-dir:{directory}", pretrained=True)
    except OSError:
        raise
    except Exception as error:  # whatever timm makes of files of another structure
        raise ConversionError(
            f"What would be saved does not load again: {in_short(error)} {_STRUCTURE} (Of an architecture of your own, "
            "call register_names with its name.)"
        ) from error
    saved = {name: value.cpu() for name, value in again.state_dict().items()}
    differing = sorted(saved.keys() ^ given.keys()) or [
        name for name, value in given.items() if not _same(saved[name], value.cpu())
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


def timm_cfg(model: nn.Module) -> dict[str, Any]:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture") or not hasattr(model, "num_classes"):
        raise ConversionError(
            f"{type(model).__name__} is not a whole timm model (no pretrained_cfg), so timm could not load it again. "
            "Save its state_dict instead."
        )
    layers = [module for module in model.modules() if isinstance(module, MasterKeyConv2d)]
    if not layers or is_known(model):
        return dict(cfg)
    drawn = all(not layer.r2.is_meta and bool((layer.r2 < 0).all()) for layer in layers)
    notes = tuple(note for note in cfg.get("notes") or () if not note.startswith(SOURCE_NOTE))
    cfg = {key: value for key, value in cfg.items() if key not in ("license", "hf_hub_id", "url", "origin_url", "tag")}
    return {**cfg, "notes": (*notes, f"{SOURCE_NOTE}{_SCRATCH if drawn else _UNKNOWN}")}


def _masterkeys_tag(tag: str | None) -> str:
    return (f"{TAG}_{tag}" if tag else TAG) if not is_masterkeys_tag(tag) else str(tag)


def _noted(cfg: Mapping[str, Any], base_model: str | None) -> tuple[str, ...]:
    """The cfg's notes, with where the converted weights came from; kept when a published model is published again."""
    notes = tuple(cfg.get("notes") or ())
    if base_model:
        notes = tuple(f"{SOURCE_NOTE}{base_model}" if n == f"{SOURCE_NOTE}{_UNKNOWN}" else n for n in notes)
    if any(note.startswith(SOURCE_NOTE) for note in notes):
        return notes
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    return (*notes, f"{SOURCE_NOTE}{cfg.get('hf_hub_id') or name}")


def _base_model(cfg: Mapping[str, Any]) -> str | None:
    sources = [note.removeprefix(SOURCE_NOTE) for note in cfg["notes"] if note.startswith(SOURCE_NOTE)]
    return sources[0].partition("@")[0] if sources and "/" in sources[0] else None


def _about(model: nn.Module, cfg: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The ``masterkeys`` section of config.json."""
    layers = [module for module in model.modules() if isinstance(module, MasterKeyConv2d)]
    report = conversion_report(model)
    revision = next((note for note in cfg["notes"] if note.startswith(SOURCE_NOTE)), "").partition("@")[2]
    return {
        "format_version": FORMAT_VERSION,
        "banks": {layer.bank.name: layer.bank.digest for layer in layers},
        "keys_per_kernel": max(layer.keys_per_kernel for layer in layers),
        "trainable": layers[0].trainable,
        "layers": len(layers),
        "kernels": report.total.channels,
        "mean_r2": None if math.isnan(report.total.mean_r2) else round(report.total.mean_r2, 4),
        "source": base_model,
        "source_revision": revision or None,
        "versions": {"timm_masterkeys": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
