"""The record of a converted model: its conversions, the source of its weights, the figures of its calibration.

The record is an attribute of the model, ``model.masterkeys``. Each claim in it holds for certain weights: if the model
has other weights now, ``read_record`` leaves the claim out.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import nn

from ..errors import ConversionError
from ..files import tensors_sha256
from ..keys.banks import KeyBank
from ..layers import MasterKeyConv2d, Trainable
from .config import MasterKeysConfig
from .plan import converted_layers
from .tags import dense_tag
from .wrapped import quantised_entry

ATTRIBUTE = "masterkeys"

# Modules left out of ``structure_digest``, as they do nothing in eval mode.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropBlock2d, DropPath, PatchDropout)


@dataclass(frozen=True)
class Source:
    """The dense weights that a model was converted from.

    Attributes:
        name: Hub id, or timm name; None for weights of unknown origin.
        revision: Commit or branch on the Hub, if one was named.
        sha256: SHA-256 of the weights; None if they were not available.
        license: The weights' licence, lower case, as on the Hub; None if unknown.
        license_given: Whether the user gave the licence; else it came with the weights.
    """

    name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    license: str | None = None
    license_given: bool = False

    @classmethod
    def from_cfg(cls, cfg: Any) -> "Source":
        """The weights that a PretrainedCfg names: of timm's registry, or of the Hub."""
        repo, _, revision = (cfg.hf_hub_id or "").partition("@")
        return cls(
            repo or ".".join(filter(None, (cfg.architecture, dense_tag(cfg.tag)))), revision or None, None, cfg.license
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """The figures of the last calibration, measured on held-out images.

    Attributes:
        metric: What was measured: "classification", "dense prediction", "regression", "embedding", "features", or the
            name of a callable.
        before: Figures before calibration, by name; shares are in [0, 1], divergences in nats. "sure agreement" is the
            agreement where the dense network is sure: where it gives its top class a probability above one half.
        after: The same figures after it.
        images: Number of all images, held-out ones included.
        held_out: Number of held-out images, on which the figures were measured; the others were fitted to.
        origin: Where the images came from: "builtin", the name of a folder, or "tensor".
        time: Time of the calibration in UTC, as ISO 8601.
        versions: Versions of timm_masterkeys, timm and torch.
        left_out: Number of steps that a time budget left out.
        entries: The digest of the calibrated model's entries, see ``entries_digest``.
        intervals: The 95 % interval, (low, high), of each share in ``after`` measured on fewer than 50 images.
        structure: The digest of the calibrated model's structure, see ``structure_digest``; "" in old files.
    """

    metric: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    images: int
    held_out: int
    origin: str
    time: str
    versions: Mapping[str, str]
    left_out: int = 0
    entries: str = ""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    structure: str = ""

    def summary(self) -> str:
        """The figures and their metric in one line; those where the dense network is sure come first."""
        names = sorted(self.after, key=lambda name: name != "sure agreement")
        figures = ", ".join(self._figure(name) for name in names if name not in ("sure images", "sure positions"))
        return f"with {self.images - self.held_out} images: {figures} ({self.metric}, {self.held_out} held-out images)"

    def _figure(self, name: str) -> str:
        """The text of one figure before and after, with the number of sure images and the interval."""
        form = ".1%" if name.endswith("agreement") else ".3g"
        before, after = (f"{figures[name]:{form}}" for figures in (self.before, self.after))
        notes, title = [], name
        if name == "sure agreement":
            title = "agreement where the dense network is sure"
            notes += [f"{self.after[n]:,.0f} {n[5:]}" for n in ("sure images", "sure positions") if n in self.after]
        elif name == "agreement":
            title += " on all" if "sure agreement" in self.after else " with the dense network"
        if name in self.intervals:
            low, high = self.intervals[name]
            notes += [f"95 % interval {low:.1%} to {high:.1%}"]
        return f"{title} {before} -> {after}" + (f" ({', '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Record:
    """The record of a converted model.

    Attributes:
        conversions: The configuration of each call that converted layers.
        source: The dense weights it was converted from; None if unknown.
        keys: The digest of the keys that belong to ``source``, see ``keys_digest``. Keys are never trained, so other
            keys mean other weights.
        calibration: The figures of the last calibration; None if there was none.
        was_calibrated: Whether the model was ever calibrated, even if it was trained or got another head since.
        converted_since: Whether layers were converted after the last calibration.
    """

    conversions: tuple[MasterKeysConfig, ...] = ()
    source: Source | None = None
    keys: str = ""
    calibration: CalibrationRecord | None = None
    was_calibrated: bool = False
    converted_since: bool = False

    def calibrated(self, calibration: CalibrationRecord) -> "Record":
        """The record after a calibration with these figures."""
        return replace(self, calibration=calibration, was_calibrated=True, converted_since=False)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON data."""
        return {
            "conversions": [config.to_dict() for config in self.conversions],
            "source": asdict(self.source) if self.source else None,
            "keys": self.keys,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "was_calibrated": self.was_calibrated,
            "converted_since": self.converted_since,
        }


def read_record(model: nn.Module) -> Record:
    """The record of a model, without the claims that do not hold for its present weights."""
    record = getattr(model, ATTRIBUTE, None)
    if not isinstance(record, Record):
        return Record()
    if record.source and record.keys != keys_digest(converted_layers(model)):
        record = replace(record, source=None, keys="")
    if record.calibration:
        holds = record.calibration.entries == entries_digest(model)
        holds = holds and record.calibration.structure in ("", structure_digest(model))
        record = record if holds else replace(record, calibration=None)
    return record


def check_attribute(model: nn.Module) -> None:
    """Raises ConversionError if a model has another attribute in the place of the record."""
    if not isinstance(getattr(model, ATTRIBUTE, Record()), Record):
        raise ConversionError(
            f"{type(model).__name__} has an attribute '{ATTRIBUTE}' of its own, which is where the record of a "
            "conversion goes. Give it another name."
        )


def write_record(model: nn.Module, record: Record) -> None:
    """Stores the record of a model; ties its source to the keys that the model has now. In place."""
    model.masterkeys = tied(record, converted_layers(model))  # type: ignore[assignment]


def tied(record: Record, layers: Mapping[str, MasterKeyConv2d]) -> Record:
    """The record with its source tied to the keys of these layers."""
    return replace(record, keys=keys_digest(layers) if record.source else "")


def set_source(model: nn.Module, source: Source | None) -> None:
    """Stores the source of a model's weights in its record. In place."""
    write_record(model, replace(read_record(model), source=source))


def add_conversion(model: nn.Module, config: MasterKeysConfig, layers: Collection[str]) -> None:
    """Adds the conversion of the named layers to a model's record; a source that held before is kept. In place."""
    record: Record = getattr(model, ATTRIBUTE, Record())
    # The source still holds if the layers of earlier conversions have unchanged keys.
    others = {name: layer for name, layer in converted_layers(model).items() if name not in layers}
    source_holds = record.source is not None and record.keys == keys_digest(others)
    calibrated, source = record.was_calibrated, record.source if source_holds else None
    write_record(
        model, Record((*record.conversions, config), source, was_calibrated=calibrated, converted_since=calibrated)
    )


def forget_record(model: nn.Module) -> None:
    """Removes the record of a model. In place."""
    if isinstance(vars(model).get(ATTRIBUTE), Record):  # not getattr: a wrapper may give its model's
        delattr(model, ATTRIBUTE)


def keys_digest(layers: Mapping[str, MasterKeyConv2d]) -> str:
    """SHA-256, in hex, of the banks and key indices of converted layers, given by name."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(f"{name} {layer.bank.digest} ".encode())
        if not layer.key_index.is_meta:
            digest.update(layer.key_rows().cpu().numpy().tobytes())
    return digest.hexdigest()


def entries_digest(model: nn.Module) -> str:
    """SHA-256, in hex, of a model's state dict; for a quantised model, the text of ``quantised_entry`` instead."""
    return quantised_entry(model) or tensors_sha256(model.state_dict())


def structure_digest(model: nn.Module) -> str:
    """SHA-256, in hex, of a model's structure: what its outputs in eval mode depend on beside its entries.

    These are types and settings of modules (activations, pooling, the eps of norms, ...), and mean and std of images.
    """
    lines = [f"{n} {type(m).__name__} {_settings(m)}" for n, m in model.named_modules() if not isinstance(m, _IDLE)]
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    lines += [f"{name} {[float(value) for value in cfg[name]]}" for name in ("mean", "std") if cfg.get(name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _settings(module: nn.Module) -> str:
    """What a module's output in eval mode depends on beside its entries, as text."""
    if isinstance(module, MasterKeyConv2d):  # its bank and keys are entries, and what trains does not matter
        return f"{nn.Conv2d.extra_repr(module)} {module.same_padding}"
    pooling = (getattr(module, name, None) for name in ("global_pool", "pool_type"))  # text if no module of its own
    return " ".join([module.extra_repr(), *(kind for kind in pooling if isinstance(kind, str))])


def restore_record(
    model: nn.Module, data: Mapping[str, Any], banks: Iterable[KeyBank], trainable: Trainable | None = None
) -> None:
    """Gives a model that was just loaded the record it was saved with, digests included. In place.

    Args:
        model: The loaded model.
        data: From ``Record.to_dict``.
        banks: The banks of the model's layers.
        trainable: Overrides the saved ``trainable``.

    Raises:
        LookupError, TypeError, ValueError, CheckpointError: The data are damaged.
    """
    conversions = tuple(MasterKeysConfig.from_dict(config, banks) for config in data["conversions"])
    if trainable:
        conversions = tuple(replace(config, trainable=trainable) for config in conversions)
    model.masterkeys = Record(  # type: ignore[assignment]
        conversions,
        Source(**data["source"]) if data["source"] else None,
        data["keys"],
        CalibrationRecord(**data["calibration"]) if data["calibration"] else None,
        bool(data.get("was_calibrated", data["calibration"])),  # these two are absent in old files
        bool(data.get("converted_since")),
    )
