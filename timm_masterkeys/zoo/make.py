"""A zoo: many timm networks converted, calibrated, measured and published, by one process or several, in several runs.

The state is in the output folder, in files that are written atomically: ``models/NAME/result.json`` once a network is
measured and saved (``weights`` beside it), with a ``sha`` once it is published. So a run continues where the last one
ended, however it ended. A process holds a lock on the network that it makes; the lock ends with the process.
"""

import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.data import is_img_extension

from ..calibration.images import BUILTIN, FEWEST, HELD_OUT_EVERY, photographs_sha256
from ..calibration.pipeline import convert_and_calibrate
from ..conversion.config import LayerSettings, MasterKeysConfig
from ..conversion.convert import apply
from ..conversion.copies import copy_model
from ..conversion.plan import converted_layers
from ..conversion.record import Source, read_record, set_source
from ..conversion.tags import is_masterkeys_tag, masterkeys_tag
from ..errors import ZooError
from ..files import atomic_path, folder_sha256, locked, walk_files
from ..hub.license import check_license
from ..hub.publish import push_to_hub
from ..hub.save import save_pretrained
from ..timm_plugin.published import list_architectures
from ..version import __version__
from .evaluate import LabelledImages, measure
from .results import Result, make_result, read_result, write_result, write_tables

SETTINGS = "zoo.json"


@dataclass(frozen=True)
class ZooSettings:
    """The settings of a zoo; ZooError or ConversionError for those that would make every network fail."""

    org: str  # user or organisation on the Hub; a network is published as ``org/<arch>.mk8_<tag>``
    labelled: LabelledImages  # to measure accuracies with
    output: Path  # folder to work in, and for the results
    calibrate: str = BUILTIN  # images to calibrate with: a folder, or "builtin"
    config: MasterKeysConfig = field(default_factory=MasterKeysConfig)
    dataset: str | None = None  # the labelled images' name on model cards; their folder's name if None
    license: str | None = None  # of weights whose licence timm does not know; without it, these networks fail
    private: bool | None = None  # new repositories are private
    dry_run: bool = False  # everything but publishing: the Hub is read, nothing is changed there
    keep_weights: bool = False  # keep downloads, in timm's usual cache, and the networks that are published
    batch_size: int = 64  # images at a time when measuring
    workers: int = 4  # processes that read images
    device: str = "cpu"

    def __post_init__(self) -> None:
        try:
            validate_repo_id(f"{self.org}/name")
        except HFValidationError as error:
            raise ZooError(f"org is '{self.org}', expected the name of a user or organisation: {error}") from None
        if (size := self.batch_size) < 1 or self.workers < 0:
            raise ZooError(f"batch_size is {size} and workers {self.workers}, expected at least 1 and at least 0.")
        if self.license:
            check_license(self.license)
        if self.calibrate == BUILTIN:
            return
        if not os.path.isdir(self.calibrate):
            raise ZooError(f"There is no folder '{self.calibrate}' of images to calibrate with.")
        count = sum(is_img_extension(path.suffix.lower()) for path in walk_files(self.calibrate))
        fewest = FEWEST if self.config.agreement is None else FEWEST * HELD_OUT_EVERY
        if count < fewest:
            raise ZooError(
                f"There are {count} images in '{self.calibrate}' to calibrate with, expected {fewest} or more."
            )

    @cached_property
    def result_settings(self) -> dict[str, Any]:
        """What results depend on, as JSON data. The folder of images is digested once, as it may be large."""
        return {
            "calibrate": photographs_sha256() if self.calibrate == BUILTIN else folder_sha256(self.calibrate),
            "evaluate": self.labelled.sha256,
            "conversion": self.config.to_dict(),
            "versions": {"timm_masterkeys": __version__, "timm": timm.__version__},
        }

    @property
    def dataset_name(self) -> str:
        """The labelled images' name on model cards."""
        return self.dataset or self.labelled.folder.name

    def folder(self, name: str) -> Path:
        """Where the files of a network are, by its timm name."""
        return self.output / "models" / name

    def repo(self, name: str) -> str:
        """Where a network is published, by its timm name."""
        return f"{self.org}/{_converted_name(name)}"


@dataclass(frozen=True)
class Outcome:
    """The state of a network after a run."""

    name: str  # of the dense network in timm
    result: Result | None  # None if it was not measured
    error: str = ""  # error of this run, in one line
    fresh: bool = True  # made or tried by this process; else by an earlier run or another process

    def __str__(self) -> str:
        text = self.name
        if r := self.result:
            accuracies = f"dense {r.dense_top1:.2f}, not calibrated {r.uncalibrated_top1:.2f}, calibrated {r.top1:.2f}"
            address = f"hf-hub:{r.repo}@{r.sha}" if r.sha else "not published"
            text += f"  top-1 {accuracies} on {r.images:,} images  {address}"
        return f"{text}  FAILED: {self.error}" if self.error else text


def plan_zoo(patterns: Sequence[str], num_classes: int) -> tuple[list[str], dict[str, str]]:
    """The timm networks with weights and depthwise convolutions that match, and those left out, each with the reason.

    Args:
        patterns: As ``timm.list_models`` takes them.
        num_classes: Number of classes of the labels; networks with another number are left out.

    Raises:
        ZooError: No network is left to make.
    """
    convertible = set(list_architectures())
    names, left_out = [], {}
    for name in timm.list_models(list(patterns), pretrained=True):
        arch, _, tag = name.partition(".")
        cfg: Any = timm.get_pretrained_cfg(name)
        if is_masterkeys_tag(tag):
            continue
        if arch not in convertible:
            left_out[name] = "no depthwise convolutions"
        elif cfg.num_classes != num_classes:
            left_out[name] = f"{cfg.num_classes} classes, the labels are of {num_classes}"
        else:
            names.append(name)
    if not names:
        why = "".join(f" {name}: {reason}." for name, reason in list(left_out.items())[:3])
        raise ZooError(f"No timm network with weights to make of {', '.join(patterns)}; see timm.list_models.{why}")
    return names, left_out


def make_zoo(names: Sequence[str], zoo: ZooSettings) -> Iterator[Outcome]:
    """Makes every network that is not made yet, and yields the outcome of each when it is done or has failed.

    Several processes may do this at once, in one output folder. RANK and WORLD_SIZE, which torchrun sets, tell each
    process which networks to begin with; after these it takes those of other processes. Each process ends when all
    networks are done, and yields all outcomes. results.csv and names.txt are up to date after each network.

    Args:
        names: From ``plan_zoo``.
        zoo: The settings.

    Raises:
        ZooError: An account that may not publish, or results of other settings in the output folder. Nothing was
            changed.
    """
    started = time.time()
    _check_account(zoo)
    _check_settings(zoo)
    (zoo.output / "models").mkdir(parents=True, exist_ok=True)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    pending = [*names[rank::world], *(name for i, name in enumerate(names) if i % world != rank)]
    for wait in (False, True):  # networks that other processes work on come last
        for name in pending.copy():
            with locked(zoo.output / f".{name}.lock", wait) as held:
                if not held:
                    continue
                outcome = _finish_network(name, zoo, started)
                pending.remove(name)
            with locked(zoo.output / ".zoo.lock"):
                write_tables(zoo.output)
            yield outcome


def _check_account(zoo: ZooSettings) -> None:
    """Raises ZooError unless the account of the token may publish to ``org``; a dry run needs no token and no Hub."""
    if not zoo.dry_run and not get_token():
        raise ZooError(
            "There is no token to publish with. Log in with `hf auth login`, set HF_TOKEN, or try a dry run."
        )
    try:
        account = HfApi().whoami()
    except Exception as error:  # no token, or an error of the Hub or of the connection
        if zoo.dry_run:
            return  # each network's own check says more
        raise ZooError(f"The Hub does not say whose token this is: {' '.join(str(error).split())[:200]}") from None
    allowed = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    scoped = account.get("auth", {}).get("accessToken", {}).get("role") == "fineGrained"  # has rights of its own
    if zoo.org not in allowed and not scoped:
        raise ZooError(f"The account may not publish to '{zoo.org}', only to {', '.join(allowed)}.")


def _check_settings(zoo: ZooSettings) -> None:
    """Raises ZooError if the output folder has results of other settings."""
    path = zoo.output / SETTINGS
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else zoo.result_settings
        differing = [name for name, value in zoo.result_settings.items() if stored.get(name) != value]
    except (AttributeError, ValueError) as error:
        raise ZooError(
            f"'{path}' is damaged. Remove it, and give the settings of the results that are there already. ({error})"
        ) from None
    if differing:
        raise ZooError(
            f"'{zoo.output}' holds a zoo with other settings ({', '.join(differing)}), see {SETTINGS} there: their "
            "results do not belong in one table. Give the same settings, or another output folder."
        )


def _finish_network(name: str, zoo: ZooSettings, started: float) -> Outcome:
    """Makes and publishes a network, as far as not done yet. Errors of making and publishing it are caught here."""
    folder = zoo.folder(name)
    folder.mkdir(exist_ok=True)
    failure, checked = folder / "failure.txt", folder / "checked.txt"  # of the latter only the time counts
    result = None
    try:
        result = read_result(folder / "result.json")
        if result and result.repo != zoo.repo(name):  # an earlier run had another org
            result = replace(result, repo=zoo.repo(name), sha="")
        if result and (result.sha or (zoo.dry_run and _written_since(started, checked))):
            return Outcome(name, result, fresh=False)
        if _written_since(started, failure):
            return Outcome(name, result, failure.read_text(encoding="utf-8").partition("\n")[0], fresh=False)
        if result is None or not (folder / "weights").is_dir():
            result = _make(name, zoo)
        result = _publish(name, result, zoo)
        checked.touch()
        failure.unlink(missing_ok=True)
        return Outcome(name, result)
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        with atomic_path(failure) as tmp:
            tmp.write_text(f"{text}\n\n{traceback.format_exc()}", encoding="utf-8")
        return Outcome(name, result, text)
    finally:
        if not zoo.keep_weights:
            for unneeded in ("download", "weights") if result and result.sha else ("download",):
                shutil.rmtree(folder / unneeded, ignore_errors=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _written_since(started: float, path: Path) -> bool:
    """Whether a file was written since this run began, by another process: what that did is not tried again."""
    return path.exists() and path.stat().st_mtime >= started


def _make(name: str, zoo: ZooSettings) -> Result:
    """Downloads, converts, calibrates, measures and saves a network."""
    start, folder = time.perf_counter(), zoo.folder(name)
    cfg: Any = timm.get_pretrained_cfg(name)
    license = zoo.license if cfg.license in (None, "unknown") else cfg.license
    if not license:
        raise ZooError("The licence of the source weights is not known. Find it out and pass it: --license.")
    cache = None if zoo.keep_weights else folder / "download"
    dense = timm.create_model(name, pretrained=True, cache_dir=cache).eval().to(zoo.device)
    calibrated, report = convert_and_calibrate(dense, zoo.config, zoo.calibrate)
    layers = {layer_name: LayerSettings.from_layer(layer) for layer_name, layer in converted_layers(calibrated).items()}
    models = [calibrated, dense, apply(copy_model(dense), layers)]
    rows = measure(models, zoo.labelled, batch_size=zoo.batch_size, workers=zoo.workers, device=zoo.device)
    measured, measured_dense, measured_uncalibrated = rows
    result = make_result(
        calibrated,
        report,
        calibrated=measured,
        dense=measured_dense,
        uncalibrated=measured_uncalibrated,
        model=_converted_name(name),
        bank=zoo.config.bank.name,
        seconds=round(time.perf_counter() - start, 1),
        source=name,
        repo=zoo.repo(name),
    )
    set_source(calibrated, Source.from_cfg(cfg))
    entries = result.card_entries(zoo.dataset_name)
    save_pretrained(calibrated.cpu(), folder / "weights", repo_id=result.repo, license=license, **entries)
    # Not before the first network is made: a run that fails binds the folder to no settings. Checked again, as another
    # process may have written others meanwhile.
    with locked(zoo.output / ".zoo.lock"), atomic_path(zoo.output / SETTINGS) as tmp:
        _check_settings(zoo)
        tmp.write_text(json.dumps(zoo.result_settings, indent=2), encoding="utf-8")
    write_result(folder / "result.json", result)
    return result


def _converted_name(name: str) -> str:
    arch, _, tag = name.partition(".")
    return f"{arch}.{masterkeys_tag(tag)}"


def _publish(name: str, result: Result, zoo: ZooSettings) -> Result:
    """Publishes the network that ``_make`` saved, except in a dry run; returns and writes its row with the commit."""
    folder = zoo.folder(name)
    model = timm.create_model(f"local-dir:{folder / 'weights'}", pretrained=True)
    source = read_record(model).source
    if zoo.license and source and source.license_given:  # an earlier run may have had another
        set_source(model, replace(source, license=zoo.license.lower()))
    published = push_to_hub(
        model,
        result.repo,
        private=zoo.private,
        dry_run=zoo.dry_run,
        commit_message=f"Publish {result.model}",
        **result.card_entries(zoo.dataset_name),
    )
    result = replace(result, sha="" if zoo.dry_run else published.sha or "")
    write_result(folder / "result.json", result)
    return result
